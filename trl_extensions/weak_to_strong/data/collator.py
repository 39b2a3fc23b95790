"""Batches of weak-to-strong training: texts with soft labels, and numbers that rows bring beside their text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers.data.data_collator import DataCollatorMixin

from ...core.training.encoding import pad_rows


@dataclass
class DataCollatorForWeakLabels(DataCollatorMixin):
    """Pads texts on the right, or stacks their features, and adds what is known of their labels.

    Args:
        pad_token_id: Id that fills the sequences up.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Returns (by calling it on a list of B rows, T being the longest, in tokens):
        `input_ids` and `attention_mask` `(B, T)`, or `features` `(B, H)` where the rows have them; as far as the rows
        have them `soft_labels` `(B, K)`, `weight` `(B,)` and `label` `(B,)`, the true class or -1.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "features" in examples[0]:
            batch = {"features": _floats(examples, "features")}
        else:
            sequences = [example["input_ids"] for example in examples]
            batch = {
                "input_ids": pad_rows(sequences, self.pad_token_id, self.pad_to_multiple_of),
                "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], 0, self.pad_to_multiple_of),
            }
        for name in ("soft_labels", "weight"):
            if name in examples[0]:
                batch[name] = _floats(examples, name)
        if "label" in examples[0]:
            labels = [example["label"] for example in examples]
            batch["label"] = torch.tensor([-1 if label is None else label for label in labels])
        return batch


def _floats(examples: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray([example[name] for example in examples], dtype=np.float32))


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row for a stream that does not know its own."""
    return list(dataset.column_names or next(iter(dataset), {}))


def check_row_values(dataset: Dataset, column: str, name: str, *, highest: float = math.inf) -> None:
    """Raise `ValueError` for a column `weight` or `preference`, if there is one, with a value that is not a finite
    number from 0 to `highest` (the message names the row), or with weights that are all 0."""
    if column not in dataset.column_names:
        return
    allowed = "a finite number of at least 0" if highest == math.inf else f"a number from 0 to {highest:g}"
    values = dataset[column]
    for index, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 0 <= value <= highest:
            raise ValueError(f"{name} row {index}: `{column}` must be {allowed}, got {value!r:.80}.")
    if column == "weight" and len(values) and not any(values):
        raise ValueError(f"Every `weight` of the {name} dataset is 0, so no row counts: give some a positive weight.")


@dataclass
class WithRowValues:
    """Collator that adds a float32 tensor `(B,)` for each of `columns` that the rows have to what another collator
    makes of the rest."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(
            [{name: value for name, value in example.items() if name not in self.columns} for example in examples]
        )
        for name in self.columns:
            if name in examples[0]:
                batch[name] = torch.tensor([float(example[name]) for example in examples])
        return batch
