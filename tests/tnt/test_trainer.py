"""`TNTTrainer` on a tiny random model: what it updates, what it logs, what it compares with."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from tests.conftest import make_tiny_model
from tests.tnt.conftest import tnt_rows
from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.tnt.loss import VARIANTS, targeted_negative_loss
from trl_extensions.tnt.scores import perplexity, score_rows, scored_states


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
METRICS = {
    "loss", "prob/negative", "prob/negative_ref", "kl/negative", "kl/kept", "entropy", "tokens/negative", "num_tokens",
}  # fmt: skip


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def plain_losses(model, original, dataset, **objective):
    """Losses `(T - 1,)` and signs of each prepared row, from full logits and the definition."""
    for row in dataset:
        ids, signs = torch.tensor([row["input_ids"]]), torch.tensor([row["token_weights"]])
        with torch.no_grad():
            ref_logits = original(ids).logits[:, :-1]
        logits = model(ids).logits[:, :-1]
        yield targeted_negative_loss(logits, ref_logits, ids[:, 1:], signs[:, 1:], **objective)[0], signs[0, 1:]


def plain_loss(model, original, dataset, **objective):
    losses, signs = zip(*plain_losses(model, original, dataset, **objective), strict=True)
    return torch.cat(losses).sum() / (torch.cat(signs) != 0).sum()


def marked(word):
    rows = tnt_rows()
    for row in rows:
        start = row["completion"][0]["content"].find(word)
        row["negative_spans"] = [[start, start + len(word)]] if start >= 0 else []
    return Dataset.from_list(rows)


class TestUpdates:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_first_update_is_the_plain_gradient(self, rows, make_trainer, variant):
        other = make_tiny_model(384, seed=1)
        trainer = make_trainer(
            rows, max_steps=1, per_device_train_batch_size=6, max_grad_norm=0.0, variant=variant, alpha=2.0,
            ref_model=other
        )  # fmt: skip
        plain = copy.deepcopy(trainer.model)
        plain.__dict__.pop("forward")
        loss = plain_loss(plain, other, trainer.train_dataset, variant=variant, alpha=2.0)
        loss.backward()
        trainer.train()
        assert float(steps(trainer)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-3)  # logged with four digits
        for (name, after), before in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(after, before - 0.1 * before.grad, atol=1e-5, rtol=1e-4, msg=name)

    def test_gradient_accumulation_is_one_large_batch(self, rows, make_trainer):
        # The rows differ in length, so a mean over micro-batches would weigh tokens differently
        results = []
        for batch, accumulation in ((6, 1), (1, 6), (2, 3), (4, 2)):  # the last: micro-batches of 4 and 2 rows
            trainer = make_trainer(
                rows, model=make_tiny_model(384), per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation, max_steps=2,
            )  # fmt: skip
            trainer.train()
            results.append((steps(trainer), weights(trainer.model)))
        (logs, expected), others = results[0], results[1:]
        for other_logs, other in others:
            for ours, theirs in zip(other_logs, logs, strict=True):
                for name in METRICS | {"grad_norm"}:
                    assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), name
            for name in expected:
                torch.testing.assert_close(other[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)

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

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_training_removes_and_keeps(self, rows, make_trainer, taught_model, variant):
        trainer = make_trainer(
            rows, model=taught_model(), eval_dataset=rows, max_steps=30, optim="adamw_torch", learning_rate=1e-3,
            variant=variant, per_device_train_batch_size=6,
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert before["eval_prob/negative"] > 0.5
        assert after["eval_prob/negative"] < 0.3
        if variant in ("ff", "rr", "rf"):
            assert after["eval_kl/kept"] < 0.2

    def test_4bit(self, rows, make_trainer, tiny_model_dir):
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=quantization)
        trainer = make_trainer(rows, model=model, peft_config=LoraConfig(**LORA), max_steps=3, bf16=True)
        before = weights(trainer.model)
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name for name in changed)
        assert all(math.isfinite(float(entry["loss"])) for entry in steps(trainer))

    def test_resume_in_the_middle_of_an_epoch(self, rows, make_trainer, tmp_path):
        straight = make_trainer(rows, model=make_tiny_model(384), max_steps=4, lr_scheduler_type="linear")
        straight.train()
        settings = {"max_steps": 4, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}
        make_trainer(rows, model=make_tiny_model(384), **settings).train()
        resumed = make_trainer(rows, model=make_tiny_model(384, seed=5), ref_model=make_tiny_model(384), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert [entry["loss"] for entry in steps(resumed)] == [entry["loss"] for entry in steps(straight)]
        for name, value in weights(straight.model).items():
            torch.testing.assert_close(weights(resumed.model)[name], value, msg=name)


class TestLogs:
    def test_every_step_logs_every_metric(self, rows, make_trainer):
        trainer = make_trainer(rows)
        trainer.train()
        assert len(steps(trainer)) == 2
        assert all(set(entry) >= METRICS for entry in steps(trainer))

    def test_evaluate_is_the_mean_over_tokens(self, make_trainer):
        # 7 rows in batches of 3, 3 and 1
        held_out, other = Dataset.from_list(tnt_rows(7)), make_tiny_model(384, seed=1)
        trainer = make_trainer(held_out, eval_dataset=held_out, per_device_eval_batch_size=3, ref_model=other)
        report = trainer.evaluate()
        dataset = trainer.eval_dataset
        expected = plain_loss(trainer.model, other, dataset, variant="ff").item()
        assert report["eval_loss"] == pytest.approx(expected, abs=1e-5)
        pairs = list(plain_losses(trainer.model, other, dataset, variant="ff"))
        kept = torch.cat([losses[signs > 0] for losses, signs in pairs]).mean().item()
        assert report["eval_kl/kept"] == pytest.approx(kept, abs=1e-5)
        negative = torch.cat([losses[signs < 0] for losses, signs in pairs]).mean().item()
        assert report["eval_kl/negative"] == pytest.approx(negative, abs=1e-5)
        signs = torch.cat([signs for _, signs in pairs])
        share = ((signs < 0).sum() / (signs != 0).sum()).item()
        assert report["eval_tokens/negative"] == pytest.approx(share, abs=1e-6)
        likelihood = [
            torch.cat([
                losses.exp()[signs < 0] for losses, signs in plain_losses(model, model, dataset, variant="nl")
            ]).mean().item()
            for model in (trainer.model, other)
        ]  # fmt: skip
        ours = [report["eval_prob/negative"], report["eval_prob/negative_ref"]]
        assert ours == pytest.approx(likelihood, abs=1e-6)
        assert {f"eval_{name}" for name in METRICS} <= set(report)

    def test_evaluate_prepares_raw_rows(self, rows, make_trainer):
        trainer = make_trainer(rows, eval_dataset=rows)
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)

    def test_several_held_out_sets_have_their_own_numbers(self, rows, make_trainer):
        clean = Dataset.from_list([{**row, "negative_spans": []} for row in tnt_rows(3)])
        trainer = make_trainer(
            rows, eval_dataset={"marked": rows, "clean": clean}, ref_model=make_tiny_model(384, seed=1)
        )
        report = trainer.evaluate()
        for name, dataset in trainer.eval_dataset.items():
            expected = plain_loss(trainer.model, trainer.reference.model, dataset, variant="ff").item()
            assert report[f"eval_{name}_loss"] == pytest.approx(expected, abs=1e-5)
        assert "eval_marked_prob/negative" in report and "eval_clean_prob/negative" not in report

    def test_predict_leaves_no_trace(self, rows, make_trainer):
        other = make_tiny_model(384, seed=1)
        trainer = make_trainer(rows, eval_dataset=rows.select([0]), ref_model=other)
        before = trainer.evaluate()
        assert trainer.predict(trainer.train_dataset).metrics["test_loss"] > 0
        assert trainer.evaluate()["eval_kl/kept"] == before["eval_kl/kept"]

    def test_held_out_rows_may_all_be_clean(self, rows, make_trainer):
        clean = Dataset.from_list([{**row, "negative_spans": []} for row in tnt_rows()])
        report = make_trainer(rows, eval_dataset=clean).evaluate()
        assert report["eval_tokens/negative"] == 0 and "eval_prob/negative" not in report


class TestReference:
    @pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
    def test_kl_starts_at_zero_and_the_original_stays(self, rows, make_trainer, taught_model, peft_config):
        rate = 0.1 if peft_config is None else 1.0
        trainer = make_trainer(rows, model=taught_model(), peft_config=peft_config, max_steps=3, learning_rate=rate)
        expected = trainer.evaluate(rows)["eval_prob/negative"]
        trainer.train()
        first, last = steps(trainer)[0], steps(trainer)[-1]
        assert first["kl/kept"] == pytest.approx(0.0, abs=1e-6)
        assert first["prob/negative"] == pytest.approx(first["prob/negative_ref"], rel=1e-3)
        assert last["kl/kept"] > 1e-5
        after = trainer.evaluate(rows)
        assert after["eval_prob/negative_ref"] == pytest.approx(expected, rel=1e-5)
        assert after["eval_prob/negative"] < 0.999 * expected

    def test_the_original_of_a_trained_adapter_is_the_model_as_given(self, rows, make_trainer, tiny_model):
        model = get_peft_model(tiny_model, LoraConfig(**LORA, init_lora_weights=False))  # random, so it matters
        trainer = make_trainer(rows, model=model, max_steps=3, learning_rate=1.0)
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.model)
        assert steps(trainer)[0]["kl/kept"] == pytest.approx(0.0, abs=1e-6)
        assert any(".ref." in name for name in after)
        assert all(torch.equal(after[name], before[name]) for name in after if ".ref." in name)
        assert any(not torch.equal(after[name], before[name]) for name in after if ".default." in name)

    def test_an_initialisation_that_moves_weights_keeps_the_model_as_given(self, rows, make_trainer, taught_model):
        config = LoraConfig(**LORA, init_lora_weights="pissa")
        trainer = make_trainer(rows, model=taught_model(), peft_config=config, max_steps=2)
        trainer.train()
        assert steps(trainer)[0]["kl/kept"] == pytest.approx(0.0, abs=1e-5)
        assert any(".ref." in name for name in weights(trainer.model))

    @pytest.mark.parametrize("kind", ["a copy", "ref_model", "adapter"])
    def test_an_original_of_its_own_runs_in_inference_mode(self, rows, make_trainer, kind):
        """What modules of the policy keep from an inference-mode forward could not be trained through."""
        options = {"adapter": {"peft_config": LoraConfig(**LORA)}, "ref_model": {"ref_model": make_tiny_model(384)}}
        trainer = make_trainer(rows, **options.get(kind, {}))
        batch, modes = trainer.data_collator(list(trainer.train_dataset)), []

        def states_of(model, inputs):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return scored_states(model, inputs)

        states = trainer._reference_states(trainer.model, states_of, batch).states
        assert modes == [(kind != "adapter", False)]
        assert not states.is_inference() and not states.requires_grad

    def test_trained_biases_are_refused(self, rows, make_trainer):
        with pytest.raises(ValueError, match="trains biases of the base model"):
            make_trainer(rows, peft_config=LoraConfig(**LORA, bias="all"))

    def test_resume_of_a_second_patch_keeps_its_original(self, rows, make_trainer, taught_model, tmp_path):
        def patched():
            torch.manual_seed(0)
            return get_peft_model(taught_model(), LoraConfig(**LORA, init_lora_weights=False))

        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        straight = make_trainer(rows, model=patched(), **settings)
        straight.train()
        resumed = make_trainer(rows, model=patched(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        for ours, theirs in zip(steps(resumed)[-2:], steps(straight)[-2:], strict=True):
            # Not every batch has an unwanted token; TRL counts tokens from the start of each call
            names = (METRICS & theirs.keys()) - {"num_tokens"}
            assert {n: float(ours[n]) for n in names} == pytest.approx({n: float(theirs[n]) for n in names}, rel=1e-3)

    def test_a_model_changed_in_memory_is_its_own_original(self, rows, make_trainer, tiny_model):
        with torch.no_grad():
            tiny_model.model.embed_tokens.weight.mul_(1.5)
        trainer = make_trainer(rows, model=tiny_model, max_steps=1)
        trainer.train()
        assert steps(trainer)[0]["kl/kept"] == pytest.approx(0.0, abs=1e-6)

    def test_a_second_patch_keeps_the_first(self, make_trainer, taught_model, tmp_path):
        # The first patch bans "damn", the second "please", on rows that never show the first word
        first, second = marked("damn"), marked("please")
        settings = {"max_steps": 40, "optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 6}
        trainer = make_trainer(first, model=taught_model(), peft_config=LoraConfig(**LORA), **settings)
        before = [trainer.evaluate(rows)["eval_prob/negative"] for rows in (first, second)]
        trainer.train()
        trainer.save_model(str(tmp_path / "patch"))
        model = PeftModel.from_pretrained(taught_model(), str(tmp_path / "patch"), is_trainable=True)
        trainer = make_trainer(second.select([1, 3, 5]), model=model, **settings)
        between = [trainer.evaluate(rows)["eval_prob/negative"] for rows in (first, second)]
        trainer.train()
        after = [trainer.evaluate(rows)["eval_prob/negative"] for rows in (first, second)]
        assert min(before) > 0.5 and between[0] < 0.2 and between[1] > 0.5
        assert max(after) < 0.2

    def test_model_and_reference_must_differ(self, rows, make_trainer, tiny_model):
        with pytest.raises(ValueError, match="same object"):
            make_trainer(rows, model=tiny_model, ref_model=tiny_model)


class TestScoreRows:
    def test_sums_of_each_row(self, make_trainer, tiny_tokenizer, tiny_model):
        annotated, original = tnt_rows(5), make_tiny_model(384, seed=1)
        results = score_rows(tiny_model, tiny_tokenizer, annotated, original=original, batch_tokens=60)
        dataset = make_trainer(Dataset.from_list(annotated), shuffle_dataset=False).train_dataset
        for result, (losses, signs), (ll, _) in zip(
            results,
            plain_losses(tiny_model, original, dataset, variant="ff"),
            plain_losses(tiny_model, original, dataset, variant="ul"),
            strict=True,
        ):
            assert [result["kept_tokens"], result["negative_tokens"]] == [(signs > 0).sum(), (signs < 0).sum()]
            assert result["kl_target"] == pytest.approx(losses.sum().item(), rel=1e-4)
            assert result["kl_kept"] == pytest.approx(losses[signs > 0].sum().item(), rel=1e-4)
            # ul is -log(1 - p) on unwanted tokens, -log p on kept ones
            unwanted = 1 - (-ll[signs < 0]).exp()
            assert result["prob_negative"] == pytest.approx(unwanted.sum().item(), abs=1e-5)
            assert result["logp"] == pytest.approx((unwanted.log().sum() - ll[signs > 0].sum()).item(), abs=1e-2)

    def test_an_original_is_needed(self, tiny_tokenizer, tiny_model):
        with pytest.raises(ValueError, match="no original"):
            score_rows(tiny_model, tiny_tokenizer, tnt_rows())


class TestConstruction:
    @pytest.mark.parametrize("plain", [TrainingArguments, SFTConfig])
    def test_plain_arguments_become_tnt_config(self, rows, tiny_model, tiny_tokenizer, tmp_path, plain):
        args = plain(str(tmp_path), learning_rate=3e-4, use_cpu=True, bf16=False, report_to="none")
        trainer = TNTTrainer(tiny_model, args, train_dataset=rows, processing_class=tiny_tokenizer)
        assert isinstance(trainer.args, TNTConfig)
        assert trainer.args.learning_rate == 3e-4 and trainer.args.variant == "ff"

    def test_prompt_learning_is_refused(self, rows, make_trainer):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="virtual tokens"):
            make_trainer(rows, peft_config=config)

    def test_streams_are_refused(self, rows, make_trainer):
        with pytest.raises(TypeError, match="streaming=False"):
            make_trainer(rows.to_iterable_dataset())

    def test_nothing_to_remove(self, make_trainer):
        with pytest.raises(ValueError, match="nothing to remove"):
            make_trainer(Dataset.from_list([{**row, "negative_spans": []} for row in tnt_rows()]))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"variant": "kl"}, "`variant` must be one of ff, rr"),
            ({"alpha": 0.0}, "`alpha` must be a number above 0"),
            ({"alpha": "much"}, "`alpha` must be"),
            ({"smoothing": 1.0}, "`smoothing` must be"),
            ({"smooth_over": "both"}, "`smooth_over` must be one of"),
            ({"packing": True}, "`packing` does not work"),
            ({"padding_free": True}, "`padding_free` does not work"),
            ({"assistant_only_loss": True}, "`assistant_only_loss` does not work"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
            ({"completion_only_loss": True}, "`completion_only_loss`"),
            ({"loss_type": "dft"}, "`loss_type`"),
            ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "`skip_prepare_dataset`"),
        ],
    )
    def test_bad_settings_are_one_line(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message) as caught:
            TNTConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)
        assert "\n" not in str(caught.value)


def test_perplexity_is_of_the_original(tiny_tokenizer, tiny_model):
    annotated, original = tnt_rows(5), make_tiny_model(384, seed=1)
    value = perplexity(tiny_model, tiny_tokenizer, annotated, original=original, batch_tokens=60)
    scores = score_rows(original, tiny_tokenizer, annotated, original=original)
    tokens = sum(score["kept_tokens"] + score["negative_tokens"] for score in scores)
    assert value == pytest.approx(math.exp(-sum(score["logp"] for score in scores) / tokens), rel=1e-4)
