"""Numbers that rows bring beside their text (weights, preferences): checked once, and carried into the batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row for a stream that does not know its own."""
    return list(dataset.column_names or next(iter(dataset), {}))


def check_row_values(dataset: Dataset, column: str, name: str, *, highest: float = math.inf) -> None:
    """Check a column of numbers from 0 to `highest`.

    Args:
        dataset: Rows; nothing happens without the column.
        column: `weight` or `preference`.
        name: What messages call the data set.
        highest: Largest value allowed.

    Raises:
        ValueError: A value that is missing, not a finite number or out of range (the message names the row), or
            weights that are all 0.
    """
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
    """Collator that passes numbers of each row on, beside what another collator makes of the rest.

    Args:
        collator: Makes the batch; it does not see `columns`.
        columns: Names of the columns, each of which a row may have or not.

    Returns (by calling it on a list of B rows):
        The batch of `collator` with a float32 tensor `(B,)` for each of `columns` that the rows have.
    """

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
