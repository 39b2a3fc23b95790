"""Which annotated outputs a patch is trained on."""

import logging
import os
import random
from typing import Any

from datasets import Dataset, load_dataset

from ..core.runs.jsonl import read_jsonl
from .annotate.rows import completion_text


logger = logging.getLogger(__name__)

_TEXT_COLUMNS = ("prompt", "completion", "negative_spans", "truncated")


def load_training_rows(source: str, split: str, *, clean_ratio: float | None = None, seed: int = 0) -> Dataset:
    """Annotated outputs, a `.jsonl` file of `annotate` or a data set with the trainer's columns.

    Args:
        source: The file, or the name of a data set.
        split: Split of a data set.
        clean_ratio: At most this many clean rows per row with a span, drawn at random.
        seed: Seed of that draw.

    Raises:
        ValueError: A file that is not there, or holds nothing usable.
    """
    if not source.endswith(".jsonl"):
        rows = load_dataset(source, split=split)
        rows = rows if "input_ids" in rows.column_names else rows.to_list()
    elif os.path.isfile(source):
        rows = read_jsonl(source)
        rows = Dataset.from_list(rows) if rows and "input_ids" in rows[0] else rows
    else:
        raise ValueError(f"{source}: there is no such file; run `trl-ext tnt annotate` first.")
    if isinstance(rows, Dataset):
        if clean_ratio is not None:
            raise ValueError("`clean_ratio` does not apply to tokenised rows: thin them out yourself.")
        return rows
    for number, row in enumerate(rows, start=1):
        missing = {"prompt", "completion"} - row.keys()
        if missing:
            raise ValueError(f"{source}: row {number} has no `{min(missing)}`; run `trl-ext tnt annotate` first.")
    return to_dataset(select_rows(rows, clean_ratio, seed))


def select_rows(rows: list[dict[str, Any]], clean_ratio: float | None, seed: int) -> list[dict[str, Any]]:
    """Rows with text, the clean ones thinned out to `clean_ratio` per row with a span, in their order."""
    written = [row for row in rows if completion_text(row["completion"]).strip()]
    if len(written) < len(rows):
        logger.warning("%d of %d outputs are empty and left out", len(rows) - len(written), len(rows))
    if clean_ratio is None:
        return written
    clean = [place for place, row in enumerate(written) if not row.get("negative_spans")]
    wanted = min(len(clean), round(clean_ratio * (len(written) - len(clean))))
    dropped = set(clean) - set(random.Random(seed).sample(clean, wanted))
    return [row for place, row in enumerate(written) if place not in dropped]


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as a data set for `TNTTrainer`.

    Raises:
        ValueError: There is none.
    """
    if not rows:
        raise ValueError("no rows to train on: sample and annotate more outputs.")
    return Dataset.from_list([{name: row.get(name) for name in _TEXT_COLUMNS} for row in rows])
