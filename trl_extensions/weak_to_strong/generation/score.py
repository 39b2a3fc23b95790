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
    """The file of scored rows; the rows in it, those that earlier runs had scored, and those without text, which no
    scorer is asked about; rows with a score, those with text and without one, the mean score; what went wrong in this
    call, by kind; and its seconds."""

    path: Path
    rows: int
    resumed: int
    empty: int
    scored: int
    unscored: int
    mean: float | None
    counts: dict[str, int]
    seconds: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        earlier = f" ({self.resumed} by an earlier run)" if self.resumed else ""
        average = "no score" if self.mean is None else f"mean {self.mean:.3g}"
        missing = f", {self.unscored} without a score" if self.unscored else ""
        wrong = "".join(f", {count} {kind}" for kind, count in sorted(self.counts.items()))
        return (
            f"{self.path}: {self.rows} rows scored{earlier}, {self.empty} of them empty; {average}{missing}{wrong}; "
            f"{self.seconds:.1f} s"
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
    _check_rows(rows, scorer.name)
    before = Counter(getattr(scorer, "counts", {}))
    seen: Counter[str] = Counter()
    total = 0.0

    def tally(row: dict[str, Any]) -> None:
        nonlocal total
        score = row["scores"].get(scorer.name)
        seen["empty"] += not completion_text(row["completion"]).strip()
        seen["scored"] += score is not None
        total += score or 0.0

    def make(chunk: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        asked = [place for place, row in enumerate(chunk) if completion_text(row["completion"]).strip()]
        prompts = [chunk[place].get("prompt", "") for place in asked]
        texts = [completion_text(chunk[place]["completion"]) for place in asked]
        ids = [chunk[place]["id"] for place in asked]
        values = checked_scores(scorer, prompts, texts, ids) if asked else []
        failed = getattr(scorer, "failures", {}) if asked else {}
        if asked and not seen["scored"] and all(value is None for value in values):
            reply = f"; it replied {list(failed[0])[-1]!r:.120}" if failed.get(0) else ""
            raise ValueError(
                f"scorer {scorer.name!r} gave no score to any of the first {len(ids)} rows with text, beginning with "
                f"row {ids[0]!r}{reply}; check what it is given and returns, or use another scorer"
            )
        scores, replies = dict(zip(asked, values, strict=True)), {asked[i]: list(raw) for i, raw in failed.items()}
        for place, row in enumerate(chunk):
            scored = {**row, "scores": {**(row.get("scores") or {}), scorer.name: scores.get(place)}}
            if place in replies:
                scored["failures"] = {**(row.get("failures") or {}), scorer.name: replies[place]}
            yield place, scored

    report = map_rows(
        rows,
        make,
        output,
        chunk_size=chunk_size,
        settings={scorer.name: scorer.settings},
        desc="scoring",
        same=("completion",),
        tally=tally,
    )
    return ScoringReport(
        path=report.path,
        rows=report.rows,
        resumed=report.resumed,
        empty=seen["empty"],
        scored=seen["scored"],
        unscored=report.rows - seen["empty"] - seen["scored"],
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
    where = f"scorer {scorer.name!r}"
    asked = f"for {len(ids)} rows, the first of them {ids[0]!r}; it must return a number or None for each"
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{where} returned {type(values).__name__}, no list, {asked}")
    if len(values) != len(ids):
        raise ValueError(f"{where} returned {len(values)} scores {asked}")
    return [_as_number(where, value, row_id) for value, row_id in zip(values, ids, strict=True)]


def _as_number(where: str, value: Any, row_id: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{where} gave row {row_id!r} the score {value!r:.60}; a score is a finite number, or None for a text "
            "that cannot be scored"
        )
    return number


def _check_rows(rows: Sequence[dict[str, Any]], name: str) -> None:
    for index, row in enumerate(rows):
        where = f"row {row.get('id', index)!r}"
        if "completion" not in row:
            raise ValueError(f"{where} has no `completion`, only {sorted(row)}; name the column of the answer so")
        try:
            completion_text(row["completion"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if name in (row.get("scores") or {}):
            raise ValueError(f"{where} has a score {name!r} already; give the scorer another `name`")
