"""Score the answers of weak models: a file of rows in, a file of scored rows out."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.generation.sampling import completion_text
from ...core.runs.resumable import map_rows
from .scorers import Scorer


@dataclass(frozen=True)
class ScoringReport:
    """The file of scored rows; the rows in it, those that earlier runs had scored, those without text (no scorer is
    asked about them), those with a score and their mean; what went wrong in this call, by kind; and its seconds."""

    path: Path
    rows: int
    resumed: int
    empty: int
    scored: int
    mean: float | None
    counts: dict[str, int]
    seconds: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        average = "no score" if self.mean is None else f"mean {self.mean:.3g}"
        counts = {"without a score": self.rows - self.empty - self.scored} | dict(sorted(self.counts.items()))
        wrong = "".join(f", {count} {kind}" for kind, count in counts.items() if count)
        return (
            f"{self.path}: {self.rows} rows scored ({self.resumed} by an earlier run), {self.empty} of them empty; "
            f"{average}{wrong}; {self.seconds:.1f} s"
        )


def score_rows(
    rows: Sequence[dict[str, Any]], scorer: Scorer, output: str | os.PathLike, *, chunk_size: int = 64
) -> ScoringReport:
    """Score rows (`id`, `prompt`, `completion`) and append each to a JSON-lines file; resumable, see `map_rows`.

    A row keeps its columns and gets `scores` (scorer -> number, or None where there is none: an empty completion, or
    a text that the scorer could not score), beside those it has already, and `failures` (scorer -> raw answers) if a
    judge's replies could not be read. A `ValueError` names the scorer and the row where there is no score for any row,
    not one for each, or one that is no number; nothing of that chunk is written.
    """
    for row in rows:
        if scorer.name in (row.get("scores") or {}):
            raise ValueError(f"row {row['id']!r} has a score {scorer.name!r} already; give the scorer another `name`")
    before = Counter(getattr(scorer, "counts", {}))
    empty = scored = 0
    total = 0.0

    def tally(row: dict[str, Any]) -> None:
        nonlocal empty, scored, total
        score = row["scores"].get(scorer.name)
        empty += not completion_text(row["completion"]).strip()
        scored += score is not None
        total += score or 0.0

    def make(chunk: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        asked = [place for place, row in enumerate(chunk) if _text(row).strip()]
        scores: dict[int, float | None] = {}
        failures: dict[int, list[str]] = {}
        if asked:
            scores = dict(zip(asked, checked_scores(scorer, [chunk[place] for place in asked]), strict=True))
            failures = {asked[i]: list(raw) for i, raw in getattr(scorer, "failures", {}).items()}
            if not scored and all(value is None for value in scores.values()):
                reply = f"; it replied {failures[asked[0]][-1]!r:.120}" if asked[0] in failures else ""
                where = f"the first {len(asked)} rows with text, beginning with row {chunk[asked[0]]['id']!r}"
                raise ValueError(f"scorer {scorer.name!r} gave no score to any of {where}{reply}; use another scorer")
        for place, row in enumerate(chunk):
            made = {**row, "scores": {**(row.get("scores") or {}), scorer.name: scores.get(place)}}
            if place in failures:
                made["failures"] = {**(row.get("failures") or {}), scorer.name: failures[place]}
            yield place, made

    settings = {scorer.name: scorer.settings}
    report = map_rows(
        rows, make, output, chunk_size=chunk_size, settings=settings, desc="scoring", same=("completion",), tally=tally
    )
    return ScoringReport(
        path=report.path,
        rows=report.rows,
        resumed=report.resumed,
        empty=empty,
        scored=scored,
        mean=total / scored if scored else None,
        counts=dict(Counter(getattr(scorer, "counts", {})) - before),
        seconds=report.seconds,
    )


def checked_scores(scorer: Scorer, rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """Ask a scorer, which may be the user's own, and check that it returns a finite number or None for each row."""
    values: Any = scorer.score([row.get("prompt", "") for row in rows], [_text(row) for row in rows])
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or len(values) != len(rows):
        number = len(values) if isinstance(values, list) else f"{type(values).__name__}, no list of"
        raise ValueError(
            f"scorer {scorer.name!r} returned {number} scores for {len(rows)} rows from {rows[0]['id']!r}"
        )
    for value, row in zip(values, rows, strict=True):
        if value is not None and (isinstance(value, (bool, str, list)) or not math.isfinite(value)):
            found = f"gave row {row['id']!r} the score {value!r:.60}"
            raise ValueError(f"scorer {scorer.name!r} {found}; give a finite number, or None for what has no score")
    return [None if value is None else float(value) for value in values]


def _text(row: dict[str, Any]) -> str:
    if "completion" not in row:
        raise ValueError(f"row {row['id']!r}: no `completion`, only {sorted(row)}")
    try:
        return completion_text(row["completion"])
    except ValueError as error:
        raise ValueError(f"row {row['id']!r}: {error}") from None
