"""Rows become tokens and soft labels; what cannot be used is refused in one line."""

import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from tests.weak_to_strong.conftest import w2s_rows
from trl_extensions.weak_to_strong.data.collator import DataCollatorForWeakLabels
from trl_extensions.weak_to_strong.data.prepare import (
    classes_of,
    confidence_weights,
    mean_soft_label,
    prepare_rows,
    weigh_by_confidence,
)


def prepare(rows, tokenizer, num_labels=2, **options):
    return prepare_rows(Dataset.from_list(rows), tokenizer, num_labels=num_labels, **options)


class TestRows:
    def test_texts_and_soft_labels(self, tiny_tokenizer):
        prepared = prepare([{"text": "Boil an egg.", "soft_labels": [0.25, 0.7504]}], tiny_tokenizer)
        assert prepared[0]["input_ids"] == tiny_tokenizer("Boil an egg.")["input_ids"]
        assert prepared[0]["soft_labels"] == pytest.approx([0.25 / 1.0004, 0.7504 / 1.0004])
        assert prepared[0]["weight"] == 1.0 and prepared[0]["label"] is None

    def test_labels_become_one_hot(self, tiny_tokenizer):
        rows = [{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}]
        prepared = prepare(rows, tiny_tokenizer, class_names=["good", "bad"])
        assert list(prepared["soft_labels"]) == [[0.0, 1.0], [1.0, 0.0]]
        assert list(prepared["label"]) == [1, 0]

    def test_a_true_label_beside_soft_ones(self, tiny_tokenizer):
        rows = [{"text": "a", "soft_labels": [0.9, 0.1], "label": 1}, {"text": "b", "soft_labels": None, "label": 1}]
        prepared = prepare(rows, tiny_tokenizer)
        assert list(prepared["soft_labels"]) == [[0.9, 0.1], [0.0, 1.0]] and list(prepared["label"]) == [1, 1]

    def test_chats_are_rendered(self, tiny_tokenizer):
        messages = [{"role": "user", "content": "Boil an egg."}]
        prepared = prepare([{"prompt": messages, "label": 0}], tiny_tokenizer)
        text = "<|im_start|>user\nBoil an egg.<|im_end|>\n"
        assert prepared[0]["input_ids"] == tiny_tokenizer(text)["input_ids"]
        assert (
            prepare([{"prompt": "Hi", "label": 0}], tiny_tokenizer)[0]["input_ids"] == tiny_tokenizer("Hi").input_ids
        )

    def test_is_idempotent(self, tiny_tokenizer):
        rows = [{**row, "weight": 0.5 + place, "id": place} for place, row in enumerate(w2s_rows(5, 3))]
        once = prepare(rows, tiny_tokenizer, 3, max_length=4)
        twice = prepare_rows(once, tiny_tokenizer, num_labels=3, max_length=4)
        assert twice.to_list() == once.to_list() and list(once["id"]) == [0, 1, 2, 3, 4]

    def test_rows_without_labels(self, tiny_tokenizer):
        prepared = prepare([{"text": "a", "label": None}, {"text": "b", "label": 1}], tiny_tokenizer, labelled=False)
        assert "soft_labels" not in prepared.column_names and "label" not in prepared.column_names
        assert "soft_labels" in prepare([{"text": "b", "label": 1}], tiny_tokenizer, labelled=False).column_names

    def test_features_are_taken_as_they_are(self, tiny_tokenizer):
        prepared = prepare([{"features": [0.5, 1.5], "label": 0}], tiny_tokenizer)
        assert prepared[0]["features"] == [0.5, 1.5] and "input_ids" not in prepared.column_names


class TestOverlong:
    rows = [{"text": "Boil an egg, please.", "label": 0}, {"text": "Hi", "label": 1}]  # noqa: RUF012

    def test_truncate_is_counted(self, tiny_tokenizer, caplog):
        with caplog.at_level(logging.WARNING):
            prepared = prepare(self.rows, tiny_tokenizer, max_length=3)
        assert prepared[0]["input_ids"] == tiny_tokenizer(self.rows[0]["text"])["input_ids"][:3]
        assert "Of 2 train rows, 1 are longer than 3 tokens and were cut (first: row 0)." in caplog.text

    def test_drop_is_counted(self, tiny_tokenizer, caplog):
        with caplog.at_level(logging.WARNING):
            prepared = prepare(self.rows, tiny_tokenizer, max_length=3, overlong_policy="drop", name="eval")
        assert list(prepared["text"]) == ["Hi"]
        assert "Of 2 eval rows, 1 are longer than 3 tokens and were dropped" in caplog.text

    def test_error(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="train row 0: `text` is longer than 3 tokens"):
            prepare(self.rows, tiny_tokenizer, max_length=3, overlong_policy="error")
        with pytest.raises(ValueError, match="No train row is left"):
            prepare(self.rows[:1], tiny_tokenizer, max_length=3, overlong_policy="drop")


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": "a", "soft_labels": [0.5, 0.6]}, "row 1: `soft_labels` sum to 1.1 instead of 1"),
            ({"text": "a", "soft_labels": [1.5, -0.5]}, "row 1: `soft_labels` must be finite numbers of at least 0"),
            ({"text": "a", "soft_labels": [float("nan"), 1.0]}, "row 1: `soft_labels` must be finite"),
            ({"text": "a", "soft_labels": [0.2, 0.3, 0.5]}, "row 1: `soft_labels` must be 2 probabilities"),
            ({"text": "a", "soft_labels": None}, "row 1 has neither `soft_labels` nor `label`"),
            ({"text": " \n", "soft_labels": [0.5, 0.5]}, "row 1: `text` is empty"),
            ({"text": None, "soft_labels": [0.5, 0.5]}, "row 1: `text` must be a text"),
        ],
    )
    def test_soft_labels_and_texts(self, tiny_tokenizer, row, message):
        with pytest.raises(ValueError, match=message) as caught:
            prepare([{"text": "fine", "soft_labels": [0.5, 0.5]}, row], tiny_tokenizer)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("label", "names", "message"),
        [
            (2, None, "row 1: `label` must be a class number from 0 to 1, got 2"),
            (-1, None, "row 1: `label` must be a class number"),
            ("ugly", ["good", "bad"], "row 1: `label` 'ugly' is not one of 'good', 'bad'"),
            ("ugly", None, "`label` 'good' needs `class_names`"),
        ],
    )
    def test_labels(self, tiny_tokenizer, label, names, message):
        fine = "good" if isinstance(label, str) else 0
        with pytest.raises(ValueError, match=message):
            prepare([{"text": "a", "label": fine}, {"text": "b", "label": label}], tiny_tokenizer, class_names=names)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"body": "a", "label": 0}], "needs `text` or `prompt`"),
            ([{"text": "a"}], "neither `soft_labels` nor `label`"),
            ([{"text": "a", "label": 0, "weight": -1.0}], "train row 0: `weight` must be"),
            ([{"text": "a", "label": 0, "weight": 0.0}], "Every `weight` of the train dataset is 0"),
            ([{"input_ids": [], "label": 0}], "row 0: `input_ids` must be"),
            ([{"prompt": [{"content": "a"}], "label": 0}], "row 0: the chat template refuses `prompt`"),
        ],
    )
    def test_columns(self, tiny_tokenizer, rows, message):
        with pytest.raises(ValueError, match=message):
            prepare(rows, tiny_tokenizer)

    def test_no_template(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = None
        with pytest.raises(ValueError, match="row 0: `prompt` is a chat, but the tokenizer has no chat template"):
            prepare([{"prompt": [{"role": "user", "content": "a"}], "label": 0}], tiny_tokenizer)

    def test_an_absent_class_is_a_warning(self, tiny_tokenizer, caplog):
        rows = [{"text": "a", "soft_labels": [0.6, 0.3, 0.1]}, {"text": "b", "soft_labels": [0.2, 0.7, 0.1]}]
        with caplog.at_level(logging.WARNING):
            prepare(rows, tiny_tokenizer, 3, class_names=["x", "y", "z"])
        assert "No weak label of the train dataset is class 'z'" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(rows, tiny_tokenizer, 3, name="eval")
        assert not caplog.text


class TestClasses:
    def test_from_the_data(self):
        assert classes_of(Dataset.from_list(w2s_rows(3, 4))) == (4, None)
        assert classes_of(Dataset.from_dict({"label": ["b", "a", "b"]})) == (2, ["a", "b"])
        assert classes_of(Dataset.from_dict({"label": [0, 3]})) == (4, None)
        named = Dataset.from_dict({"label": [0, 0]}).cast_column("label", ClassLabel(names=["no", "yes"]))
        assert classes_of(named) == (2, ["no", "yes"])
        with pytest.raises(ValueError, match="does not show 2 classes"):
            classes_of(Dataset.from_dict({"label": [0, 0]}))


class TestWeights:
    def test_by_hand(self):
        # K = 3: (1, 1/2, 1/3) -> (1, 1/4, 0), mean 5/12
        soft = np.array([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
        assert confidence_weights(soft) == pytest.approx([12 / 5, 3 / 5, 0.0])
        with pytest.raises(ValueError, match="Every soft label is uniform"):
            confidence_weights(soft[2:])

    def test_multiplied_and_the_prior_counts_rows(self, tiny_tokenizer):
        rows = [
            {"text": "a", "soft_labels": [1.0, 0.0], "weight": 1.0},
            {"text": "b", "soft_labels": [0.25, 0.75], "weight": 3.0},
        ]
        prepared = prepare(rows, tiny_tokenizer)
        assert mean_soft_label(prepared) == pytest.approx([0.625, 0.375])  # of rows, whatever they weigh
        # confidences 1 and 1/2, mean 3/4
        weighed = weigh_by_confidence(prepared)
        assert list(weighed["weight"]) == pytest.approx([4 / 3, 2.0])
        assert mean_soft_label(weighed) == pytest.approx([0.625, 0.375])


def test_collator_pads_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "soft_labels": [0.5, 0.5], "weight": 2.0, "label": 1},
        {"input_ids": [8], "soft_labels": [1.0, 0.0], "weight": 1.0, "label": None},
    ]
    batch = DataCollatorForWeakLabels(9, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["soft_labels"].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert batch["weight"].tolist() == [2.0, 1.0] and batch["label"].tolist() == [1, -1]
