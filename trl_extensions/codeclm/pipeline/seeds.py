"""Seed instructions: the examples of a user's requests that the data starts from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...core.inputs import DEFAULT_COLUMNS, Query, is_file, read_dataset, read_file


logger = logging.getLogger(__name__)

_MOST_ROWS_NAMED = 10


@dataclass(frozen=True)
class Seed:
    """A seed instruction.

    Args:
        id: The first 12 hexadecimal digits of the SHA-256 of its text.
        text: The instruction, with its input if it has one.
    """

    id: str
    text: str


def load_seeds(
    source: str | os.PathLike, column: str | None = None, limit: int | None = None, *, split: str = "train"
) -> list[Seed]:
    """Read seed instructions from a file or from the hub.

    A row with the columns `instruction` and `input`, as Alpaca has them, becomes one text with a blank line between
    them, unless another column is asked for. Chats count with their first turn of the user. Seeds that are empty, or
    the same as one before, are left out, and one warning names their rows.

    Args:
        source: A .jsonl, .json or .csv file, or the id of a data set on the hub, as in `core.queries.load_queries`.
        column: The column that holds the instruction; default: the first present of instruction, query, prompt, ...
        limit: Stop after this many seeds.
        split: Split of a data set on the hub.

    Returns:
        Distinct seeds in the order of the source.

    Raises:
        ValueError: One line that names the source, the row (counted from 1) or column, and the remedy.
    """
    source = os.fspath(source)
    if limit is not None and limit < 1:
        raise ValueError(f"the number of seeds is {limit}; use at least 1, or leave it out for all")
    rows = read_file(Path(source)) if is_file(source) else read_dataset(source, split)
    seeds: dict[str, Seed] = {}
    empty: list[int] = []
    repeated: list[int] = []
    places: dict[str, int] = {}
    for number, text in _texts(rows, source, column):
        query = Query.from_text(text.strip())
        key = " ".join(query.text.split()).casefold()
        if not key:
            empty.append(number)
        elif key in places:
            repeated.append(number)
        else:
            places[key] = number
            seeds[query.id] = Seed(query.id, query.text)
            if len(seeds) == limit:
                break
    if not seeds:
        what = f"all {len(empty)} rows are empty" if empty else "there are no rows"
        raise ValueError(f"{source}: {what}; give at least one seed instruction, or check the column")
    for rows_left_out, what in ((empty, "empty"), (repeated, "the same as one before")):
        if rows_left_out:
            logger.warning(
                "%s: %d seeds left out that are %s (%s)", source, len(rows_left_out), what, _named(rows_left_out)
            )
    return list(seeds.values())


def _texts(rows: Iterable[Any], source: str, column: str | None) -> Iterator[tuple[int, str]]:
    """Number and text of each row; a missing text is an empty one."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {number} is not an object with named columns; write one per row")
        if column is None:
            column = next((name for name in ("instruction", *DEFAULT_COLUMNS) if name in row), None)
            if column is None:
                raise ValueError(
                    f"{source}: none of the columns {', '.join(dict.fromkeys(('instruction', *DEFAULT_COLUMNS)))} is "
                    f"there; name the column of the seeds, available: {', '.join(map(str, row))}"
                )
        if column not in row:
            raise ValueError(
                f"{source}: row {number} has no column {column!r}; available: {', '.join(map(str, row)) or 'none'}"
            )
        text = _as_text(row[column], f"{source}: row {number}, column {column!r}")
        extra = row.get("input") if column == "instruction" else None
        if text.strip() and isinstance(extra, str) and extra.strip():
            text = f"{text.strip()}\n\n{extra.strip()}"
        yield number, text


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, list):
        for message in value:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f"{where}: a message needs the texts `role` and `content`, got {message!r:.80}")
        return next((message["content"] for message in value if message["role"] == "user"), "")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} holds {type(value).__name__}, not text; name a text column")
    return value or ""


def _named(rows: list[int]) -> str:
    named = ", ".join(map(str, islice(rows, _MOST_ROWS_NAMED)))
    more = len(rows) - _MOST_ROWS_NAMED
    return f"rows {named} and {more} more" if more > 0 else f"row{'s' if len(rows) > 1 else ''} {named}"
