"""The layout of a batch, written out."""

import pytest
import torch

from trl_extensions.tnt.collator import DataCollatorForTNT


ROWS = [
    {"input_ids": [5, 6, 7, 8], "token_weights": [0, 0, 1, -1], "prompt": "left alone"},
    {"input_ids": [9, 10], "token_weights": [0, -1], "prompt": "too"},
]


def test_padding_on_the_right():
    batch = DataCollatorForTNT(pad_token_id=3)(ROWS)
    assert list(batch) == ["input_ids", "attention_mask", "token_weights"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["token_weights"].tolist() == [[0, 0, 1, -1], [0, -1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_predicts_a_first_token(sign):
    row = {"input_ids": [5, 6], "token_weights": [sign, sign]}
    assert DataCollatorForTNT(pad_token_id=3)([row])["token_weights"].tolist() == [[0, sign]]
    assert row["token_weights"] == [sign, sign]  # the dataset's own list


def test_a_multiple():
    batch = DataCollatorForTNT(pad_token_id=3, pad_to_multiple_of=8)(ROWS)
    assert {tensor.shape for tensor in batch.values()} == {(2, 8)}
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, 3, 3, 3, 3]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 2]
    assert not batch["token_weights"][:, 4:].any()


def test_a_pad_token_that_is_a_scored_token_too():
    """Models without a token for padding use the end token: only the mask may tell them apart."""
    rows = [{"input_ids": [5, 3], "token_weights": [0, 1]}, {"input_ids": [5], "token_weights": [0]}]
    batch = DataCollatorForTNT(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 3], [5, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["token_weights"].tolist() == [[0, 1], [0, 0]]
