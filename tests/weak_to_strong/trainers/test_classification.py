"""`WeakToStrongTrainer` on tiny random models: what it updates, what it logs, what it remembers."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TrainingArguments

from tests.weak_to_strong.conftest import make_classifier, w2s_rows
from trl_extensions import WeakToStrongConfig, WeakToStrongTrainer
from trl_extensions.weak_to_strong.loss import predicted_class, product_loss, reverse_kl_loss, soft_cross_entropy
from trl_extensions.weak_to_strong.trainers.objective import LOSSES


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
METRICS = {"agreement", "confidence", "loss_coef"}


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits_of(model, dataset):
    """`(N, K)`, each row alone and without padding."""
    return torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in dataset])


def column(dataset, name):
    return torch.tensor([row[name] for row in dataset])


class TestUpdates:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
    @pytest.mark.parametrize("name", ["soft_ce", "product", "reverse_kl"])
    def test_one_update_is_the_plain_gradient(self, make_trainer, kind, name):
        rows = Dataset.from_list([{**row, "weight": 0.5 + place} for place, row in enumerate(w2s_rows(8, 3))])
        trainer = make_trainer(
            rows, model=make_classifier(kind, 3), max_steps=1, loss_type=name, loss_warmup_ratio=0.0,
            product_beta=0.5, max_grad_norm=0.0,
        )  # fmt: skip
        model = copy.deepcopy(trainer.model)
        function = {
            "soft_ce": soft_cross_entropy,
            "product": lambda *pair: product_loss(*pair, beta=0.5),
            "reverse_kl": reverse_kl_loss,
        }[name]
        dataset = trainer.train_dataset
        losses = function(logits_of(model, dataset), column(dataset, "soft_labels")) * column(dataset, "weight")
        losses.mean().backward()
        trainer.train()
        assert steps(trainer)[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
        for parameter, (key, after) in zip(model.parameters(), weights(trainer.model).items(), strict=True):
            gradient = 0.0 if parameter.grad is None else parameter.grad
            torch.testing.assert_close(after, parameter.detach() - 0.1 * gradient, atol=1e-5, rtol=1e-4, msg=key)

    def test_one_hot_labels_are_cross_entropy_training(self, make_trainer):
        rows = Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in w2s_rows()])
        trainer = make_trainer(rows, max_steps=4, max_grad_norm=0.0, per_device_train_batch_size=8)
        model, dataset = copy.deepcopy(trainer.model), trainer.train_dataset
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            labels = column(dataset, "label")
            torch.nn.functional.cross_entropy(logits_of(model, dataset), labels).backward()
            optimizer.step()
        trainer.train()
        for (name, after), expected in zip(weights(trainer.model).items(), model.parameters(), strict=True):
            torch.testing.assert_close(after, expected.detach(), atol=1e-5, rtol=1e-4, msg=name)

    @pytest.mark.parametrize("name", LOSSES)
    def test_accumulation_is_one_large_batch(self, make_trainer, name):
        rows = Dataset.from_list(w2s_rows(24, 3))
        settings = {"loss_type": name, "loss_warmup_ratio": 0.0, "max_steps": 6}
        whole = make_trainer(rows, model=make_classifier(classes=3), **settings)
        parts = make_trainer(
            rows, model=make_classifier(classes=3), per_device_train_batch_size=1, gradient_accumulation_steps=8,
            **settings,
        )  # fmt: skip
        for trainer in (whole, parts):
            trainer.train()
        for ours, theirs in zip(steps(parts), steps(whole), strict=True):
            names = METRICS | {"loss", "grad_norm"}
            assert {n: float(ours[n]) for n in names} == pytest.approx({n: float(theirs[n]) for n in names}, rel=1e-3)
        for key, value in weights(whole.model).items():
            torch.testing.assert_close(weights(parts.model)[key], value, atol=1e-5, rtol=1e-4, msg=key)
        if name == "confidence":
            torch.testing.assert_close(parts.supervision.threshold, whole.supervision.threshold, atol=1e-5, rtol=0)

    def test_the_threshold_moves_the_labels_of_the_confidence_loss(self, make_trainer):
        # A model that prefers class 0 throughout, weak labels of which 3 in 4 favour class 1
        rows = Dataset.from_list([
            {**row, "soft_labels": [0.7, 0.3] if place % 4 == 0 else [0.2, 0.8]}
            for place, row in enumerate(w2s_rows(16))
        ])  # fmt: skip
        trainer = make_trainer(
            rows, max_steps=1, loss_type="confidence", confidence_coef=1.0, loss_warmup_ratio=0.0, learning_rate=1e-6,
            per_device_train_batch_size=16,
        )  # fmt: skip
        trainer.train()
        logits = torch.from_numpy(trainer.predict(rows).predictions)
        first = predicted_class(logits.softmax(dim=1), trainer.supervision.threshold) == 0
        assert trainer.supervision.prior.tolist() == pytest.approx([0.325, 0.675])
        assert first.sum().item() in (5, 6)  # 0.325 * 16 = 5.2
        own = torch.nn.functional.cross_entropy(logits, (~first).long()).item()
        argmax = torch.nn.functional.cross_entropy(logits, logits.argmax(dim=1)).item()
        assert steps(trainer)[0]["loss"] == pytest.approx(own, rel=1e-3)
        assert argmax != pytest.approx(own, rel=1e-2)

    @pytest.mark.parametrize("name", LOSSES)
    def test_training_follows_the_weak_labels(self, make_trainer, name):
        # Weak classes keep at least 0.9 * 0.7 of the target, whatever the model itself predicts
        rows = Dataset.from_list([
            {**row, "soft_labels": [0.9, 0.1] if place % 3 else [0.1, 0.9]} for place, row in enumerate(w2s_rows())
        ])  # fmt: skip
        trainer = make_trainer(
            rows, max_steps=25, optim="adamw_torch", learning_rate=1e-2, loss_type=name, confidence_coef=0.3
        )
        assert trainer.evaluate(rows)["eval_agreement"] < 0.9
        trainer.train()
        assert trainer.evaluate(rows)["eval_agreement"] == 1.0

    def test_the_coefficient_warms_up(self, rows, make_trainer):
        trainer = make_trainer(rows, max_steps=4, loss_type="confidence", loss_warmup_ratio=0.5, confidence_coef=0.6)
        trainer.train()
        assert [entry["loss_coef"] for entry in steps(trainer)] == pytest.approx([0.0, 0.3, 0.6, 0.6])

    def test_weighted_by_confidence(self, make_trainer):
        rows = [{"text": "a", "soft_labels": [0.5, 0.5]}, {"text": "b", "soft_labels": [1.0, 0.0]}]
        trainer = make_trainer(Dataset.from_list(rows), weight_by_confidence=True)
        assert list(trainer.train_dataset["weight"]) == [0.0, 2.0]
        assert trainer.supervision.prior.tolist() == [0.75, 0.25]  # of rows, whatever they weigh


class TestResume:
    @pytest.mark.parametrize("name", ["confidence", "product"])
    def test_in_the_middle_of_an_epoch(self, make_trainer, tmp_path, name):
        rows = Dataset.from_list(w2s_rows(24, 3))
        settings = {
            "loss_type": name, "max_steps": 5, "per_device_train_batch_size": 6, "confidence_coef": 1.0,
            "lr_scheduler_type": "linear",
        }  # fmt: skip
        saving = settings | {"save_strategy": "steps", "save_steps": 2}
        straight = make_trainer(rows, model=make_classifier(classes=3), **settings)
        straight.train()
        make_trainer(rows, model=make_classifier(classes=3), **saving).train()
        resumed = make_trainer(rows, model=make_classifier(classes=3, seed=5), **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert [entry["loss"] for entry in steps(resumed)] == [entry["loss"] for entry in steps(straight)]
        for key, value in weights(straight.model).items():
            torch.testing.assert_close(weights(resumed.model)[key], value, msg=key)

    def test_a_saved_model_is_the_same_model(self, rows, make_trainer, tmp_path):
        trainer = make_trainer(rows)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        again = make_trainer(rows, model=str(tmp_path / "saved"))
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(again.evaluate(rows)["eval_loss"], rel=1e-5)


class TestAdapters:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_adapter_and_head_change_and_nothing_else(self, rows, make_trainer, kind, task_type, checkpointing):
        config = LoraConfig(**LORA, task_type=task_type)
        trainer = make_trainer(
            rows, model=make_classifier(kind), peft_config=config, gradient_checkpointing=checkpointing, max_steps=3
        )
        before = weights(trainer.model)
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert any("lora_B" in name for name in changed)
        assert any("score.modules_to_save" in name for name in changed)
        assert all("lora_" in name or "score.modules_to_save" in name for name in changed)
        assert config.task_type == task_type

    def test_a_trained_adapter_goes_on(self, rows, make_trainer, tmp_path):
        trainer = make_trainer(rows, peft_config=LoraConfig(**LORA))
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        model = PeftModel.from_pretrained(make_classifier(), str(tmp_path / "adapter"), is_trainable=True)
        again = make_trainer(rows, model=model)
        assert again.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-5)
        again.train()

    def test_a_frozen_head_is_refused(self, rows, make_trainer):
        model = get_peft_model(make_classifier(), LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="leaves the classification head frozen"):
            make_trainer(rows, model=model)
        with pytest.raises(ValueError, match="has an adapter already"):
            make_trainer(rows, model=model, peft_config=LoraConfig(**LORA))

    def test_4bit(self, rows, tiny_classifier_dir, tmp_path):
        args = WeakToStrongConfig(
            str(tmp_path), use_cpu=True, bf16=True, report_to="none", max_steps=3, logging_steps=1, save_strategy="no",
            optim="sgd", learning_rate=0.5, per_device_train_batch_size=8,
        )  # fmt: skip
        trainer = WeakToStrongTrainer(
            str(tiny_classifier_dir),
            args,
            train_dataset=rows,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            peft_config=LoraConfig(**LORA),
        )
        assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
        before = weights(trainer.model)
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert any("lora_" in name for name in changed) and any("score.modules_to_save" in name for name in changed)
        assert all(math.isfinite(float(entry["loss"])) for entry in steps(trainer))


class TestEvaluation:
    def test_averages_are_over_rows(self, make_trainer):
        held_out = w2s_rows(7, 3)  # batches of 3, 3 and 1
        held_out[2]["label"] = None  # counts for everything but accuracy
        trainer = make_trainer(
            Dataset.from_list(w2s_rows(8, 3)), model=make_classifier(classes=3), per_device_eval_batch_size=3,
            eval_dataset=Dataset.from_list(held_out), loss_type="product",
        )  # fmt: skip
        report, dataset = trainer.evaluate(), trainer.eval_dataset
        with torch.no_grad():
            logits, soft = logits_of(trainer.model, dataset), column(dataset, "soft_labels")
        predicted = logits.argmax(dim=1)
        assert report["eval_loss"] == pytest.approx(product_loss(logits, soft).mean().item(), rel=1e-5)
        expected = (predicted == soft.argmax(dim=1)).float().mean().item()
        assert report["eval_agreement"] == pytest.approx(expected, abs=1e-6)
        assert report["eval_confidence"] == pytest.approx(logits.softmax(dim=1).amax(dim=1).mean().item(), rel=1e-5)
        hits = [int(predicted[i]) == row["label"] for i, row in enumerate(held_out) if row["label"] is not None]
        assert report["eval_accuracy"] == pytest.approx(sum(hits) / 6, abs=1e-6)
        assert report["eval_loss_coef"] == 1.0  # past the warm-up, whenever it is asked for

    def test_several_held_out_sets(self, rows, make_trainer):
        parts = {"one": rows.select(range(3)), "two": rows.select(range(3, 8)).remove_columns("label")}
        trainer = make_trainer(rows, eval_dataset=parts)
        report = trainer.evaluate()
        for name, part in parts.items():
            alone = trainer.evaluate(part)
            for metric in ("loss", "agreement", "confidence"):
                assert report[f"eval_{name}_{metric}"] == pytest.approx(alone[f"eval_{metric}"], rel=1e-6)
        assert "eval_one_accuracy" in report and "eval_two_accuracy" not in report

    def test_every_step_logs_every_metric(self, rows, make_trainer):
        trainer = make_trainer(rows)
        trainer.train()
        assert len(steps(trainer)) == 2 and all(set(entry) >= METRICS for entry in steps(trainer))

    def test_predict_returns_logits(self, rows, make_trainer):
        trainer = make_trainer(rows, per_device_eval_batch_size=3)
        with torch.no_grad():
            expected = logits_of(trainer.model, trainer.train_dataset).numpy()
        bare = rows.select_columns(["text"])
        for dataset in (rows, bare):
            np.testing.assert_allclose(trainer.predict(dataset).predictions, expected, atol=1e-5)
        assert "test_loss" in trainer.predict(rows).metrics and "test_loss" not in trainer.predict(bare).metrics

    def test_compute_metrics_sees_true_labels_or_soft_ones(self, rows, make_trainer):
        seen = []
        trainer = make_trainer(rows, compute_metrics=lambda found: seen.append(found.label_ids) or {"n": 1.0})
        assert trainer.evaluate(rows)["eval_n"] == 1.0
        trainer.evaluate(rows.remove_columns("label"))
        assert seen[0].tolist() == list(rows["label"])
        np.testing.assert_allclose(seen[1], np.array(rows["soft_labels"]), atol=1e-6)


class TestConstruction:
    def build(self, name, rows, tmp_path, **settings):
        args = WeakToStrongConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
        return WeakToStrongTrainer(str(name), args, train_dataset=rows)

    def test_a_model_by_name_gets_a_head_of_k_classes(self, tiny_classifier_dir, tmp_path):
        trainer = self.build(tiny_classifier_dir, Dataset.from_list(w2s_rows(8, 4)), tmp_path)
        assert trainer.model.score.weight.shape == (4, 64) and trainer.model.dtype == torch.float32
        assert trainer.model.config.pad_token_id == trainer.processing_class.pad_token_id

    def test_names_of_classes_come_with_it(self, tiny_classifier_dir, tmp_path):
        rows = Dataset.from_list([{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
        trainer = self.build(tiny_classifier_dir, rows, tmp_path)
        assert trainer.model.config.id2label == {0: "no", 1: "yes"}
        assert list(trainer.train_dataset["label"]) == [1, 0]
        trainer = self.build(tiny_classifier_dir, rows, tmp_path, class_names=["yes", "no", "maybe"])
        assert trainer.model.config.num_labels == 3 and list(trainer.train_dataset["label"]) == [0, 1]
        with pytest.raises(ValueError, match="late row 0: `label` 'never' is not one of 'yes', 'no', 'maybe'"):
            trainer.evaluate(Dataset.from_list([{"text": "a", "label": "never"}]), metric_key_prefix="late")

    def test_the_head_follows_the_seed(self, tiny_classifier_dir, rows, tmp_path):
        heads = [self.build(tiny_classifier_dir, rows, tmp_path, seed=seed).model.score.weight for seed in (1, 1, 2)]
        assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])

    def test_plain_arguments_become_our_config(self, rows, tiny_tokenizer, tmp_path):
        args = TrainingArguments(str(tmp_path), learning_rate=3e-4, use_cpu=True, bf16=False, report_to="none")
        trainer = WeakToStrongTrainer(make_classifier(), args, train_dataset=rows, processing_class=tiny_tokenizer)
        assert isinstance(trainer.args, WeakToStrongConfig)
        assert trainer.args.learning_rate == 3e-4 and trainer.args.loss_type == "soft_ce"

    def test_rows_longer_than_the_model_are_cut(self, make_trainer):
        long = {"text": "egg " * 300, "label": 0}  # the model has 128 positions, `max_length` is 1024
        trainer = make_trainer(Dataset.from_list([long, {"text": "b", "label": 1}]), model=make_classifier("gpt2"))
        assert len(trainer.train_dataset[0]["input_ids"]) == 128
        trainer.train()

    def test_dropout_is_off(self, rows, make_trainer):
        trainer = make_trainer(rows, model=make_classifier("gpt2"))
        assert all(module.p == 0 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))

    def test_refusals(self, rows, make_trainer):
        with pytest.raises(ValueError, match="The model has 3 classes where 2 are needed"):
            make_trainer(rows, model=make_classifier(classes=3), num_labels=2)
        with pytest.raises(ValueError, match="The model has 1 classes where 2 are needed"):
            make_trainer(rows, model=make_classifier(classes=1))
        with pytest.raises(ValueError, match="row 0: `soft_labels` must be 3 probabilities"):
            make_trainer(rows, model=make_classifier(classes=3))
        with pytest.raises(TypeError, match="is a `IterableDataset`"):
            make_trainer(rows.to_iterable_dataset())
        with pytest.raises(ValueError, match="virtual tokens"):
            make_trainer(rows, peft_config=PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def test_auto_class_loads_what_was_saved(rows, make_trainer, tmp_path):
    make_trainer(rows, class_names=["safe", "unsafe"]).save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert model.config.id2label == {0: "safe", 1: "unsafe"}
