"""Rows to train on, from a file `sample` wrote or a data set with the trainer's columns."""

import os

from datasets import Dataset, load_dataset

from ..core.runs.jsonl import read_jsonl
from .sampling import load_rows, to_dataset


def load_training_rows(source: str, split: str) -> Dataset:
    """Rows to train on: the kept ones of a file `sample` wrote, or a data set with the trainer's columns.

    Raises:
        ValueError: A file that is not there, or holds nothing usable.
    """
    if not source.endswith(".jsonl"):
        return load_dataset(source, split=split)
    if not os.path.isfile(source):
        raise ValueError(f"{source}: there is no such file; run `trl-ext sami sample` first.")
    rows = read_jsonl(source)
    return to_dataset(load_rows(source)) if rows and "kept" in rows[0] else Dataset.from_list(rows)
