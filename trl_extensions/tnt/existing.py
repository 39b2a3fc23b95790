"""Rows from data sets whose spans somebody has marked already, such as toxic or hallucinated passages."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .annotation import GIVEN, completion_text, merge_spans
from .spans import check_spans


logger = logging.getLogger(__name__)


def rows_with_spans(
    source: str | os.PathLike, *, text_column: str, spans_column: str, prompt_column: str | None = None
) -> list[dict[str, Any]]:
    """Read texts with marked spans as rows for `annotate_rows` and `TNTTrainer`.

    Args:
        source: A `.jsonl` or `.jsonl.gz` file.
        text_column: Column of the output: a text, or chat messages that end with the assistant's.
        spans_column: Column of the unwanted parts: a list of pairs [start, end) of character offsets into that text,
            or of objects with `start` and `end`. Null or empty: nothing is unwanted.
        prompt_column: Column of what the text answers or continues. Without one `prompt` is empty; a model whose
            tokenizer begins no text with a token of its own then needs prompts that you set in the rows.

    Returns:
        Rows with `id` (`<file stem>-<line>`), `index`, `prompt`, `completion`, `negative_spans` (sorted and merged)
        and `annotations` (marked by `"given"`), in the order of the file. Rows without text are left out and counted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind or cannot be read, a column is missing, or spans that are no integers,
            reversed or outside the text; the message names file and line.
    """
    path = Path(source)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    rows: list[dict[str, Any]] = []
    empty = 0
    for number, line in _read_lines(path):
        row = _read_row(line, f"{path}:{number}", text_column, spans_column, prompt_column)
        if not completion_text(row["completion"]).strip():
            empty += 1
            continue
        rows.append({"id": f"{stem}-{number}", "index": len(rows), **row})
    if empty:
        logger.warning("%s: left out %d rows without text in %r", path, empty, text_column)
    if not rows:
        raise ValueError(f"{path}: no row with text in {text_column!r}; check the file and the column")
    return rows


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: give a .jsonl or .jsonl.gz file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}:{number}: expected an object, got {type(row).__name__}; one object a line"
                    )
                yield number, row
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error.msg}); correct or delete this line") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 {path.suffix} ({error}); write it again") from None


def _read_row(
    line: dict[str, Any], where: str, text_column: str, spans_column: str, prompt_column: str | None
) -> dict[str, Any]:
    for column in (text_column, spans_column, prompt_column):
        if column is not None and column not in line:
            raise ValueError(f"{where}: no column {column!r}; the row has {sorted(line)}")
    completion = "" if line[text_column] is None else line[text_column]
    try:
        text = completion_text(completion)
    except ValueError as error:
        raise ValueError(f"{where}: column {text_column!r}: {error}") from None
    nothing: str | list = "" if isinstance(completion, str) else []
    prompt = nothing if prompt_column is None else line[prompt_column]
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"{where}: column {prompt_column!r} must hold a text or chat messages, got {prompt!r:.80}")
    if isinstance(prompt, str) is not isinstance(completion, str):
        raise ValueError(f"{where}: {prompt_column!r} and {text_column!r} must both be texts or both chat messages")
    spans = check_spans(_as_pairs(line[spans_column]), len(text), f"{where}: {spans_column!r}")
    marks = [{"start": start, "end": end, "by": GIVEN, "label": ""} for start, end in sorted(spans) if start < end]
    return {"prompt": prompt, "completion": completion, "negative_spans": merge_spans(spans), "annotations": marks}


def _as_pairs(spans: Any) -> Any:
    if not isinstance(spans, list):
        return spans
    return [
        [span["start"], span["end"]] if isinstance(span, dict) and {"start", "end"} <= span.keys() else span
        for span in spans
    ]
