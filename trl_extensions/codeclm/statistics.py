"""What a run of CodecLM did, counted from the files that it left."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.generation.client import ResponseCache
from .rows import stream_rows


AGAIN = ":again"


def collect(folder: str | os.PathLike, prices: Mapping[str, tuple[float, float]] | None = None) -> dict[str, Any]:
    """Count what is in the files of a run, finished or not. They are read row by row.

    Args:
        folder: Output folder of a run.
        prices: By name of the engine: of a million tokens read, and a million written.

    Returns:
        JSON-ready. `seeds`, `metadata`, `asked` (instructions that were to be made, None if unknown), `made` (basic
        instructions), `basic_drops` (reason -> number), `items` (finished), `outcomes`, `reasons` (outcome -> reason
        -> number), `winners`, `iterations` (round -> pairs kept), `versions` (round -> versions made), `scored`
        (round -> versions scored), `gaps` (round -> `gap_bin` -> number), `gap_width` (of a bin), `answers` (model ->
        number), `truncated` (model -> answers cut off), `exported`, `use_cases` and `skills` (name -> asked, made,
        kept, exported, the largest first), `set_aside` (step -> reason -> number), `steps` (see `_count_calls`),
        `calls` (their sums).

    Raises:
        ValueError: A file is broken; names the line.
    """
    folder = Path(folder)
    coverage = _Coverage()
    found = _count_start(folder, coverage)
    aside: defaultdict[Any, dict[str, str]] = defaultdict(dict)
    for _, row in stream_rows(folder / "set_aside.jsonl"):
        aside[row.get("about")][row["step"]] = row.get("reason") or "unreadable"
    found["gap_width"] = gap_width(setting(folder, "gap_threshold"))
    found |= _count_items(folder, coverage, aside, found["gap_width"])
    found["exported"] = 0
    for _, row in stream_rows(folder / "data.jsonl"):
        found["exported"] += 1
        coverage.add(row["metadata"], "exported")
    steps = _count_calls(folder / "calls.sqlite", prices or {})
    names = ("calls", "retried", "cut_off", "tokens_read", "tokens_written", "cost")
    return found | coverage.sorted() | {"steps": steps, "calls": {n: sum(step[n] for step in steps) for n in names}}


def gap_width(threshold: Any) -> float:
    """Of bins, about a point, or the threshold where that is less: no bin lies on both sides of it."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        return 1.0
    return threshold / max(1, round(threshold))


def gap_bin(gap: float, width: float = 1.0) -> int:
    """0 for no gap; by widths, n for a gap in (n - 1, n], -n for one in [-n, -n + 1)."""
    return int(math.copysign(math.ceil(abs(gap) / width - 1e-9), gap)) if gap else 0


class _Coverage:
    """How many instructions of each use case and skill got how far."""

    def __init__(self) -> None:
        self._counts: dict[str, defaultdict[str, Counter[str]]] = {
            name: defaultdict(Counter) for name in ("use_cases", "skills")
        }

    def add(self, metadata: Mapping[str, Any], how_far: str, number: int = 1) -> None:
        self._counts["use_cases"][metadata["use_case"]][how_far] += number
        for skill in metadata["skills"]:
            self._counts["skills"][skill][how_far] += number

    def sorted(self) -> dict[str, dict[str, dict[str, int]]]:
        """By number made, then by name."""
        return {
            kind: {
                name: {how_far: own[how_far] for how_far in ("asked", "made", "kept", "exported")}
                for name, own in sorted(names.items(), key=lambda pair: (-pair[1]["made"], pair[0]))
            }
            for kind, names in self._counts.items()
        }


def _count_start(folder: Path, coverage: _Coverage) -> dict[str, Any]:
    """Metadata and basic instructions, and how many of the latter were asked for."""
    different, seeds, made = set(), set(), 0
    for _, row in stream_rows(folder / "metadata.jsonl"):
        different.add((row["use_case"], *row["skills"]))
        seeds.update(row.get("seeds") or ())
        coverage.add(row, "asked", row.get("asked") or 0)
    for _, row in stream_rows(folder / "basics.jsonl"):
        made += 1
        coverage.add(row["metadata"], "made")
    basics = read_json(folder / "basics.json")
    asked, drops = basics.get("asked"), basics.get("dropped") or {}
    return {"seeds": len(seeds), "metadata": len(different), "asked": asked, "made": made, "basic_drops": drops}


def _count_items(folder: Path, coverage: _Coverage, aside: dict[Any, dict[str, str]], width: float) -> dict[str, Any]:
    """Items, and what was set aside: items, and `aside` (what it was about -> step -> reason) but for those items that
    were finished in a later run."""
    set_aside: defaultdict[str, Counter[str]] = defaultdict(Counter)
    counts: dict[str, Counter] = {
        name: Counter() for name in ("outcomes", "winners", "iterations", "versions", "scored", "answers", "truncated")
    }
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    gaps: defaultdict[int, Counter[int]] = defaultdict(Counter)
    items = 0
    for _, item in stream_rows(folder / "items.jsonl"):
        items += 1
        aside.pop(item["id"], None)
        counts["outcomes"][item["outcome"]] += 1
        if item["outcome"] == "kept":
            counts["winners"][item["winner"]] += 1
            counts["iterations"][item["iteration"]] += 1
            coverage.add(item["metadata"], "kept")
        else:
            reason = item.get("reason") or "unknown"
            reasons[item["outcome"]][reason] += 1
            if item["outcome"] == "set_aside":  # the reason begins with the step
                step, _, why = reason.partition(": ")
                set_aside[step][why or "unknown"] += 1
        for number, version in enumerate(item.get("rounds") or (), start=1):
            counts["versions"][number] += 1
            counts["answers"].update((version.get("answers") or {}).keys())
            counts["truncated"].update(side for side, cut in (version.get("truncated") or {}).items() if cut)
            if version.get("scores"):
                counts["scored"][number] += 1
                gaps[number][gap_bin(version["scores"]["gap"], width)] += 1
    for step, why in (pair for steps in aside.values() for pair in steps.items()):
        set_aside[step][why] += 1
    by_step = {step: dict(own.most_common()) for step, own in sorted(set_aside.items())}
    by_reason = {outcome: dict(own.most_common()) for outcome, own in sorted(reasons.items())}
    by_round = {number: dict(sorted(own.items())) for number, own in sorted(gaps.items())}
    ordered = {name: dict(sorted(own.items())) for name, own in counts.items()}
    return {"items": items, "reasons": by_reason, "gaps": by_round, "set_aside": by_step} | ordered


def _count_calls(path: Path, prices: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """For each step and engine: `calls` in all, `retried` (those that asked again after an unreadable reply),
    `cut_off` (written replies ended by the token limit), `tokens_read`, `tokens_written`, `cost`."""
    steps: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in _calls_of(path):
        reply = row["reply"]
        own = steps[row["step"].removesuffix(AGAIN), row.get("engine") or ""]
        own["calls"] += 1
        own["retried"] += row["step"].endswith(AGAIN)
        own["cut_off"] += reply.get("finish_reason") == "length" and not row.get("options")
        own["tokens_read"] += reply.get("num_prompt_tokens") or 0
        own["tokens_written"] += reply.get("num_tokens") or 0
    rows = []
    for (step, engine), own in sorted(steps.items()):
        read, written = prices.get(engine, (0.0, 0.0))
        row = {name: own[name] for name in ("calls", "retried", "cut_off", "tokens_read", "tokens_written")}
        cost = (own["tokens_read"] * read + own["tokens_written"] * written) / 1e6
        rows.append({"step": step, "engine": engine} | row | {"cost": cost})
    return rows


def _calls_of(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists() or path.with_suffix(".jsonl").exists():
        with ResponseCache(path) as cache:
            yield from cache.rows()


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or one that is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def setting(folder: Path, name: str) -> Any:
    """A setting of the run, from `settings.json` or a group in it; None if it is not there."""
    settings = read_json(folder / "settings.json")
    groups = [settings, *(group for group in settings.values() if isinstance(group, dict))]
    return next((group[name] for group in groups if name in group), None)
