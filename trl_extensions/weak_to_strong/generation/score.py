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
from ...core.generation.types import Prompt
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
    before, seen, total = Counter(getattr(scorer, "counts", {})), Counter(), 0.0

    def tally(row: dict[str, Any]) -> None:
        nonlocal total
        score = row["scores"].get(scorer.name)
        seen["empty"] += not completion_text(row["completion"]).strip()
        seen["scored"] += score is not None
        total += score or 0.0

    def make(chunk: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        texts = [_text(row) for row in chunk]
        asked = [place for place, text in enumerate(texts) if text.strip()]
        scores: dict[int, float | None] = {}
        failures: dict[int, list[str]] = {}
        if asked:
            ids = [chunk[place]["id"] for place in asked]
            prompts = [chunk[place].get("prompt", "") for place in asked]
            values = checked_scores(scorer, prompts, [texts[place] for place in asked], ids)
            scores = dict(zip(asked, values, strict=True))
            failures = {asked[i]: list(raw) for i, raw in getattr(scorer, "failures", {}).items()}
            if not seen["scored"] and all(value is None for value in values):
                reply = f"; it replied {failures[asked[0]][-1]!r:.120}" if asked[0] in failures else ""
                raise ValueError(
                    f"scorer {scorer.name!r} gave no score to any of the first {len(ids)} rows with text, beginning "
                    f"with row {ids[0]!r}{reply}; check what it is given and returns, or use another scorer"
                )
        for place, row in enumerate(chunk):
            scored = {**row, "scores": {**(row.get("scores") or {}), scorer.name: scores.get(place)}}
            if place in failures:
                scored["failures"] = {**(row.get("failures") or {}), scorer.name: failures[place]}
            yield place, scored

    settings = {scorer.name: scorer.settings}
    report = map_rows(
        rows, make, output, chunk_size=chunk_size, settings=settings, desc="scoring", same=("completion",), tally=tally
    )
    return ScoringReport(
        path=report.path,
        rows=report.rows,
        resumed=report.resumed,
        empty=seen["empty"],
        scored=seen["scored"],
        mean=total / seen["scored"] if seen["scored"] else None,
        counts=dict(Counter(getattr(scorer, "counts", {})) - before),
        seconds=report.seconds,
    )


def checked_scores(
    scorer: Scorer, prompts: Sequence[Prompt], completions: Sequence[str], ids: Sequence[Any]
) -> list[float | None]:
    """Ask a scorer, which may be the user's own, and check that it returns a finite number or None for each text."""
    values = scorer.score(prompts, completions)
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or len(values) != len(ids):
        number = len(values) if isinstance(values, list) else f"{type(values).__name__}, no list of"
        raise ValueError(f"scorer {scorer.name!r} returned {number} scores for {len(ids)} rows from {ids[0]!r} on")
    for value, row_id in zip(values, ids, strict=True):
        if value is not None and (isinstance(value, (bool, str, list)) or not math.isfinite(value)):
            raise ValueError(
                f"scorer {scorer.name!r} gave row {row_id!r} the score {value!r:.60}; a score is a finite number, or "
                "None for a text that cannot be scored"
            )
    return [None if value is None else float(value) for value in values]


def _text(row: dict[str, Any]) -> str:
    try:
        return completion_text(row["completion"])
    except (KeyError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"no `completion`, only {sorted(row)}"
        raise ValueError(f"row {row['id']!r}: {reason}") from None
