"""The report of a run of CodecLM: from seeds to pairs, what was dropped and why, and what it cost."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.runs.report import RunReport
from ..core.stats import wilson
from .figures import draw_coverage, draw_gaps
from .lineage import describe
from .rows import stream_rows
from .statistics import collect, read_json, setting


_THRESHOLD = 3.0  # as published, for folders whose settings are gone
_MOST_ROWS = 25
_MOST_LISTED = 4
_LONGEST = 1500


def write_codeclm_report(
    folder: str | os.PathLike,
    *,
    prices: Mapping[str, tuple[float, float]] | None = None,
    stopped: str | None = None,
    samples: int = 3,
) -> Path:
    """Write `report.md`, `report.json`, `gaps.png` and `coverage.png` from the files of a run, finished or not.

    Intervals are 95 %, Wilson's.

    Args:
        folder: Output folder of the run.
        prices: By name of the engine: of a million tokens read, and a million written.
        stopped: Why the run ended early, such as a budget that is spent; None if it did not.
        samples: Pairs shown with their whole history.

    Returns:
        Path of `report.md`.
    """
    folder = Path(folder)
    counts = collect(folder, prices)
    exported, comparison = read_json(folder / "export.json"), read_json(folder / "comparison.json")
    held_out = read_json(folder / "held_out.json")
    report = RunReport("CodecLM: from seeds to pairs")
    report.data = counts | {"export": exported, "held_out": held_out, "comparison": comparison, "stopped": stopped}
    report.text(verdict(counts, exported, stopped))
    if counts["gaps"] and setting(folder, "strong") and setting(folder, "strong") == setting(folder, "target"):
        report.text(
            "The strong model and the target are the same one: a gap lies between two samples of one model, and "
            "before training it ties with itself."
        )
    _add_training(report, held_out, comparison)
    _add_funnel(report, counts, exported)
    _add_rounds(report, counts, folder)
    _add_drops(report, counts, exported)
    _add_parsing(report, counts)
    _add_calls(report, counts)
    _add_coverage(report, counts, folder)
    _add_samples(report, counts, folder, samples)
    return report.write(folder)


def verdict(counts: Mapping[str, Any], exported: Mapping[str, Any], stopped: str | None = None) -> str:
    """The run in a few sentences."""
    outcomes, calls = counts["outcomes"], counts["calls"]
    start = f"{_count(counts['seeds'], 'seed')} and " if counts["seeds"] else ""
    made, kept = _count(counts["made"], "basic instruction"), _count(outcomes.get("kept", 0), "pair")
    sentences = [
        f"From {start}{counts['metadata'] or len(counts['use_cases'])} metadata came {made}, of which the run kept "
        f"{kept} of instruction and answer"
        + (
            f"; {counts['exported']} of them {_be(counts['exported'], 'are')} in the data."
            if exported
            else "; they are not exported yet."
        )
    ]
    lost = [
        f"{number} {_be(number, 'were')} {outcome.replace('_', ' ')} ({_listed(counts['reasons'].get(outcome, {}))})"
        for outcome in ("dropped", "set_aside")
        if (number := outcomes.get(outcome))
    ]
    if lost:
        sentences.append(f"Of the others, {' and '.join(lost)}.")
    if exported.get("reasons"):
        sentences.append(f"The export left out {_listed(exported['reasons'])}.")
    if missing := max(0, counts["made"] - counts["items"]):
        sentences.append(
            f"The run is not complete: {_count(missing, 'instruction')} {_be(missing, 'are')} still to be finished."
        )
    if stopped:
        sentences.append(f"It was stopped: {stopped.rstrip('.')}; the same command goes on from here.")
    cost = f", at a cost of {calls['cost']:.2f}" if calls["cost"] else ""
    sentences.append(
        f"It took {_count(calls['calls'], 'call')} of models, which read {calls['tokens_read']:,} tokens and wrote "
        f"{calls['tokens_written']:,}{cost}."
    )
    return " ".join(sentences)


def _add_training(report: RunReport, held_out: Mapping[str, Any], comparison: Mapping[str, Any]) -> None:
    """The target before and after training, as far as it was measured."""
    parts = {name: own for name, own in comparison.items() if isinstance(own, Mapping)}
    if not held_out and not parts:
        return
    report.heading("The target before and after training")
    if held_out:
        before, after, change = (held_out[name]["nats_per_token"] for name in ("before", "after", "change"))
        interval = held_out["change"]["interval"]
        report.text(
            f"Negative log-likelihood of {_count(held_out['rows'], 'pair')} that training did not see, in nats per "
            f"token, lower is closer to them: {before:.3f} before, {after:.3f} after, a change of {change:+.3f}"
            + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})." if interval else ".")
        )
    _add_comparison(report, comparison, parts)


def _add_comparison(report: RunReport, comparison: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """What the judge says; `parts` are the tables in the comparison."""
    before, after = (parts.get(name, {}) for name in ("before", "after"))
    if _is_number(before.get("crr")) and _is_number(after.get("crr")):
        prompts = f" on {comparison['prompts']} prompts" if _is_number(comparison.get("prompts")) else ""
        report.text(
            f"Capacity recovery ratio, (wins + ties) / all against the strong model{prompts}: {before['crr']:.1%} "
            f"before and {after['crr']:.1%} after."
        )
    counted = ("contradictions", "judged", "equal")
    contradicted, judged, equal = (sum(own.get(name) or 0 for own in (before, after)) for name in counted)
    if contradicted:
        report.text(
            f"In {contradicted} of {judged - equal} judgments of answers that differ, the judge preferred the other "
            "one when they changed places. These count as ties: the more there are, the less the ratio says."
        )
    margin = parts.get("after_vs_before", {}).get("margin")
    if margin:
        low, high = margin["interval"] or (None, None)
        between = "" if low is None else f" (95 %: {low:+.4f} to {high:+.4f})"
        report.text(
            f"By scores averaged over both orders, the trained target is {margin['mean']:+.4f}{between} ahead of what "
            f"it was, and ahead on {margin['positive']} of {parts['after_vs_before']['judged']} prompts."
        )
    names = list(dict.fromkeys(name for own in parts.values() for name in own))
    shown = [name for name in names if any(_is_shown(own.get(name)) for own in parts.values())]
    rows = [
        [name.replace("_", " "), *(_shown(own.get(part)) for part in shown)]
        for name, own in parts.items()
        if any(_is_shown(own.get(part)) for part in shown)
    ]
    if rows:
        report.table(["", *(name.replace("_", " ") for name in shown)], rows)


def _add_funnel(report: RunReport, counts: Mapping[str, Any], exported: Mapping[str, Any]) -> None:
    report.heading("From seeds to pairs")
    steps = [
        ("seeds that instructions came from", counts["seeds"] or None),
        ("metadata", counts["metadata"] or None),
        ("basic instructions asked for", counts["asked"]),
        ("basic instructions made", counts["made"]),
        ("finished", counts["items"]),
        *((name.replace("_", " "), counts["outcomes"].get(name, 0)) for name in ("dropped", "set_aside", "kept")),
        ("pairs in the data", counts["exported"] if exported else None),
    ]
    rows = [[name, number, _share(number, counts["made"]) if i > 3 else ""] for i, (name, number) in enumerate(steps)]
    report.table(["step", "number", "of those made"], [row for row in rows if row[1] is not None])
    answers = [
        f"{name}: {counts['winners'].get(name, 0)} of the pairs, {_share(counts['truncated'].get(name, 0), total)} of "
        f"{total} answers cut off"
        for name, total in counts["answers"].items()
    ]
    if answers:
        report.text(f"Whose answer was kept, and whose were cut off by the token limit: {'; '.join(answers)}.")


def _add_rounds(report: RunReport, counts: Mapping[str, Any], folder: Path) -> None:
    kept = sum(counts["iterations"].values())
    if not counts["versions"]:
        return
    report.heading("Pairs by round")
    rows = [
        [number, versions, counts["scored"].get(number, 0), counts["iterations"].get(number, 0),
         _share(counts["iterations"].get(number, 0), versions), _share(counts["iterations"].get(number, 0), kept)]
        for number, versions in counts["versions"].items()
    ]  # fmt: skip
    report.table(["round", "versions", "scored", "kept", "kept of the versions", "of all pairs"], rows)
    report.text("Round 1 is the basic instruction; shares with 95 % intervals.")
    if counts["gaps"]:
        found = setting(folder, "gap_threshold")
        threshold = found if _is_number(found) else _THRESHOLD
        means = " as expected under the scorer's probabilities" if setting(folder, "scoring") == "logprobs" else ""
        report.text(
            f"Kept is the first version whose two answers have scores, from 1 to 10{means}, more than {threshold:g} "
            "apart."
        )
        draw_gaps(counts["gaps"], threshold, folder / "gaps.png", counts["gap_width"])
        report.figure("gaps.png", "Gaps between the scores of the two answers, all versions that were scored.")


def _add_drops(report: RunReport, counts: Mapping[str, Any], exported: Mapping[str, Any]) -> None:
    rows = [["basic instruction", reason, number] for reason, number in counts["basic_drops"].items()]
    for outcome, reasons in counts["reasons"].items():
        rows += [[outcome.replace("_", " "), reason, number] for reason, number in reasons.items()]
    rows += [["at the export", reason, number] for reason, number in (exported.get("reasons") or {}).items()]
    if rows:
        rows = sorted(rows, key=lambda row: -row[2])[:_MOST_ROWS]
        report.heading("What was dropped, and why")
        report.table(["where", "reason", "number"], rows)
    if exported.get("contaminated"):
        found = "; ".join(f"{number} by {file}" for file, number in exported["contaminated"].items())
        report.text(f"Contaminated at the export: {found}. The rows are in `export_drops.jsonl`.")


def _add_parsing(report: RunReport, counts: Mapping[str, Any]) -> None:
    rows = []
    for step in dict.fromkeys([*(own["step"] for own in counts["steps"]), *counts["set_aside"]]):
        own = [entry for entry in counts["steps"] if entry["step"] == step]
        retried = sum(entry["retried"] for entry in own)
        first = sum(entry["calls"] for entry in own) - retried
        aside = sum(counts["set_aside"].get(step, {}).values())
        why = _listed(counts["set_aside"].get(step, {}))
        rows.append([step, first, _share(max(0, first - retried), first), retried, aside, why])
    if rows:
        report.heading("Replies that could be read")
        report.table(["step", "asked", "readable at once", "asked again", "set aside", "why"], rows)


def _add_calls(report: RunReport, counts: Mapping[str, Any]) -> None:
    if not counts["steps"]:
        return
    report.heading("Calls and tokens")
    names = ("calls", "cut_off", "tokens_read", "tokens_written")
    with_cost = bool(counts["calls"]["cost"])
    header = ["step", "engine", "calls", "cut off", "tokens read", "tokens written", *(["cost"] if with_cost else [])]
    rows = [
        [own["step"], own["engine"], *(own[name] for name in names), *([own["cost"]] if with_cost else [])]
        for own in [*counts["steps"], counts["calls"] | {"step": "all", "engine": ""}]
    ]
    report.table(header, rows)


def _add_coverage(report: RunReport, counts: Mapping[str, Any], folder: Path) -> None:
    if not counts["use_cases"]:
        return
    report.heading("Coverage of the metadata")
    draw_coverage(counts["use_cases"], folder / "coverage.png")
    covered = {kind: sum(own["kept"] > 0 for own in counts[kind].values()) for kind in ("use_cases", "skills")}
    report.text(
        f"At least one pair was kept for {covered['use_cases']} of {_count(len(counts['use_cases']), 'use case')} and "
        f"for {covered['skills']} of {_count(len(counts['skills']), 'skill')}."
    )
    report.figure("coverage.png", "Basic instructions of each use case, and how many became pairs.")
    for kind, title in (("use_cases", "use case"), ("skills", "skill")):
        names = counts[kind]
        how_far = ("asked", "made", "kept", "exported") if any(own["asked"] for own in names.values()) else (
            "made", "kept", "exported"
        )  # fmt: skip
        rows = [[name, *(own[part] for part in how_far)] for name, own in list(names.items())[:_MOST_ROWS]]
        report.table([title, *how_far], rows)
        if len(names) > _MOST_ROWS:
            report.text(f"{len(names) - _MOST_ROWS} more are in `report.json`.")


def _add_samples(report: RunReport, counts: Mapping[str, Any], folder: Path, samples: int) -> None:
    """Pairs from all over the data, from seed to answer."""
    total = counts["exported"]
    wanted = {(2 * i + 1) * total // (2 * samples) for i in range(samples)} if total else set()
    ids = [
        row["lineage"]["id"] for number, (_, row) in enumerate(stream_rows(folder / "data.jsonl")) if number in wanted
    ]
    if ids:
        report.heading("Pairs and how they came about")
    for id in ids:
        text = describe(folder, id, longest=_LONGEST).rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        report.text(f"{fence}text\n{text}\n{fence}")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _be(number: int, plural: str) -> str:
    return {"are": "is", "were": "was"}[plural] if number == 1 else plural


def _listed(numbers: Mapping[str, int]) -> str:
    """The first few."""
    first, rest = list(numbers.items())[:_MOST_LISTED], list(numbers.values())[_MOST_LISTED:]
    parts = [f"{number} {reason}" for reason, number in first]
    return ", ".join([*parts, f"{sum(rest)} for other reasons"] if rest else parts)


def _share(part: int | None, whole: int) -> str:
    if not whole or part is None or part > whole:
        return "n/a"
    low, high = wilson(part, whole)
    return f"{part / whole:.1%} ({100 * low:.0f} to {100 * high:.0f})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_shown(value: Any) -> bool:
    return _is_number(value) or (
        isinstance(value, (list, tuple)) and 0 < len(value) <= 2 and all(map(_is_number, value))
    )


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if not _is_number(value) else str(value)
