"""Score the answers of weak models with one or several scorers: a file of rows in, a file of scored rows out."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.generation.sampling import completion_text
from ...core.generation.types import Prompt
from ...core.runs.jsonl import JsonlWriter, read_jsonl
from ...core.runs.run import check_resume
from .scorers import Scorer


@dataclass(frozen=True)
class ScoringReport:
    """What a call of `score_rows` did.

    Args:
        path (`Path`): The file of scored rows.
        rows (`int`): Rows in the file, those of earlier runs included.
        resumed (`int`): Rows that earlier runs had scored.
        empty (`int`): Rows without text, which no scorer is asked about.
        scored (`dict[str, int]`): Scorer -> rows with a score.
        unscored (`dict[str, int]`): Scorer -> rows with text and without a score.
        means (`dict[str, float | None]`): Scorer -> mean score; None if it scored nothing.
        counts (`dict[str, dict[str, int]]`): Scorer -> what went wrong in this call, by kind.
        seconds (`float`): Wall time of this call.
    """

    path: Path
    rows: int
    resumed: int
    empty: int
    scored: dict[str, int]
    unscored: dict[str, int]
    means: dict[str, float | None]
    counts: dict[str, dict[str, int]]
    seconds: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        earlier = f" ({self.resumed} by an earlier run)" if self.resumed else ""
        parts = [f"{self.path}: {self.rows} rows scored{earlier}, {self.empty} of them empty"]
        for name, mean in self.means.items():
            average = "no score" if mean is None else f"mean {mean:.3g}"
            missing = f", {self.unscored[name]} without a score" if self.unscored[name] else ""
            wrong = "".join(f", {count} {kind}" for kind, count in sorted(self.counts.get(name, {}).items()))
            parts.append(f"{name}: {average}{missing}{wrong}")
        return "; ".join([*parts, f"{self.seconds:.1f} s"])


def score_rows(
    rows: Sequence[dict[str, Any]],
    scorers: Sequence[Scorer],
    output: str | os.PathLike,
    *,
    chunk_size: int = 64,
) -> ScoringReport:
    """Score rows with every scorer and append each to a JSON-lines file.

    A row keeps its columns and gets `scores` (scorer -> number, or None where there is none: an empty completion, or
    a text that the scorer could not score), beside those it has already, and `failures` (scorer -> raw answers) if a
    judge's replies could not be read. The scorers' settings are written to `<output stem>.settings.json`, and all rows
    of a chunk are on disk before the next one begins: running again with the same settings goes on where an earlier
    run was stopped.

    Args:
        rows: Rows with `id` (distinct), `completion` (text, or messages that end with an assistant's) and `prompt`.
        scorers: What scores.
        output: The `.jsonl` file to append to.
        chunk_size: Rows handed to each scorer at once.

    Raises:
        ValueError: A row that cannot be used (the message names it), two scorers of one name, an `output` made with
            other settings or rows, or a scorer that gives no score, not one for each row, or nan: the message names
            scorer and row, and nothing of that chunk is written.
    """
    start, output = time.perf_counter(), Path(output)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}; give at least 1")
    _check_scorers(scorers)
    texts = _read_texts(rows, [scorer.name for scorer in scorers])
    check_resume(
        output.with_name(output.stem + ".settings.json"),
        {scorer.name: scorer.settings for scorer in scorers},
        made=str(output),
        started=output.is_file() and output.stat().st_size > 0,
    )
    before = {scorer.name: Counter(getattr(scorer, "counts", {})) for scorer in scorers}
    tally = _Tally([scorer.name for scorer in scorers])
    with JsonlWriter(output) as writer:
        _count_done(output, texts, tally)
        resumed = tally.rows
        _score_missing([row for row in rows if row["id"] not in tally.done], texts, scorers, writer, tally, chunk_size)
    counts = {s.name: dict(new) for s in scorers if (new := Counter(getattr(s, "counts", {})) - before[s.name])}
    return ScoringReport(
        path=output,
        rows=tally.rows,
        resumed=resumed,
        empty=tally.empty,
        scored=dict(tally.scored),
        unscored={name: tally.rows - tally.empty - number for name, number in tally.scored.items()},
        means={name: tally.sums[name] / number if number else None for name, number in tally.scored.items()},
        counts=counts,
        seconds=time.perf_counter() - start,
    )


def checked_scores(
    scorer: Scorer, prompts: Sequence[Prompt], completions: Sequence[str], ids: Sequence[Any]
) -> list[float | None]:
    """Ask a scorer, which may be the user's own, and check what it returns.

    Args:
        scorer: What scores.
        prompts, completions: See `Scorer.score`.
        ids: What to call the texts in messages.

    Returns:
        A finite float or `None` for each text.

    Raises:
        ValueError: Not one number or `None` for each text, or nan or an infinity; the message names scorer and row.
    """
    values = scorer.score(prompts, completions)
    values = values.tolist() if hasattr(values, "tolist") else values
    where = f"scorer {scorer.name!r}"
    asked = f"for {len(ids)} rows, the first of them {ids[0]!r}; it must return a number or None for each"
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{where} returned {type(values).__name__}, no list, {asked}")
    if len(values) != len(ids):
        raise ValueError(f"{where} returned {len(values)} scores {asked}")
    return [_as_number(where, value, row_id) for value, row_id in zip(values, ids, strict=True)]


class _Tally:
    """What the file holds."""

    def __init__(self, names: Sequence[str]):
        self.rows = self.empty = 0
        self.done: set[Any] = set()
        self.scored = dict.fromkeys(names, 0)
        self.sums = dict.fromkeys(names, 0.0)

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.done.add(row["id"])
        self.empty += not completion_text(row["completion"]).strip()
        for name in self.scored:
            value = row["scores"].get(name)
            if value is not None:
                self.scored[name] += 1
                self.sums[name] += value


def _score_missing(
    rows: list[dict[str, Any]],
    texts: dict[Any, str],
    scorers: Sequence[Scorer],
    writer: JsonlWriter,
    tally: _Tally,
    chunk_size: int,
) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=tally.rows + len(rows), initial=tally.rows, desc="scoring", unit="row") as bar:
        for first in range(0, len(rows), chunk_size):
            chunk = rows[first : first + chunk_size]
            for row in _score_chunk(chunk, texts, scorers, tally.scored):
                writer.append(row)
                tally.add(row)
            bar.update(len(chunk))


def _score_chunk(
    chunk: list[dict[str, Any]], texts: dict[Any, str], scorers: Sequence[Scorer], scored: dict[str, int]
) -> list[dict[str, Any]]:
    asked = [row for row in chunk if texts[row["id"]].strip()]
    ids = [row["id"] for row in asked]
    scores: dict[Any, dict[str, float | None]] = {row["id"]: {} for row in chunk}
    failures: dict[Any, dict[str, list[str]]] = {}
    for scorer in scorers:
        prompts, completions = [row.get("prompt") or "" for row in asked], [texts[key] for key in ids]
        values = checked_scores(scorer, prompts, completions, ids) if asked else []
        failed = dict(getattr(scorer, "failures", {})) if asked else {}
        if asked and not scored[scorer.name] and all(value is None for value in values):
            raise ValueError(_nothing(scorer.name, ids, failed))
        for row in chunk:
            scores[row["id"]][scorer.name] = None
        for row_id, value in zip(ids, values, strict=True):
            scores[row_id][scorer.name] = value
        for place, answers in failed.items():
            failures.setdefault(ids[place], {})[scorer.name] = list(answers)
    return [
        {**row, "scores": {**(row.get("scores") or {}), **scores[row["id"]]}}
        | ({"failures": {**(row.get("failures") or {}), **failures[row["id"]]}} if row["id"] in failures else {})
        for row in chunk
    ]


def _nothing(name: str, ids: Sequence[Any], failed: dict[int, Sequence[str]]) -> str:
    reply = f"; it replied {list(failed[0])[-1]!r:.120}" if failed.get(0) else ""
    return (
        f"scorer {name!r} gave no score to any of the first {len(ids)} rows with text, beginning with row "
        f"{ids[0]!r}{reply}; check what it is given and returns, or use another scorer"
    )


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


def _check_scorers(scorers: Sequence[Scorer]) -> None:
    if not scorers:
        raise ValueError("no scorer: give at least one")
    for name, count in Counter(scorer.name for scorer in scorers).items():
        if count > 1:
            raise ValueError(f"{count} scorers are called {name!r}; give `name` another value in all but one")


def _read_texts(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[Any, str]:
    """Id -> text of the completion."""
    texts: dict[Any, str] = {}
    for index, row in enumerate(rows):
        key = row.get("id")
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ValueError(f"row {index} has no `id` that is a text or an integer (got {key!r}); give each its own")
        if key in texts:
            raise ValueError(f"row {index} has the `id` {key!r} of an earlier row; give each row its own")
        if "completion" not in row:
            raise ValueError(f"row {key!r} has no `completion`, only {sorted(row)}; name the column of the answer so")
        try:
            texts[key] = completion_text(row["completion"])
        except ValueError as error:
            raise ValueError(f"row {key!r}: {error}") from None
        for name in names:
            if name in (row.get("scores") or {}):
                raise ValueError(f"row {key!r} has a score {name!r} already; give the scorer another `name`")
    if not texts:
        raise ValueError("no rows to score; check where they come from")
    return texts


def _count_done(output: Path, texts: dict[Any, str], tally: _Tally) -> None:
    for row in read_jsonl(output, required=("id", "completion", "scores")):
        if row["id"] not in texts:
            problem = "is not among the rows given"
        # Lone surrogates cannot be written: the file has `?` for them
        elif completion_text(row["completion"]) != texts[row["id"]].encode("utf-8", errors="replace").decode("utf-8"):
            problem = "has another completion than the row given"
        else:
            tally.add(row)
            continue
        raise ValueError(
            f"{output}: its row {row['id']!r} {problem}; give the same rows, or more, to resume, or use another output"
        )
