"""Weighted training in trainers as they are, training on a file of pairs, and the held-out likelihood."""

import copy
import json
import logging
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer

from tests.codeclm.exported import exported_rows
from tests.conftest import make_tiny_model
from trl_extensions import DataCollatorForCodecLM
from trl_extensions.codeclm.training import (
    compare_held_out,
    completion_losses,
    load_pairs,
    split_pairs,
    train_on_data,
)
from trl_extensions.codeclm.weighted_loss import RowWeighing, WeightedLoss, weigh_rows, weighted_loss
from trl_extensions.core.generation import TransformersEngine


SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8, "max_steps": 1,
    "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
    "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 0.0,
    "remove_unused_columns": False,
}  # fmt: skip


def nll_by_row(model, batch):
    """`(B,)` summed over the scored tokens, by the definition, with gradients; and the number of tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = -logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (losses * (labels != -100)).sum(1), (labels != -100).sum()


def assert_step(trained, before, loss, rate=0.1):
    """The trained weights are those of one plain gradient step of `loss` on `before`."""
    loss.backward()
    for (name, after), own in zip(trained.named_parameters(), before.parameters(), strict=True):
        gradient = torch.zeros_like(own) if own.grad is None else own.grad
        torch.testing.assert_close(after, own - rate * gradient, atol=1e-5, rtol=1e-4, msg=name)


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def train(tmp_path, tiny_tokenizer):
    """Trains one step over all rows, and returns the trainer; with weights of 1 where `weight_by` is "ones"."""

    def build(weight_by, *, trainer=SFTTrainer, rows=None, peft=False, **settings):
        collator = DataCollatorForCodecLM(tiny_tokenizer)
        if weight_by is not None:
            by, gap_range = ("gap", (2.0, 2.0)) if weight_by == "ones" else (weight_by, (1.0, 6.0))
            collator = DataCollatorForCodecLM(tiny_tokenizer, by, gap_range, mean_over="data").fit(exported_rows())
        model, options = make_tiny_model(384), {}
        config = (SFTConfig if trainer is SFTTrainer else TrainingArguments)(str(tmp_path), **(SETTINGS | settings))
        if peft:
            options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
        own = trainer(
            model,
            config,
            train_dataset=rows if rows is not None else Dataset.from_list(exported_rows()),
            processing_class=tiny_tokenizer,
            data_collator=collator,
            callbacks=[] if weight_by is None else [WeightedLoss()],
            **options,
        )
        own.train()
        return own

    return build


class TestWeightedLoss:
    def test_by_hand(self):
        # Two tokens, probabilities 3/4 and 1/4 of every label 0, 1/4 and 3/4: row 0 scores two labels, row 1 one
        logits = torch.tensor([[[math.log(3.0), 0.0]] * 3, [[0.0, math.log(3.0)]] * 3])
        labels = torch.tensor([[-100, 0, 1], [-100, -100, 0]])
        row_0, row_1 = -math.log(3 / 4) - math.log(1 / 4), -math.log(1 / 4)
        weights = torch.tensor([0.5, 1.5])
        expected = (0.5 * row_0 + 1.5 * row_1) / 3
        assert weighted_loss(logits, labels, weights).item() == pytest.approx(expected, rel=1e-6)
        assert weighted_loss(logits, labels, weights, 6).item() == pytest.approx(expected / 2, rel=1e-6)
        plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert weighted_loss(logits, labels, torch.ones(2)).item() == pytest.approx(plain.item(), rel=1e-6)

    def test_in_a_loop_of_your_own(self, tiny_model, tiny_tokenizer):
        batch = DataCollatorForCodecLM(tiny_tokenizer, weight_by="gap")(exported_rows(4))
        tiny_model.train()
        earlier = RowWeighing.active
        weighing = weigh_rows(tiny_model)
        assert RowWeighing.active == earlier + 1
        loss = tiny_model(**batch).loss
        rows, count = nll_by_row(tiny_model, batch)
        assert loss.item() == pytest.approx((rows @ batch["loss_weights"]).item() / count.item(), rel=1e-5)
        given = weighted_loss(tiny_model(**batch).logits, batch["labels"], batch["loss_weights"])
        assert loss.item() == pytest.approx(given.item(), rel=1e-5)
        with pytest.raises(ValueError, match="`loss_weights` came without `labels`"):
            tiny_model(input_ids=batch["input_ids"], loss_weights=batch["loss_weights"])
        plain = {name: tensor for name, tensor in batch.items() if name != "loss_weights"}
        unweighted = tiny_model(**plain).loss.item()
        assert unweighted == pytest.approx(rows.sum().item() / count.item(), rel=1e-5)
        assert unweighted != pytest.approx(loss.item(), rel=1e-3)
        assert tiny_model.eval()(**batch).loss.item() == unweighted  # an evaluation is not weighted
        weighing.remove()
        weighing.remove()
        assert RowWeighing.active == earlier and not tiny_model._forward_hooks and not tiny_model._forward_pre_hooks


class TestTrainers:
    @pytest.mark.parametrize("weight_by", ["gap", "metadata"])
    @pytest.mark.parametrize("trainer", [SFTTrainer, Trainer])
    def test_a_weight_multiplies_the_losses_of_its_row(self, train, tiny_tokenizer, trainer, weight_by):
        trained = train(weight_by, trainer=trainer)
        before = make_tiny_model(384)
        rows, count = nll_by_row(before, DataCollatorForCodecLM(tiny_tokenizer)(exported_rows()))
        if weight_by == "gap":  # 4, 5, 6, 3.5, 3.5, 5, 4.5, 6 sum up to 37.5
            raw = torch.tensor([4, 5, 6, 3.5, 3.5, 5, 4.5, 6])
        else:  # four pairs, of 3, 2, 1 and 2 rows
            raw = torch.tensor([1 / 3, 1 / 2, 1 / 3, 1, 1 / 3, 1 / 2, 1 / 2, 1 / 2])
        loss = (rows @ raw) * 8 / raw.sum() / count
        assert float(logged(trained)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert abs(loss.item() - (rows.sum() / count).item()) > 0.01
        assert_step(trained.model, before, loss)
        batch = DataCollatorForCodecLM(tiny_tokenizer)(exported_rows())
        rows, count = nll_by_row(trained.model.eval(), batch)
        evaluation = trained.evaluate(trained.train_dataset)  # is not weighted
        assert evaluation["eval_loss"] == pytest.approx((rows.sum() / count).item(), rel=1e-4)

    @pytest.mark.parametrize("trainer", [SFTTrainer, Trainer])
    def test_weights_of_one_change_nothing(self, train, trainer):
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        ours, plain = (train(by, trainer=trainer, **settings) for by in ("ones", None))
        for name, value in plain.model.state_dict().items():
            assert torch.equal(ours.model.state_dict()[name], value), name
        for mine, its in zip(logged(ours), logged(plain), strict=True):
            for name in mine.keys() & {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"}:
                assert mine[name] == its[name], name

    @pytest.mark.parametrize("trainer", [SFTTrainer, Trainer])
    def test_one_batch_or_accumulated(self, train, trainer):
        whole = train("gap", trainer=trainer)
        accumulated = train("gap", trainer=trainer, per_device_train_batch_size=1, gradient_accumulation_steps=8)
        for name in ("loss", "grad_norm"):
            one, other = (float(logged(own)[0][name]) for own in (whole, accumulated))
            assert one == pytest.approx(other, rel=1e-4)
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(accumulated.model.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)

    def test_metrics_are_not_weighted(self, train):
        ours, plain = train("gap"), train(None)
        for name in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert logged(ours)[0][name] == logged(plain)[0][name]
        assert logged(ours)[0]["loss"] != logged(plain)[0]["loss"]

    def test_only_the_adapter_learns(self, train, tiny_tokenizer):
        trained = train("gap", peft=True, gradient_checkpointing=True)
        before = make_tiny_model(384)
        batch = DataCollatorForCodecLM(tiny_tokenizer, "gap")(exported_rows())
        rows, count = nll_by_row(before, batch)
        loss = (rows @ batch["loss_weights"] / count).item()
        assert float(logged(trained)[0]["loss"]) == pytest.approx(loss, rel=1e-4)  # the adapter starts at zero
        base = trained.model.get_base_model()
        weight = base.model.layers[0].mlp.up_proj.base_layer.weight
        assert torch.equal(weight, before.model.layers[0].mlp.up_proj.weight)
        moved = [v for name, v in trained.model.named_parameters() if "lora_B" in name]
        assert moved and all(value.abs().sum() > 0 for value in moved)

    def test_a_callback_that_is_added_later(self, tmp_path, tiny_tokenizer):
        collator = DataCollatorForCodecLM(tiny_tokenizer, "gap")
        losses = []
        for callbacks in ([], [WeightedLoss()]):
            trainer = SFTTrainer(
                make_tiny_model(384),
                SFTConfig(str(tmp_path), **SETTINGS),
                train_dataset=Dataset.from_list(exported_rows()),
                processing_class=tiny_tokenizer,
                data_collator=collator,
            )
            for callback in callbacks:
                trainer.add_callback(callback)
            trainer.train()
            losses.append(float(logged(trainer)[0]["loss"]))
        assert abs(losses[0] - losses[1]) > 0.01

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"loss_type": "dft"}, "loss_type"), ({"label_smoothing_factor": 0.1}, "label_smoothing_factor")],
    )
    def test_settings_that_do_not_go_with_weights(self, train, settings, message):
        with pytest.raises(ValueError, match=f"`{message}.* does not work with weighted rows"):
            train("gap", **settings)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in exported_rows()), encoding="utf-8")
    return path


class TestTrainOnData:
    def run(self, tmp_path, model, data, weight_by=None, name="a", **settings):
        validation = settings.pop("validation", 0.0)
        model_args = ModelConfig(model_name_or_path=str(model), dtype="float32", **settings.pop("lora", {}))
        config = SFTConfig(str(tmp_path / name), **(SETTINGS | {"remove_unused_columns": True} | settings))
        train_on_data(model_args, config, data, tmp_path / f"{name}_model", weight_by, validation=validation)
        return tmp_path / f"{name}_model"

    @pytest.mark.parametrize("weight_by", [None, "metadata"])
    def test_it_is_the_step_it_should_be(self, tmp_path, tiny_model_dir, tiny_tokenizer, data, weight_by):
        trained = AutoModelForCausalLM.from_pretrained(self.run(tmp_path, tiny_model_dir, data, weight_by))
        before = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        rows, count = nll_by_row(before, DataCollatorForCodecLM(tiny_tokenizer)(exported_rows()))
        raw = torch.tensor([1 / 3, 1 / 2, 1 / 3, 1, 1 / 3, 1 / 2, 1 / 2, 1 / 2]) if weight_by else torch.ones(8)
        assert_step(trained, before, (rows @ raw) * 8 / raw.sum() / count)

    def test_an_adapter_and_rows_too_long(self, tmp_path, tiny_model_dir, data, caplog):
        row = exported_rows(1)[0] | {"prompt": [{"role": "user", "content": "Hi " * 200}]}
        with open(data, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        with caplog.at_level(logging.WARNING):
            target = self.run(
                tmp_path, tiny_model_dir, data, "gap", lora={"use_peft": True, "lora_r": 4}, max_length=100
            )
        assert "1 of 9 pairs are left out: their prompts fill max_length=100" in caplog.text
        assert (target / "adapter_config.json").is_file()
        state = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
        assert math.isfinite(state["log_history"][0]["loss"])

    def test_held_out_pairs_are_not_trained_on(self, tmp_path, tiny_model_dir, tiny_tokenizer, data):
        target = self.run(tmp_path, tiny_model_dir, data, validation=0.25)
        train, _ = split_pairs(load_pairs(data), 0.25, seed=42)  # the trainer's seed
        before = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        rows, count = nll_by_row(before, DataCollatorForCodecLM(tiny_tokenizer)(train))
        assert len(train) == 6
        assert_step(AutoModelForCausalLM.from_pretrained(target), before, rows.sum() / count)

    def test_it_goes_on_from_a_checkpoint(self, tmp_path, tiny_model_dir, data):
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
        target = self.run(tmp_path, tiny_model_dir, data, "gap", **settings)
        whole = AutoModelForCausalLM.from_pretrained(target).state_dict()
        shutil.rmtree(target)
        shutil.rmtree(tmp_path / "a" / "checkpoint-4")
        resumed = AutoModelForCausalLM.from_pretrained(self.run(tmp_path, tiny_model_dir, data, "gap", **settings))
        first = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-2").state_dict()
        for name, value in resumed.state_dict().items():
            torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=1e-5, msg=name)
        assert any(not torch.equal(first[name], whole[name]) for name in whole)
        state = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]

    @pytest.mark.parametrize("name", ["packing", "eval_packing", "padding_free"])
    def test_what_puts_rows_together_is_refused(self, tmp_path, tiny_model_dir, data, name):
        with pytest.raises(ValueError, match=f"`{name}` puts rows together"):
            self.run(tmp_path, tiny_model_dir, data, "gap", **{name: True})

    def test_bad_input(self, tmp_path, tiny_model_dir, data):
        with pytest.raises(ValueError, match='`weight_by` must be "gap"'):
            self.run(tmp_path, tiny_model_dir, data, "length")
        with pytest.raises(ValueError, match="raise it"):
            self.run(tmp_path, tiny_model_dir, data, max_length=3)
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        with pytest.raises(ValueError, match=r"empty\.jsonl holds no pairs"):
            self.run(tmp_path, tiny_model_dir, empty)
        bare = tmp_path / "bare"
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(bare)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(bare)
        with pytest.raises(ValueError, match="has no chat template, but the pairs are chats"):
            self.run(tmp_path, bare, data)


def test_splits():
    rows = [{"id": number} for number in range(10)]
    train, held_out = split_pairs(rows, 0.3, seed=1)
    assert len(held_out) == 3 and sorted(train + held_out, key=lambda row: row["id"]) == rows
    assert split_pairs(rows, 0.3, seed=1) == (train, held_out) != split_pairs(rows, 0.3, seed=2)
    assert split_pairs(rows, 0) == (rows, [])
    assert [len(part) for part in split_pairs(rows, 0.01)] == [9, 1]
    assert [len(part) for part in split_pairs(rows[:2], 0.9)] == [1, 1]
    with pytest.raises(ValueError, match=r"below 1, got 1\.0"):
        split_pairs(rows, 1.0)
    with pytest.raises(ValueError, match="one pair only"):
        split_pairs(rows[:1], 0.5)


class TestHeldOut:
    def test_losses_by_the_definition(self, tiny_model, tiny_tokenizer):
        long = exported_rows(1)[0] | {"prompt": [{"role": "user", "content": "Hi " * 200}]}
        tiny_model.train()
        losses = completion_losses(tiny_model, tiny_tokenizer, [*exported_rows(3), long], 100)
        assert tiny_model.training
        tiny_model.eval()
        rows, _ = nll_by_row(tiny_model, DataCollatorForCodecLM(tiny_tokenizer)(exported_rows(3)))
        assert [nats for nats, _ in losses[:3]] == pytest.approx(rows.tolist(), rel=1e-5)
        ends = [row["completion"][0]["content"] + "<|im_end|>\n" for row in exported_rows(3)]
        assert [tokens for _, tokens in losses[:3]] == [len(tiny_tokenizer(end)["input_ids"]) for end in ends]
        assert losses[3] == (0.0, 0)

    def test_before_and_after(self, tmp_path, tiny_model, tiny_tokenizer):
        uniform = copy.deepcopy(tiny_model)
        with torch.no_grad():
            uniform.get_input_embeddings().weight.zero_()  # tied: every logit is 0
        engines = [TransformersEngine(model, tiny_tokenizer) for model in (tiny_model, uniform)]
        path = tmp_path / "validation.json"
        result = compare_held_out(exported_rows(4), lambda: engines[0], lambda: engines[1], path)
        assert result == json.loads(path.read_text())
        assert result["rows"] == 4 and result["skipped"] == 0
        assert result["after"]["nats_per_token"] == pytest.approx(math.log(384), rel=1e-6)
        losses = completion_losses(tiny_model, tiny_tokenizer, exported_rows(4), None)
        before = sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
        assert result["before"]["nats_per_token"] == pytest.approx(before)
        assert result["change"]["nats_per_token"] == pytest.approx(math.log(384) - before)
        low, high = result["change"]["interval"]
        assert low < math.log(384) - before < high
        one = compare_held_out(exported_rows(1), lambda: engines[0], lambda: engines[1], path)
        assert one["change"]["interval"] is None
        with pytest.raises(ValueError, match="no held-out pair has a completion within max_length=3"):
            compare_held_out(exported_rows(1), lambda: engines[0], lambda: engines[1], path, max_length=3)


def test_the_example_runs(tmp_path, tiny_model_dir, data, monkeypatch):
    script = Path(__file__).parents[2] / "examples" / "codeclm.py"
    arguments = {
        "model_name_or_path": tiny_model_dir, "dataset_name": data, "output_dir": tmp_path / "out", "max_steps": 2,
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "dtype": "float32",
        "logging_steps": 1,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(script), *(str(x) for k, v in arguments.items() for x in (f"--{k}", v))])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out" / "model.safetensors").is_file()
