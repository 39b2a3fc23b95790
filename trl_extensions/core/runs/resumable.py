"""Rows in, a file of rows out, as they are made: after a kill the same call goes on behind the last whole line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .jsonl import JsonlWriter, encode_row, read_jsonl
from .run import check_resume


@dataclass(frozen=True)
class Failed:
    """A row that nothing could be made of: why, and further columns (raw answers) for the file of failures."""

    reason: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MapReport:
    """Rows in the file, those of them (and failed ones) that earlier runs left, failed ones; this call's seconds."""

    path: Path
    rows: int
    resumed: int
    failed: int
    seconds: float


def failures_path(output: str | os.PathLike) -> Path:
    """The file beside `output` that holds the failed rows; who deletes it has them tried again."""
    return Path(output).with_name(f"{Path(output).stem}.failures.jsonl")


def map_rows(
    rows: Sequence[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], Iterable[tuple[int, dict[str, Any] | Failed]]],
    output: str | os.PathLike,
    *,
    chunk_size: int | None = None,
    key: str = "id",
    settings: dict[str, Any] | None = None,
    desc: str = "rows",
    same: Sequence[str] = (),
    part: tuple[str, str] | None = None,
    tally: Callable[[dict[str, Any]], Mapping[str, Any] | None] | None = None,
    limit: Callable[[], int] | None = None,
) -> MapReport:
    """Make a row of every row and append each to a JSON-lines file as soon as it is there.

    A `ValueError` refuses rows without a `key` of their own, an `output` made with other settings or of other rows
    (nothing on disk is changed), and a `make` that leaves rows of its chunk out.

    Args:
        make: Given a chunk of rows, yields for each, in any order, its place in the chunk and the row to write (`key`
            is added), or `Failed`: that row goes to `<output stem>.failures.jsonl` with the reason.
        output: The `.jsonl` file to append to. Rows that it or the file of failures holds are not made again.
        chunk_size: Rows handed to `make` at once; all that are left, if left out.
        settings: JSON-ready values that the rows depend on, kept in `<output stem>.settings.json`.
        same: Columns that `make` passes on unchanged, by which rows of another source with the same keys are noticed.
        part: A column and its value in every row of this call, where several calls write to one file: rows with
            another value are left alone, and the settings are in `<output stem>.<value>.settings.json`.
        tally: Called with every row of the file, those of earlier runs first; what it returns is shown as progress.
        limit: Asked before every chunk how many more rows may be made at most; 0 ends the map.
    """
    start, output = time.perf_counter(), Path(output)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}; give at least 1")
    if not rows:
        raise ValueError(f"no rows to make {output} of; check where they come from")
    by_key = _by_key(rows, key)
    made, failed = _existing(output, key, part), _existing(failures_path(output), key, part)
    if settings is not None:
        stem = output.stem if part is None else f"{output.stem}.{part[1]}"
        path = output.with_name(f"{stem}.settings.json")
        check_resume(path, settings, made=str(output), started=bool(made or failed))
    for path, found in ((output, made), (failures_path(output), failed)):
        for row in found:
            _check_source(path, row, by_key.get(row[key]), key, same)
    done = {row[key] for row in made + failed}
    todo = [row for row in rows if row[key] not in done]
    written, aside = len(made), len(failed)

    def show(row: dict[str, Any]) -> None:
        if tally:
            bar.set_postfix(tally(row), refresh=False)

    with JsonlWriter(output) as writer, tqdm(total=len(rows), initial=len(done), desc=desc, unit="row") as bar:
        for row in made:
            show(row)
        while todo:
            size = chunk_size or len(todo)
            if limit is not None and (size := min(size, limit())) < 1:
                break
            chunk, todo = todo[:size], todo[size:]
            left = dict(enumerate(chunk))
            for place, result in make(chunk):
                row = left.pop(place)
                if isinstance(result, Failed):
                    with JsonlWriter(failures_path(output)) as failures:
                        failures.append({**row, "reason": result.reason, **result.extra})
                    aside += 1
                else:
                    result = {key: row[key], **result}
                    writer.append(result)
                    written += 1
                    show(result)
                bar.update()
            if left:
                raise ValueError(f"nothing was made of row {next(iter(left.values()))[key]!r}, nor was it set aside")
    return MapReport(output, written, len(done), aside, time.perf_counter() - start)


def _by_key(rows: Sequence[dict[str, Any]], key: str) -> dict[str | int, dict[str, Any]]:
    by_key: dict[str | int, dict[str, Any]] = {}
    for index, row in enumerate(rows):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"row {index} has no `{key}`, a text or an integer (got {value!r}); give each its own")
        if value in by_key:
            raise ValueError(f"row {index}: the `{key}` {value!r} occurs twice; give each row its own")
        by_key[value] = row
    return by_key


def _existing(path: Path, key: str, part: tuple[str, str] | None) -> list[dict[str, Any]]:
    rows = read_jsonl(path, required=(key,)) if path.is_file() else []
    return rows if part is None else [row for row in rows if row.get(part[0]) == part[1]]


def _check_source(
    path: Path, row: dict[str, Any], source: dict[str, Any] | None, key: str, same: Sequence[str]
) -> None:
    remedy = "give the same rows, or more, to resume, or another output"
    if source is None:
        raise ValueError(f"{path}: its row {row[key]!r} is not among the rows given; {remedy}")
    # As a JSON line gives it back: tuples are lists, and half a surrogate pair is `?`
    written = json.loads(encode_row({name: source.get(name) for name in same}))
    for name in same:
        if row.get(name) != written[name]:
            raise ValueError(f"{path}: its row {row[key]!r} has another {name} than the row given; {remedy}")
