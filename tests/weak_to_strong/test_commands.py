"""`label`, `train` and `evaluate` on their own, on tiny models: what they read, leave behind and refuse."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from trl import ModelConfig

from tests.weak_to_strong.conftest import make_classifier
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.weak_to_strong import run as commands
from trl_extensions.weak_to_strong.arguments import WeakToStrongArguments
from trl_extensions.weak_to_strong.data import prepare
from trl_extensions.weak_to_strong.data.prepare import training_set
from trl_extensions.weak_to_strong.labels.transformer_learner import load_saved
from trl_extensions.weak_to_strong.run import WeakToStrongRun
from trl_extensions.weak_to_strong.trainers.configs import WeakToStrongConfig, WeakToStrongRewardConfig


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def requests(number: int, part: str) -> list[dict]:
    """Alternately good and bad ones, of which four have one topic."""
    return [
        {"text": f"Please {'steal' if i % 2 else 'boil'} an egg, {part} {i}.", "label": ["safe", "unsafe"][i % 2],
         "topic": f"{part}-{i // 4}"}
        for i in range(number)
    ]  # fmt: skip


def pairs(number: int, part: str) -> list[dict]:
    return [{"prompt": f"{part} {i}?", "chosen": "Sure, boil it.", "rejected": "No, steal it."} for i in range(number)]


@pytest.fixture
def make_run(tmp_path, tiny_classifier_dir):
    """Builds a run of a bag-of-words model and a tiny strong one."""

    def build(*, task="classification", model=None, config=None, model_args=None, **args):
        training = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
        training |= {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "disable_tqdm": True}
        training |= {"output_dir": str(tmp_path / "out")}
        kind = WeakToStrongRewardConfig if task == "reward" else WeakToStrongConfig
        return WeakToStrongRun(
            WeakToStrongArguments(task=task, weak_models=["sklearn:naive-bayes"], **args),
            kind(**(training | (config or {}))),
            ModelConfig(model_name_or_path=str(model or tiny_classifier_dir), **(model_args or {})),
        )

    return build


@pytest.fixture
def save_classifier(tmp_path, tiny_tokenizer):
    """Saves a random classifier with its tokenizer; returns its folder and itself."""

    def save(kind="llama", id2label=None, classes=2, **settings):
        model = make_classifier(kind, classes)
        model.config.update(settings)
        if id2label:
            model.config.id2label = dict(enumerate(id2label))
            model.config.label2id = {name: i for i, name in enumerate(id2label)}
        folder = tmp_path / f"saved-{kind}-{classes}"
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder, model

    return save


class TestLabel:
    def test_test_predictions_can_be_compared_with(self, make_run, tmp_path):
        args = {
            "examples": write(tmp_path / "train.jsonl", requests(32, "train")),
            "test_examples": write(tmp_path / "test.jsonl", requests(12, "test")),
            "group_column": "topic",
        }
        run = make_run(**args)
        commands.label(run)
        weak = read_jsonl(run.folder / "weak_predictions.jsonl")
        assert [row["label"] for row in weak] == [0, 1] * 6
        assert len(read_jsonl(run.folder / "weak_labels.jsonl")) == 16
        assert json.loads((run.folder / "settings.json").read_text())["weak_models"] == ["sklearn:naive-bayes"]

        compared = make_run(
            **args, predictions=str(run.folder / "weak_predictions.jsonl"),
            weak_predictions=str(run.folder / "weak_predictions.jsonl"),
        )  # fmt: skip
        commands.evaluate(compared)
        evaluation = json.loads((run.folder / "evaluation.json").read_text())
        assert (evaluation["rows"], evaluation["groups"]) == ([12], [3])
        assert evaluation["differences"]["accuracy"]["w2s"]["value"] == 0

    def test_settings_are_claimed_before_anything_is_made(self, make_run, tmp_path):
        run = make_run(examples=write(tmp_path / "train.jsonl", requests(32, "train")))
        (run.folder / "seed_0").mkdir(parents=True)
        (run.folder / "settings.json").write_text('{"weak_share": 0.9}')
        with pytest.raises(ValueError, match=r"weak_share was 0\.9, now 0\.5"):
            commands.label(run)
        assert not (run.folder / "labels").exists()

    def test_rows_without_labels_keep_their_groups(self, make_run, tmp_path):
        rows = [{"text": row["text"], "topic": row["topic"]} for row in requests(6, "new")]
        run = make_run(
            examples=write(tmp_path / "train.jsonl", requests(16, "train")), group_column="topic",
            unlabelled=write(tmp_path / "new.jsonl", rows),
        )  # fmt: skip
        assert run.class_names == ["safe", "unsafe"]
        assert [(row.group, row.label) for row in run.unlabelled_rows()] == [(row["topic"], None) for row in rows]
        two = [row | {"topic": "t"} for row in pairs(3, "a")]
        run = make_run(task="reward", unlabelled=write(tmp_path / "pairs.jsonl", two), group_column="topic")
        assert [(row.group, row.label) for row in run.unlabelled_rows()] == [("t", None)] * 3


class TestRows:
    ROWS = ({"text": "a", "soft_labels": [0.2, 0.8]}, {"text": "b", "soft_labels": [1.0, 0.0], "weight": 2.0})

    def test_json_and_csv(self, tmp_path):
        (tmp_path / "rows.json").write_text(json.dumps(self.ROWS))
        with open(tmp_path / "rows.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "soft_labels", "weight", "label"])
            writer.writeheader()
            writer.writerows(self.ROWS)
        expected = {"text": ["a", "b"], "soft_labels": [[0.2, 0.8], [1.0, 0.0]], "weight": [None, 2.0]}
        for name in (write(tmp_path / "rows.jsonl", self.ROWS), tmp_path / "rows.json", tmp_path / "rows.csv"):
            assert training_set(str(name), "train", is_pairs=False).to_dict() == expected

    def test_labels_in_csv(self, tmp_path):
        (tmp_path / "rows.csv").write_text("text,label\na,0\nb,true\nc,safe\n")
        rows = prepare.read_rows(str(tmp_path / "rows.csv"), "train")
        assert [row["label"] for row in rows] == [0, "true", "safe"]

    def test_preferences_out_of_soft_labels(self, tmp_path, monkeypatch):
        rows = [{"chosen": "a", "rejected": "b", "soft_labels": [0.3, 0.7], "label": None}]
        rows += [{"chosen": "c", "rejected": "d", "soft_labels": [0.9, 0.1], "preference": 0.5}]
        expected = {"chosen": ["a", "c"], "rejected": ["b", "d"], "preference": [0.3, 0.5]}
        assert training_set(write(tmp_path / "rows.jsonl", rows), "train", is_pairs=True).to_dict() == expected
        hub = Dataset.from_list([rows[0] | {"preference": None}, rows[1]]).remove_columns("label")
        monkeypatch.setattr(prepare, "read_dataset", lambda source, split: hub)
        assert training_set("someone/pairs", "train", is_pairs=True).to_dict() == expected
        rows[1].pop("preference")
        rows[1]["soft_labels"] = None
        with pytest.raises(ValueError, match="row 2 has no `preference`, and its `soft_labels` are None"):
            training_set(write(tmp_path / "rows.jsonl", rows), "train", is_pairs=True)

    def test_a_data_set_keeps_its_class_names(self, monkeypatch):
        hub = Dataset.from_dict({"text": ["a"], "label": [1]}).cast_column("label", ClassLabel(names=["x", "y"]))
        monkeypatch.setattr(prepare, "read_dataset", lambda source, split: hub)
        assert training_set("someone/texts", "train", is_pairs=False) is hub

    @pytest.mark.parametrize(
        ("content", "message"), [("", "has no rows"), ("[1]\n", "row 1 is not an object with named columns")]
    )
    def test_what_holds_no_rows(self, tmp_path, content, message):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            training_set(str(tmp_path / "rows.jsonl"), "train", is_pairs=False)


class TestTrain:
    def test_other_settings_and_rows_are_refused_once_there_is_a_checkpoint(self, make_run, tmp_path, monkeypatch):
        rows = [{"text": f"egg {i}", "soft_labels": [0.2, 0.8]} for i in range(8)]
        source = write(tmp_path / "rows.jsonl", rows)
        saving = {"save_strategy": "steps", "save_steps": 1}
        monkeypatch.setattr(commands, "fit", lambda *arguments: None)
        commands.train(make_run(dataset_name=source))
        commands.train(make_run(dataset_name=source, config={"learning_rate": 0.5}))  # nothing was made yet
        checkpoint = tmp_path / "out" / "train" / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        commands.train(make_run(dataset_name=source, config={"learning_rate": 0.5} | saving))
        with pytest.raises(ValueError, match=r"learning_rate was 0\.5, now 0\.25"):
            commands.train(make_run(dataset_name=source, config={"learning_rate": 0.25}))
        write(tmp_path / "rows.jsonl", rows[:-1])
        with pytest.raises(ValueError, match="rows_sha256 was"):
            commands.train(make_run(dataset_name=source, config={"learning_rate": 0.5}))

    def test_pairs_with_soft_labels(self, make_run, tmp_path):
        rows = [row | {"soft_labels": [0.8, 0.2]} for row in pairs(4, "a")]
        run = make_run(task="reward", dataset_name=write(tmp_path / "pairs.jsonl", rows))
        assert (commands.train(run) / "config.json").is_file()

    def test_an_adapter_on_a_cut_model_is_refused(self, make_run, tiny_classifier_dir):
        run = make_run(model=f"{tiny_classifier_dir}[:1]", model_args={"use_peft": True}, dataset_name="x.jsonl")
        with pytest.raises(ValueError, match="a saved adapter does not know that its base was cut"):
            commands.train(run)


class TestEvaluate:
    def ask(self, run):
        commands.evaluate(run)
        return read_jsonl(run.folder / "predictions.jsonl")

    def test_classes_are_called_as_the_model_calls_them(self, make_run, save_classifier, tmp_path):
        test = write(tmp_path / "test.jsonl", requests(4, "test"))
        folder, _ = save_classifier(id2label=["unsafe", "safe"])
        rows = self.ask(make_run(model=folder, test_examples=test))
        # sorted by name it would be the other way round
        assert [row["label"] for row in rows] == [1, 0, 1, 0]
        with pytest.raises(ValueError, match=r"has the classes \['unsafe', 'safe'\], not \['safe', 'unsafe'\]"):
            self.ask(make_run(model=folder, test_examples=test, config={"class_names": ["safe", "unsafe"]}))
        other = write(tmp_path / "other.jsonl", [{"text": "x", "label": "odd"}, {"text": "y", "label": "safe"}])
        with pytest.raises(ValueError, match="label 'odd' is none of the classes unsafe, safe"):
            self.ask(make_run(model=folder, test_examples=other))

    def test_nameless_classes_are_those_of_the_examples(self, make_run, save_classifier, tmp_path):
        test = write(tmp_path / "test.jsonl", requests(4, "test"))
        folder, _ = save_classifier()
        assert [row["label"] for row in self.ask(make_run(model=folder, test_examples=test))] == [0, 1, 0, 1]
        folder, _ = save_classifier(classes=3)
        with pytest.raises(ValueError, match="has 3 outputs where 2 are needed"):
            self.ask(make_run(model=folder, test_examples=test))

    def test_a_language_model_has_no_head_to_ask(self, make_run, tmp_path):
        test = write(tmp_path / "test.jsonl", requests(4, "test"))
        with pytest.raises(ValueError, match="is a LlamaForCausalLM and has no head to ask"):
            self.ask(make_run(test_examples=test))

    def test_texts_are_cut_to_what_the_model_takes(self, make_run, save_classifier, tiny_tokenizer, tmp_path):
        text = "Boil an egg, " * 100
        rows = [{"text": text, "label": 0}, {"text": "Steal", "label": 1}]
        test = write(tmp_path / "test.jsonl", rows)
        folder, model = save_classifier("bert")  # has 128 learned positions
        said = self.ask(make_run(model=folder, test_examples=test, config={"max_length": 1024}))
        ids = torch.tensor([tiny_tokenizer(text.strip())["input_ids"][:128]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits.softmax(-1)[0]
        np.testing.assert_allclose(said[0]["probs"], expected, atol=1e-5)

    def test_the_model_is_loaded_as_asked(self, save_classifier):
        folder, _ = save_classifier()
        for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
            given = {"dtype": dtype} if dtype else {}
            model_args = ModelConfig(model_name_or_path=str(folder), attn_implementation="eager", **given)
            model, _ = load_saved(str(folder), 2, model_args, False, "cpu")
            assert model.dtype == expected and model.config._attn_implementation == "eager"

    def test_an_adapter_for_other_classes(self, tiny_classifier_dir, tmp_path, tiny_tokenizer):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        base = AutoModelForSequenceClassification.from_pretrained(tiny_classifier_dir, num_labels=3)
        adapter = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
        adapter.save_pretrained(tmp_path / "adapter")
        name, model_args = str(tmp_path / "adapter"), ModelConfig(dtype="bfloat16")
        model, _ = load_saved(name, 3, model_args, False, "cpu")
        assert model.config.num_labels == 3 and model.get_base_model().dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"does not fit .* with 2 outputs") as error:
            load_saved(name, 2, model_args, False, "cpu")
        assert "\n" not in str(error.value)

    def test_groups_need_test_examples(self, make_run, tmp_path):
        said = write(tmp_path / "said.jsonl", [{"id": str(i), "label": i % 2, "probs": [0.3, 0.7]} for i in range(4)])
        with pytest.raises(ValueError, match="`group_column` needs `test_examples`"):
            commands.evaluate(make_run(predictions=said, weak_predictions=said, group_column="topic"))
