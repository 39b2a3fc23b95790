"""`SAMITrainer` on a tiny random model: what it updates, what it logs, what it compares with."""

import contextlib
import copy
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from tests.conftest import make_tiny_model
from tests.sami.conftest import sami_rows
from tests.sami.test_scores import plain_logps
from trl_extensions import SAMIConfig, SAMITrainer
from trl_extensions.core.training.load import as_config
from trl_extensions.sami.loss import mutual_information_bound, sami_loss


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
METRICS = {
    "loss", "mi/bound", "mi/contrast_per_token", "mi/accuracy_rows", "mi/accuracy_columns", "logps/matched",
    "logps/mismatched", "kl", "completions/mean_length", "completions/min_length", "completions/max_length",
    "num_tokens",
}  # fmt: skip


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def matrices(trainer, dataset):
    """C x C matrices of mean log-probabilities from the plain loop over the prepared rows."""
    return [
        torch.stack(
            [
                torch.stack([plain_logps(trainer.model, p, c).mean() for c in row["completion_input_ids"]])
                for p in row["prompt_input_ids"]
            ]
        )
        for row in dataset
    ]


class TestUpdates:
    def test_gradient_accumulation_is_one_large_batch(self, rows, make_trainer):
        results = []
        for batch, accumulation in ((6, 1), (1, 6), (2, 3), (4, 2)):  # the last: micro-batches of 4 and 2 queries
            trainer = make_trainer(
                rows,
                model=make_tiny_model(384),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=2,
                beta=0.5,
            )
            trainer.train()
            results.append((steps(trainer), weights(trainer.model)))
        (logs, expected), others = results[0], results[1:]
        for other_logs, other in others:
            for ours, theirs in zip(other_logs, logs, strict=True):
                assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=1e-5)
                assert float(ours["grad_norm"]) == pytest.approx(float(theirs["grad_norm"]), rel=1e-4)
                assert ours["mi/bound"] == pytest.approx(theirs["mi/bound"], abs=1e-5)
            for name in expected:
                torch.testing.assert_close(other[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)

    def test_first_update_is_the_plain_gradient(self, rows, make_trainer):
        trainer = make_trainer(rows, max_steps=1, per_device_train_batch_size=6, max_grad_norm=0.0)
        plain = copy.deepcopy(trainer.model)
        plain.__dict__.pop("forward")
        losses = [
            sami_loss(
                torch.stack(
                    [
                        torch.stack([plain_logps(plain, p, c).mean() for c in row["completion_input_ids"]])
                        for p in row["prompt_input_ids"]
                    ]
                )
            )
            for row in trainer.train_dataset
        ]
        torch.stack(losses).mean().backward()
        trainer.train()
        for (name, after), before in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(after, before - 0.1 * before.grad, atol=1e-5, rtol=1e-4, msg=name)

    def test_lora_changes_the_adapter_only(self, rows, make_trainer):
        trainer = make_trainer(rows, peft_config=LoraConfig(**LORA), learning_rate=1.0)
        before = weights(trainer.model)
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name for name in changed)

    def test_gradient_checkpointing_changes_nothing(self, rows, make_trainer):
        plain = make_trainer(rows, model=make_tiny_model(384))
        checkpointed = make_trainer(rows, model=make_tiny_model(384), gradient_checkpointing=True)
        plain.train()
        checkpointed.train()
        for name, value in weights(plain.model).items():
            torch.testing.assert_close(weights(checkpointed.model)[name], value, msg=name)

    def test_training_raises_the_bound(self, rows, make_trainer):
        trainer = make_trainer(rows, eval_dataset=rows, max_steps=20, learning_rate=0.5)
        before = trainer.evaluate()["eval_mi/bound"]
        trainer.train()
        assert trainer.evaluate()["eval_mi/bound"] > before + 0.1

    def test_4bit(self, rows, make_trainer, tiny_model_dir):
        from transformers import BitsAndBytesConfig

        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=quantization)
        trainer = make_trainer(rows, model=model, peft_config=LoraConfig(**LORA), max_steps=3, bf16=True)
        before = weights(trainer.model)
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name for name in changed)
        assert all(math.isfinite(float(entry["loss"])) for entry in steps(trainer))


class TestLogs:
    def test_every_step_logs_every_metric(self, rows, make_trainer):
        trainer = make_trainer(rows)
        trainer.train()
        assert len(steps(trainer)) == 2
        assert all(set(entry) >= METRICS for entry in steps(trainer))

    def test_evaluate_is_the_mean_over_queries(self, make_trainer):
        # 7 rows in batches of 3, 3 and 1: a mean over batches would weigh the last row threefold
        held_out = Dataset.from_list(sami_rows(7))
        trainer = make_trainer(held_out, eval_dataset=held_out, per_device_eval_batch_size=3)
        report = trainer.evaluate()
        plain = matrices(trainer, trainer.eval_dataset)
        assert report["eval_loss"] == pytest.approx(torch.stack([sami_loss(m) for m in plain]).mean().item(), abs=1e-5)
        contrast = torch.stack([mutual_information_bound(m) for m in plain]).mean().item()
        assert report["eval_mi/contrast_per_token"] == pytest.approx(contrast, abs=1e-5)
        # The scores are means over tokens; the bound is that of the sums
        lengths = [torch.tensor([len(ids) for ids in row["completion_input_ids"]]) for row in trainer.eval_dataset]
        sums = [matrix * own for matrix, own in zip(plain, lengths, strict=True)]
        bound = torch.stack([mutual_information_bound(m) for m in sums]).mean().item()
        assert report["eval_mi/bound"] == pytest.approx(bound, abs=1e-4)
        matched = torch.stack([m.diagonal().mean() for m in plain]).mean().item()
        assert report["eval_logps/matched"] == pytest.approx(matched, abs=1e-5)
        assert {f"eval_{name}" for name in METRICS} <= set(report)

    def test_evaluate_prepares_raw_rows(self, rows, make_trainer):
        trainer = make_trainer(rows, eval_dataset=rows)
        assert trainer.evaluate(rows)["eval_mi/bound"] == pytest.approx(trainer.evaluate()["eval_mi/bound"], abs=1e-6)

    def test_kl_can_be_left_out(self, rows, make_trainer):
        trainer = make_trainer(rows, log_kl=False)
        assert trainer.reference is None
        trainer.train()
        assert all("kl" not in entry for entry in steps(trainer))


class TestReference:
    @pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
    def test_kl_starts_at_zero_and_the_original_stays(self, rows, make_trainer, peft_config):
        trainer = make_trainer(rows, peft_config=peft_config, max_steps=3, learning_rate=1.0)
        trainer.train()
        kls = [entry["kl"] for entry in steps(trainer)]
        assert kls[0] == pytest.approx(0.0, abs=1e-6)
        assert kls[-1] > 1e-5

    def test_the_original_of_a_trained_adapter_is_the_model_as_given(self, rows, make_trainer, tiny_model):
        model = get_peft_model(tiny_model, LoraConfig(**LORA, init_lora_weights=False))  # random, so it matters
        trainer = make_trainer(rows, model=model, max_steps=3, learning_rate=1.0)
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.model)
        assert steps(trainer)[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert steps(trainer)[-1]["kl"] > 1e-5
        assert any(".ref." in name for name in after)
        assert all(torch.equal(after[name], before[name]) for name in after if ".ref." in name)
        assert any(not torch.equal(after[name], before[name]) for name in after if ".default." in name)

    def test_a_model_changed_in_memory_is_its_own_original(self, rows, make_trainer, tiny_model):
        with torch.no_grad():
            tiny_model.model.embed_tokens.weight.mul_(1.5)
        trainer = make_trainer(rows, model=tiny_model, max_steps=1)
        trainer.train()
        assert steps(trainer)[0]["kl"] == pytest.approx(0.0, abs=1e-6)

    def test_an_explicit_reference_is_used(self, rows, make_trainer):
        other = make_tiny_model(384, seed=1)
        trainer = make_trainer(rows, ref_model=other, max_steps=1, per_device_train_batch_size=6)
        plain = []
        for row in trainer.train_dataset:
            sums = tokens = 0.0
            for p, c in zip(row["prompt_input_ids"], row["completion_input_ids"], strict=True):
                ids = torch.tensor([p + c])
                with torch.no_grad():
                    ours = trainer.model(ids).logits[0, len(p) - 1 : -1].log_softmax(-1)
                    theirs = other(ids).logits[0, len(p) - 1 : -1].log_softmax(-1)
                sums += (ours.exp() * (ours - theirs)).sum().item()
                tokens += len(c)
            plain.append(sums / tokens)
        trainer.train()
        assert steps(trainer)[0]["kl"] == pytest.approx(sum(plain) / len(plain), rel=1e-4)

    def test_the_policy_itself_is_refused_as_reference(self, rows, make_trainer, tiny_model):
        with pytest.raises(ValueError, match="the same object"):
            make_trainer(rows, model=tiny_model, ref_model=tiny_model)


class TestPreserving:
    """KL(original || policy) behind the query without a constitution, against full logits of one sequence each."""

    @pytest.fixture
    def plain_rows(self):
        return Dataset.from_list([row | {"query": f"Tell me of {row['completions'][0]}"} for row in sami_rows(3)])

    @pytest.mark.parametrize("share_prefix", [False, True])
    @pytest.mark.parametrize("lora", [False, True])
    def test_loss_and_gradient_equal_the_dense_ones(self, plain_rows, make_trainer, share_prefix, lora):
        how = {"peft_config": LoraConfig(**LORA)} if lora else {"ref_model": make_tiny_model(384, seed=1)}
        trainer = make_trainer(plain_rows, preserve_weight=3.0, share_prefix=share_prefix, **how)
        model, other = trainer.model, how.get("ref_model")
        if lora:  # the original is the model with its adapter off, which a fresh adapter does not differ from
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        rows, expected = list(trainer.train_dataset), []
        for matrix, row in zip(matrices(trainer, rows), rows, strict=True):
            kl = []
            for completion in row["completion_input_ids"]:
                prompt = row["plain_input_ids"]
                ids, scored = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
                ours = model(ids).logits[0, scored].log_softmax(-1)
                with torch.no_grad(), model.disable_adapter() if lora else contextlib.nullcontext():
                    theirs = (other or model)(ids).logits[0, scored].log_softmax(-1)
                kl.append((theirs.exp() * (theirs - ours)).sum(-1))
            expected.append((sami_loss(matrix), torch.cat(kl).mean()))
        dense = sum(loss + 3.0 * kl for loss, kl in expected)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(dense, trained)
        total, losses, statistics = trainer._score(model, trainer._prepare_inputs(trainer.data_collator(rows)))
        torch.testing.assert_close(statistics["kl_plain"], torch.stack([kl for _, kl in expected]).detach())
        assert statistics["kl_plain"].min() > 1e-4
        torch.testing.assert_close(losses.sum(), dense.detach())
        for ours, theirs in zip(torch.autograd.grad(total, trained), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def test_it_holds_the_model_where_it_was(self, plain_rows, make_trainer):
        moved = []
        for weight in (0.0, 3.0):
            settings = {"max_steps": 8, "learning_rate": 0.1, "per_device_train_batch_size": 3}
            trainer = make_trainer(plain_rows, model=make_tiny_model(384), preserve_weight=weight, **settings)
            original = make_tiny_model(384)
            trainer.train()
            ids = torch.tensor([trainer._tokenizer("Tell me of eggs: yes.")["input_ids"]])
            ours, theirs = (model(ids).logits.log_softmax(-1) for model in (trainer.model, original))
            moved.append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
            assert ("kl_plain" in steps(trainer)[-1]) == bool(weight)
        assert moved[1] < moved[0] / 2

    def test_the_query_alone_is_asked_for_where_it_is_missing(self, rows, make_trainer):
        with pytest.raises(ValueError, match=r"train row 0: .*`plain_prompt`"):
            make_trainer(rows, preserve_weight=1.0)
        queries = ["お茶について。", "卵について。", "Tea?", "Eggs?", "Sky?", "Fox?"]
        prompts = [[{"role": "user", "content": own}] for own in queries]
        given = make_trainer(rows.add_column("plain_prompt", prompts), preserve_weight=1.0).train_dataset
        queried = make_trainer(rows.add_column("query", queries), preserve_weight=1.0)
        assert given["plain_input_ids"] == queried.train_dataset["plain_input_ids"]


class TestSavingAndResuming:
    @pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
    def test_resuming_mid_epoch_gives_the_same_losses(self, rows, make_trainer, peft_config, tmp_path):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        whole = make_trainer(rows, model=make_tiny_model(384), peft_config=peft_config, **settings)
        whole.train()
        resumed = make_trainer(
            rows, model=make_tiny_model(384), peft_config=peft_config, **settings | {"output_dir": str(tmp_path / "b")}
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        expected, got = steps(whole)[2:], steps(resumed)[-2:]
        for ours, theirs in zip(got, expected, strict=True):
            for name in ("loss", "mi/bound", "kl"):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-5), name

    def test_saved_adapter_reloads_to_the_same_scores(self, rows, make_trainer, tmp_path):
        trainer = make_trainer(rows, eval_dataset=rows, peft_config=LoraConfig(**LORA), learning_rate=1.0)
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        reloaded = PeftModel.from_pretrained(make_tiny_model(384), tmp_path / "adapter")
        again = make_trainer(rows, eval_dataset=rows, model=reloaded)
        assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)

    def test_model_card_cites_the_paper(self, rows, make_trainer, tmp_path):
        make_trainer(rows).create_model_card("tiny")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "2404.14313" in card and 'Fr{\\"a}nken' in card and "- sami" in card


class TestConstruction:
    @pytest.mark.parametrize("plain", [TrainingArguments, SFTConfig])
    def test_plain_arguments_become_sami_config(self, rows, tiny_model, tiny_tokenizer, tmp_path, plain):
        args = plain(str(tmp_path), learning_rate=3e-4, use_cpu=True, bf16=False, report_to="none")
        trainer = SAMITrainer(tiny_model, args, train_dataset=rows, processing_class=tiny_tokenizer)
        assert isinstance(trainer.args, SAMIConfig)
        assert trainer.args.learning_rate == 3e-4 and trainer.args.beta == 0.0

    def test_no_arguments(self, tiny_model):
        tiny_model.config._name_or_path = "someone/tiny"
        args = as_config(None, SAMIConfig, tiny_model, "SAMI")
        assert isinstance(args, SAMIConfig) and args.output_dir == "tiny-SAMI"

    def test_loads_by_path(self, rows, tiny_model_dir, tmp_path):
        args = SAMIConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
        trainer = SAMITrainer(str(tiny_model_dir), args, train_dataset=rows)
        trainer.train()
        assert json.loads((Path(tiny_model_dir) / "config.json").read_text())["model_type"] == "llama"

    def test_prompt_learning_is_refused(self, rows, make_trainer):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="virtual tokens"):
            make_trainer(rows, peft_config=config)

    def test_streams_are_refused(self, rows, make_trainer):
        with pytest.raises(TypeError, match="streaming=False"):
            make_trainer(rows.to_iterable_dataset())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"packing": True}, "`packing` does not work"),
            ({"padding_free": True}, "`padding_free` does not work"),
            ({"beta": -1.0}, "`beta` must be"),
            ({"beta": "much"}, "`beta` must be"),
            ({"preserve_weight": -1.0}, "`preserve_weight` must be"),
            ({"logp_reduction": "median"}, "`logp_reduction` must be one of mean, sum"),
            ({"overlong_policy": "cut"}, "`overlong_policy` must be one of"),
            ({"prompt_template": "{question}"}, "{question}"),
            ({"prompt_template": "{query:5d} {constitution}"}, "just so"),
            ({"prompt_template": "{query} {constitution"}, "not a valid template"),
            ({"prompt_template": "{query}"}, "must have the fields {query} and {constitution}"),
            ({"guard_max_kl": 1.0}, "`guard_steps` is 0"),
            ({"guard_steps": -1}, "`guard_steps` must be"),
            ({"loss_type": "dft"}, "`loss_type`"),
        ],
    )
    def test_bad_settings_are_one_line(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message) as caught:
            SAMIConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)
        assert "\n" not in str(caught.value)
