"""Rows to train on, from a file or a data set, with the columns that the trainers take."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...core.inputs import is_file, read_dataset, read_file


_CLASS_COLUMNS = ("text", "prompt", "soft_labels", "label", "weight")
_PAIR_COLUMNS = ("chosen", "rejected", "prompt", "soft_labels", "preference", "weight")


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """All rows of a `.jsonl`, `.json` or `.csv` file (also gzipped), or of a data set.

    Raises:
        ValueError: There are none, or the source cannot be read; names it and the row.
    """
    given = read_file(Path(source)) if is_file(source) else read_dataset(source, split)
    rows = list(given)
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {place} is not an object with named columns; write one per row.")
    if not rows:
        raise ValueError(f"{source} has no rows: check where they come from.")
    if ".csv" in Path(source).suffixes:
        rows = [{name: _from_csv(name, value) for name, value in row.items()} for row in rows]
    return rows


def source_settings(source: str, split: str) -> dict[str, str]:
    """What tells two sources of rows apart: the content of a file, the name and split of a data set."""
    if is_file(source):
        return {"rows_sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest()}
    return {"dataset_name": source, "dataset_train_split": split}


def training_set(source: str, split: str, *, is_pairs: bool) -> Dataset:
    """Rows for `WeakToStrongTrainer`, or pairs for `WeakToStrongRewardTrainer`, from a file or a data set.

    Of a file the trainers' columns are taken, unless they are empty in every row; a data set is left as it is. The
    first of a pair's `soft_labels` is its `preference` where it has none.

    Raises:
        ValueError: As `read_rows`, or some pairs have a preference and others have none; names the first without one.
    """
    if is_file(source):
        names = _PAIR_COLUMNS if is_pairs else _CLASS_COLUMNS
        rows = read_rows(source, split)
        columns = {name: [row.get(name) for row in rows] for name in names}
        columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        dataset = Dataset.from_dict(columns)
    else:
        dataset = read_dataset(source, split)
    return _with_preferences(dataset, source) if is_pairs and "soft_labels" in dataset.column_names else dataset


def _with_preferences(dataset: Dataset, source: str) -> Dataset:
    empty = [None] * len(dataset)
    given = dataset["preference"] if "preference" in dataset.column_names else empty
    preferences = []
    for place, (preference, soft) in enumerate(zip(given, dataset["soft_labels"], strict=True), start=1):
        if preference is None and (not isinstance(soft, list) or len(soft) != 2):
            raise ValueError(
                f"{source}: row {place} has no `preference`, and its `soft_labels` are {soft!r:.80}: give it one of "
                "them (two probabilities, the first that `chosen` is better), or delete it."
            )
        preferences.append(soft[0] if preference is None else preference)
    own = [name for name in ("preference", "soft_labels") if name in dataset.column_names]
    return dataset.remove_columns(own).add_column("preference", preferences)


def _from_csv(name: str, value: Any) -> Any:
    """A CSV file has nothing but texts."""
    if value == "":
        return None
    if name == "truncated":
        return value.lower() == "true"
    if name == "label":
        return int(value) if value.isdecimal() else value
    if name not in ("soft_labels", "preference", "weight"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value  # refused with its row later
