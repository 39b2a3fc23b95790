"""The history of one instruction, from its seed to its place in the data, to be read in a terminal."""

import json
import os
import textwrap
from collections.abc import Iterator
from difflib import get_close_matches
from heapq import nlargest
from itertools import takewhile
from pathlib import Path
from typing import Any

from .rows import stream_rows


_SIDES = ("strong", "target")


def describe(folder: str | os.PathLike, id_or_row: str | int, *, longest: int | None = None) -> str:
    """Seed, metadata, every version with answers and scores, and the outcome: kept, dropped, set aside or unfinished.

    Args:
        folder: Output folder of a run.
        id_or_row: Id of an instruction, or the number of a row of `data.jsonl`, from 1.
        longest: Cut longer instructions, answers and replies after so many characters.

    Raises:
        ValueError: There is no such instruction or row; names the closest ids.
    """
    folder = Path(folder)
    id = str(id_or_row)
    if id.isdecimal():
        id = _id_of_row(folder, int(id))
    item = _find(folder / "items.jsonl", id) or _find(folder / "basics.jsonl", id)
    if item is None:
        raise ValueError(_unknown(folder, id))
    history = _History(longest)
    history.line(0, f"{item['id']}: {_outcome(item)}")
    history.quote("seed", item.get("seed") or "(none)")
    metadata = item.get("metadata") or {}
    skills = "; ".join(metadata.get("skills") or ())
    history.block("metadata", f"use case: {metadata.get('use_case')}\nskills: {skills}")
    if "rounds" not in item:
        history.quote("round 1, basic instruction", item.get("instruction") or "")
    for number, version in enumerate(item.get("rounds") or (), start=1):
        _add_version(history, number, version)
    for reply in item.get("raw") or ():
        history.quote("a reply that could not be read", str(reply))
    for aside in _rows_of(folder / "set_aside.jsonl", "about", id):
        history.block("set aside", f"step {aside.get('step')}: {aside.get('reason')}")
        if not item.get("raw"):
            for reply in aside.get("raw") or ():
                history.quote("a reply that could not be read", str(reply))
    history.block("outcome", "\n".join([_outcome(item), *_export_of(folder, item)]))
    return history.text


class _History:
    """Lines with headings; signs that would steer the terminal are replaced."""

    def __init__(self, longest: int | None):
        self._longest = longest
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def line(self, depth: int, text: str) -> None:
        self._lines += textwrap.indent(_printable(text), "    " * depth).split("\n")

    def block(self, heading: str, text: str, depth: int = 0) -> None:
        self.line(depth, heading)
        self.line(depth + 1, text)

    def quote(self, heading: str, text: str, depth: int = 0) -> None:
        """A block of what a person or a model wrote."""
        text = text.strip() or "(empty)"
        if self._longest is not None and len(text) > self._longest:
            text = f"{text[: self._longest].rstrip()} [... {len(text)} characters]"
        self.block(heading, text, depth)


def _add_version(history: _History, number: int, version: dict[str, Any]) -> None:
    action = version.get("action")
    history.quote(f"round {number}, basic instruction" if number == 1 else f"round {number}", version["instruction"])
    if action:
        history.quote("action that led to it", action, depth=1)
    answers, truncated = version.get("answers") or {}, version.get("truncated") or {}
    for side in _SIDES:
        if side in answers:
            history.quote(f"{side} answer{' (cut off)' if truncated.get(side) else ''}", answers[side], depth=1)
    scores = version.get("scores")
    if scores:
        shown = [
            f"{name} shown first: {_pair(*own)}"
            for name, own in zip(_SIDES, version.get("orders") or (), strict=False)
        ]
        shown.append(f"mean: {_pair(scores['strong'], scores['target'])}, gap {scores['gap']:.4g}")
        history.block("scores", "\n".join(shown), depth=1)


def _pair(strong: float, target: float) -> str:
    return f"strong {strong:.4g}, target {target:.4g}"


def _outcome(item: dict[str, Any]) -> str:
    if "outcome" not in item:
        return "not finished yet; the same run goes on with it"
    if item["outcome"] == "kept":
        return f"kept in round {item.get('iteration')}, with the {item.get('winner')} model's answer"
    reason = f": {item['reason']}" if item.get("reason") else ""
    return item["outcome"].replace("_", " ") + reason


def _export_of(folder: Path, item: dict[str, Any]) -> Iterator[str]:
    """What became of a kept item at the export, if there was one."""
    if item.get("outcome") != "kept":
        return
    for number, (_, row) in enumerate(stream_rows(folder / "data.jsonl"), start=1):
        if row.get("lineage", {}).get("id") == item["id"]:
            yield f"exported as row {number} of data.jsonl"
            return
    for drop in _rows_of(folder / "export_drops.jsonl", "id", item["id"]):
        yield f"not exported: {drop['reason']}" + (f" ({drop['detail']})" if drop.get("detail") else "")
        return
    yield "not exported yet"


def _id_of_row(folder: Path, number: int) -> str:
    last = 0
    for last, (_, row) in enumerate(stream_rows(folder / "data.jsonl"), start=1):
        if last == number:
            return row["lineage"]["id"]
    if not (folder / "data.jsonl").exists():
        raise ValueError(f"{folder} holds no data.jsonl: give the folder of a run, or the id of an instruction.")
    raise ValueError(f"{folder / 'data.jsonl'} has {last} rows, no row {number}; rows are counted from 1")


def _find(path: Path, id: str) -> dict[str, Any] | None:
    return next(_rows_of(path, "id", id), None)


def _rows_of(path: Path, name: str, value: str) -> Iterator[dict[str, Any]]:
    return (row for _, row in stream_rows(path) if row.get(name) == value)


def _unknown(folder: Path, id: str) -> str:
    known = {row["id"] for name in ("items.jsonl", "basics.jsonl") for _, row in stream_rows(folder / name)}
    if not known:
        return f"{folder} holds no instructions yet; run `trl-ext codeclm run` first"
    # Comparing by edits is slow: only those that begin alike
    likely = nlargest(2000, sorted(known), key=lambda own: _alike_from_the_start(own, id))
    close = get_close_matches(id, likely, n=3, cutoff=0.0)
    return f"{folder} has no instruction {id!r}; the closest ids are {', '.join(close)}"


def _alike_from_the_start(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text.replace("\r\n", "\n"))


def _escaped(character: str) -> str:
    return character if character.isspace() and character > "\x9f" else json.dumps(character)[1:-1]
