"""The report of a run of CodecLM, finished or not, counted from its files: pairs, what was dropped, what it cost."""

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.generation.client import ResponseCache
from ..core.runs.plots import BEFORE, COLOURS, panels, save
from ..core.runs.report import NOT_TRAINED, RunReport, first_true, loss_stayed, quoted
from ..core.stats import wilson
from .export import describe, stream_rows


AGAIN = ":again"
_HOW_FAR = ("asked", "made", "kept", "exported")
_THRESHOLD = 3.0  # as published, for folders whose settings are gone
_MOST_ROWS, _MOST_LISTED = 25, 4
_SAMPLES, _LONGEST = 3, 1500


def write_codeclm_report(
    folder: str | os.PathLike, *, prices: Mapping[str, tuple[float, float]] | None = None, stopped: str | None = None
) -> Path:
    """Write `report.md` (its path is returned), `report.json`, `gaps.png` and `coverage.png` of a run's folder.

    `prices` are those of a million tokens read and a million written, by name of the engine; `stopped` is why the run
    ended early, if it did. Intervals are 95 %, Wilson's.
    """
    folder, counts = Path(folder), collect(folder, prices)
    names = ("settings", "export", "held_out", "comparison")
    settings, exported, held_out, comparison = (_read_json(folder / f"{name}.json") for name in names)
    report = RunReport("CodecLM: from seeds to pairs")
    report.data = counts | {"export": exported, "held_out": held_out, "comparison": comparison, "stopped": stopped}
    log = _read_json(folder / "train" / "trainer_state.json").get("log_history", [])
    found = verdict(counts, held_out, comparison, log, stopped)
    report.verdict(*found, in_numbers(counts, exported, stopped))
    if counts["gaps"] and settings.get("strong") and settings["strong"] == settings.get("target"):
        report.text(
            "The strong model and the target are the same one: a gap lies between two samples of one model, and "
            "before training it ties with itself."
        )
    if held_out or comparison:
        report.heading("The target before and after training")
        if held_out:
            before, after, change = (held_out[name]["nats_per_token"] for name in ("before", "after", "change"))
            report.text(
                f"Negative log-likelihood of pairs that training did not see ({held_out['rows']}), in nats per token: "
                f"{before:.3f} before, {after:.3f} after, a change of {change:+.3f}"
                f"{_between(held_out['change']['interval'], 3)}."
            )
        _add_comparison(report, comparison)
    for heading, header, rows, note in _tables(counts, exported):
        if rows:
            report.heading(heading)
            report.table(header, rows)
            if note:
                report.text(note)
    if counts["gaps"]:
        threshold = settings.get("gap_threshold", _THRESHOLD)
        means = " as expected under the scorer's probabilities" if settings.get("scoring") == "logprobs" else ""
        draw_gaps(counts["gaps"], threshold, folder / "gaps.png", counts["gap_width"])
        report.figure("gaps.png", "Gaps between the scores of the two answers, all versions that were scored.")
        kept = f"the first version whose answers have scores, from 1 to 10{means}, more than {threshold:g} apart"
        report.text(f"Kept: {kept}.")
    if counts["use_cases"]:
        draw_coverage(counts["use_cases"], folder / "coverage.png")
        report.figure("coverage.png", "Basic instructions of each use case, and how many became pairs.")
    _add_samples(report, counts["exported"], folder)
    return report.write(folder)


def collect(folder: str | os.PathLike, prices: Mapping[str, tuple[float, float]] | None = None) -> dict[str, Any]:
    """Count what is in the files of a run, as `report.json` holds it."""
    folder = Path(folder)
    counts: defaultdict[str, Counter[Any]] = defaultdict(Counter)
    reasons, set_aside, gaps = (defaultdict[Any, Counter[Any]](Counter) for _ in range(3))
    coverage: dict[str, dict[str, dict[str, int]]] = {"use_cases": {}, "skills": {}}

    def cover(metadata: Mapping[str, Any], how_far: str, number: int = 1) -> None:
        counts["rows"][how_far] += number
        names = [("use_cases", metadata["use_case"]), *(("skills", skill) for skill in metadata["skills"])]
        for kind, name in names:
            coverage[kind].setdefault(name, dict.fromkeys(_HOW_FAR, 0))[how_far] += number

    different, seeds = set[Any](), set[str]()
    for _, row in stream_rows(folder / "metadata.jsonl"):
        different.add((row["use_case"], *row["skills"]))
        seeds.update(row.get("seeds") or ())
        cover(row, "asked", row.get("asked") or 0)
    for name, how_far in (("basics", "made"), ("data", "exported")):
        for _, row in stream_rows(folder / f"{name}.jsonl"):
            cover(row["metadata"], how_far)
    # What was about an item that was finished in a later run counts no more
    aside: defaultdict[Any, dict[str, str]] = defaultdict(dict)
    for _, row in stream_rows(folder / "set_aside.jsonl"):
        aside[row.get("about")][row["step"]] = row.get("reason") or "unreadable"
    width = gap_width(_read_json(folder / "settings.json").get("gap_threshold"))
    for _, item in stream_rows(folder / "items.jsonl"):
        aside.pop(item["id"], None)
        counts["outcomes"][item["outcome"]] += 1
        if item["outcome"] == "kept":
            counts["winners"][item["winner"]] += 1
            counts["iterations"][item["iteration"]] += 1
            cover(item["metadata"], "kept")
        else:
            reason = item.get("reason") or "unknown"
            reasons[item["outcome"]][reason] += 1
            if item["outcome"] == "set_aside":  # the reason begins with the step
                step, _, why = reason.partition(": ")
                set_aside[step][why or "unknown"] += 1
        for number, version in enumerate(item.get("rounds") or (), start=1):
            counts["versions"][number] += 1
            counts["answers"].update((version.get("answers") or {}).keys())
            counts["refused"].update(own["reason"] for own in version.get("refused") or ())
            counts["truncated"].update(side for side, cut in (version.get("truncated") or {}).items() if cut)
            if version.get("scores"):
                counts["scored"][number] += 1
                gaps[number][gap_bin(version["scores"]["gap"], width)] += 1
    for step, why in (pair for own in aside.values() for pair in own.items()):
        set_aside[step][why] += 1
    basics = _read_json(folder / "basics.json")
    steps = count_calls(folder / "calls.sqlite", prices)
    sums = ("calls", "retried", "cut_off", "tokens_read", "tokens_written", "cost")
    names = ("outcomes", "winners", "iterations", "versions", "scored", "answers", "truncated", "refused")
    return {
        "seeds": len(seeds),
        "metadata": len(different),
        "asked": basics.get("asked"),
        "made": counts["rows"]["made"],
        "basic_drops": basics.get("dropped") or {},
        "items": counts["outcomes"].total(),
        "reasons": {name: dict(own.most_common()) for name, own in sorted(reasons.items())},
        **{name: dict(sorted(counts[name].items())) for name in names},
        "gaps": {number: dict(sorted(own.items())) for number, own in sorted(gaps.items())},
        "gap_width": width,
        "exported": counts["rows"]["exported"],
        **{kind: dict(sorted(own.items(), key=lambda n: (-n[1]["made"], n[0]))) for kind, own in coverage.items()},
        "set_aside": {step: dict(own.most_common()) for step, own in sorted(set_aside.items())},
        "steps": steps,
        "calls": {name: sum(step[name] for step in steps) for name in sums},
    }


def gap_width(threshold: Any) -> float:
    """Of bins, about a point, or the threshold where that is less: no bin lies on both sides of it."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        return 1.0
    return threshold / max(1, round(threshold))


def gap_bin(gap: float, width: float = 1.0) -> int:
    """0 for no gap; by widths, n for a gap in (n - 1, n], -n for one in [-n, -n + 1)."""
    return int(math.copysign(math.ceil(abs(gap) / width - 1e-9), gap)) if gap else 0


def count_calls(path: Path, prices: Mapping[str, tuple[float, float]] | None = None) -> list[dict[str, Any]]:
    """Of each step and engine: calls in all, those after an unreadable reply, cut-off ones, tokens and cost."""
    if not path.exists() and not path.with_suffix(".jsonl").exists():
        return []
    names = ("calls", "retried", "cut_off", "tokens_read", "tokens_written")
    steps: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    with ResponseCache(path) as cache:
        for row in cache.rows():
            reply, own = row["reply"], steps[row["step"].removesuffix(AGAIN), row["engine"]]
            own["calls"] += 1
            own["retried"] += row["step"].endswith(AGAIN)
            own["cut_off"] += reply.get("finish_reason") == "length" and not row.get("options")
            own["tokens_read"] += reply.get("num_prompt_tokens", 0)
            own["tokens_written"] += reply.get("num_tokens", 0)
    rows = []
    for (step, engine), own in sorted(steps.items()):
        read, written = (prices or {}).get(engine, (0.0, 0.0))
        cost = (own["tokens_read"] * read + own["tokens_written"] * written) / 1e6
        rows.append({"step": step, "engine": engine} | {name: own[name] for name in names} | {"cost": cost})
    return rows


def verdict(
    counts: Mapping[str, Any], held_out: Mapping[str, Any], comparison: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]] = (), stopped: str | None = None,
) -> tuple[str, str]:  # fmt: skip
    """What came of a run, and what to do: its kind, and a sentence. Clear is what 95 % intervals leave no doubt of."""
    judged = {name: own for name, own in comparison.items() if isinstance(own, Mapping) and "contradictions" in own}
    better = (judged.get("after_vs_before", {}).get("margin") or {}).get("interval") or (0.0, 0.0)
    likelier = (held_out.get("change") or {}).get("interval") or (0.0, 0.0)
    differ = sum((own.get("judged") or 0) - (own.get("equal") or 0) for own in judged.values())
    kept = counts["outcomes"].get("kept", 0)
    return first_true(
        ("unfinished", stopped or counts["made"] > counts["items"],
         "The pairs are not all made: the same command goes on from here."),
        ("nothing_kept", not kept, "Not one pair was kept; the reasons are below. Where gaps are small, take a "
         "stronger `strong`, or lower `gap_threshold`; where replies cannot be read, take a larger model."),
        ("pairs", not held_out and not comparison, f"It worked: {kept} pairs were kept; nothing was trained on them."),
        ("better", better[0] > 0, "It worked: to the judge the target's answers are clearly better than before."),
        ("worse", better[1] < 0, "To the judge the trained target's answers are clearly worse than before: look at "
         "the pairs, or lower `learning_rate` or `num_train_epochs`."),
        ("judge", sum(own["contradictions"] or 0 for own in judged.values()) > 0.9 * differ,
         "The judge prefers whatever stands in one place, so it says nothing: take a larger `judge`."),
        ("learned", likelier[1] < 0, "Training taught the pairs: those held out are clearly more likely than before. "
         "That answers are better is not shown: compare on (more) `benchmark` prompts."),
        ("loss", loss_stayed(log), NOT_TRAINED),
        ("unclear", True, "Nothing is clear of its error: make more pairs (`num_instructions`), hold out or compare "
         "on more of them, or train for longer (`num_train_epochs`)."),
    )  # fmt: skip


def in_numbers(counts: Mapping[str, Any], exported: Mapping[str, Any], stopped: str | None = None) -> str:
    """The run in a few sentences."""
    outcomes, calls = counts["outcomes"], counts["calls"]
    sentences = [
        f"From {counts['seeds']} seeds and {counts['metadata'] or len(counts['use_cases'])} metadata came "
        f"{counts['made']} basic instructions, of which the run kept {outcomes.get('kept', 0)}; pairs in the data: "
        f"{counts['exported'] if exported else 'not exported yet'}."
    ]
    for outcome, reasons in counts["reasons"].items():
        sentences.append(f"{outcome.replace('_', ' ').capitalize()}: {outcomes[outcome]} ({_listed(reasons)}).")
    if exported.get("reasons"):
        sentences.append(f"Left out by the export: {_listed(exported['reasons'])}.")
    if counts["made"] > counts["items"]:
        sentences.append(f"The run is not complete: instructions to be finished: {counts['made'] - counts['items']}.")
    if stopped:
        sentences.append(f"It was stopped: {quoted(stopped.rstrip('.'))}; the same command goes on from here.")
    cost = f", at a cost of {calls['cost']:.2f}" if calls["cost"] else ""
    sentences.append(
        f"Calls of models: {calls['calls']:,}; they read {calls['tokens_read']:,} tokens and wrote "
        f"{calls['tokens_written']:,}{cost}."
    )
    return " ".join(sentences)


def _add_comparison(report: RunReport, comparison: Mapping[str, Any]) -> None:
    """What the judge says."""
    parts = {name: own for name, own in comparison.items() if isinstance(own, Mapping)}
    before, after = (parts.get(name, {}) for name in ("before", "after"))
    if _is_number(before.get("crr")) and _is_number(after.get("crr")):
        report.text(
            f"Capacity recovery ratio, (wins + ties) / all against the strong model on {comparison.get('prompts')} "
            f"prompts: {before['crr']:.1%} before and {after['crr']:.1%} after."
        )
    counted = ("contradictions", "judged", "equal")
    contradicted, judged, equal = (sum(own.get(name) or 0 for own in (before, after)) for name in counted)
    if contradicted:
        report.text(
            f"In {contradicted} of {judged - equal} judgments of answers that differ, the judge preferred the other "
            "one when they changed places. These count as ties: the more there are, the less the ratio says."
        )
    if margin := parts.get("after_vs_before", {}).get("margin"):
        report.text(
            f"By scores averaged over both orders, the trained target is {margin['mean']:+.4f}"
            f"{_between(margin['interval'], 4)} ahead of what it was, and ahead on {margin['positive']} of "
            f"{parts['after_vs_before']['judged']} prompts."
        )
    parts = {name: {key: _shown(value) for key, value in own.items()} for name, own in parts.items()}
    names = list(dict.fromkeys(name for own in parts.values() for name, value in own.items() if value))
    if rows := [[part.replace("_", " "), *(own.get(name, "") for name in names)] for part, own in parts.items()]:
        report.table(["", *(name.replace("_", " ") for name in names)], [row for row in rows if any(row[1:])])


def _tables(counts: Mapping[str, Any], exported: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list, str]]:
    """Heading, header, rows and a note of each table."""
    made, outcomes = counts["made"], counts["outcomes"]
    steps = [(name.replace("_", " "), outcomes.get(name, 0)) for name in ("dropped", "set_aside", "kept")]
    steps = [("finished", counts["items"]), *steps, ("pairs in the data", counts["exported"] if exported else None)]
    rows: list[list[Any]] = [
        ["seeds that instructions came from", counts["seeds"] or None, ""],
        ["metadata", counts["metadata"] or None, ""],
        ["basic instructions asked for", counts["asked"], ""],
        ["basic instructions made", made, ""],
        *([name, number, _share(number, made)] for name, number in steps),
    ]
    rows = [row for row in rows if row[1] is not None]
    yield "From seeds to pairs", ["step", "number", "of those made"], rows, "Shares with 95 % intervals."

    winners, cut = counts["winners"], counts["truncated"]
    rows = [[name, winners.get(name, 0), n, _share(cut.get(name, 0), n)] for name, n in counts["answers"].items()]
    yield "Whose answer was kept", ["answers of", "in pairs", "all", "cut off by the token limit"], rows, ""

    total, rows = sum(counts["iterations"].values()), []
    for number, versions in counts["versions"].items():
        scored, kept = (counts[name].get(number, 0) for name in ("scored", "iterations"))
        looked_at = scored if counts["scored"] else versions
        rows.append([number, versions, scored, kept, _share(kept, looked_at), _share(kept, total)])
    of = "of those scored" if counts["scored"] else "of those made"
    header = ["version", "made", "scored", "kept", of, "of all pairs"]
    yield "Pairs by version", header, rows, "Version 1 is the basic instruction, and each further one a rewrite."

    rows = [["basic instruction", *own] for own in counts["basic_drops"].items()]
    rows += [[outcome.replace("_", " "), *own] for outcome, all_ in counts["reasons"].items() for own in all_.items()]
    rows += [["a rewrite only", *own] for own in counts["refused"].items()]
    rows += [["at the export", *own] for own in (exported.get("reasons") or {}).items()]
    rows = sorted(rows, key=lambda row: -row[2])[:_MOST_ROWS]
    found = "; ".join(f"{number} by {quoted(file)}" for file, number in (exported.get("contaminated") or {}).items())
    note = f"Contaminated at the export: {found}. The rows are in `export_drops.jsonl`." if found else ""
    yield "What was dropped, and why", ["where", "reason", "number"], rows, note

    rows = []
    for step in dict.fromkeys([*(own["step"] for own in counts["steps"]), *counts["set_aside"]]):
        own = [entry for entry in counts["steps"] if entry["step"] == step]
        retried = sum(entry["retried"] for entry in own)
        first = sum(entry["calls"] for entry in own) - retried
        aside = counts["set_aside"].get(step, {})
        rows.append([step, first, _share(first - retried, first), retried, sum(aside.values()), _listed(aside)])
    header = ["step", "asked", "readable at once", "asked again", "set aside", "why"]
    yield "Replies that could be read", header, rows, ""

    names = ["calls", "cut_off", "tokens_read", "tokens_written", *(["cost"] if counts["calls"]["cost"] else [])]
    entries = [*counts["steps"], counts["calls"] | {"step": "all", "engine": ""}] if counts["steps"] else []
    rows = [[own[name] for name in ("step", "engine", *names)] for own in entries]
    yield "Calls and tokens", ["step", "engine", *(name.replace("_", " ") for name in names)], rows, ""

    for kind, title in (("use_cases", "use case"), ("skills", "skill")):
        covered = sum(own["kept"] > 0 for own in counts[kind].values())
        rows = [[name, *(own[part] for part in _HOW_FAR)] for name, own in counts[kind].items()]
        note = f"At least one pair was kept for {covered} of {len(rows)} {title}s; all rows are in `report.json`."
        yield f"Coverage: {title}s", [title, *_HOW_FAR], rows[:_MOST_ROWS], note


def _add_samples(report: RunReport, total: int, folder: Path) -> None:
    """Pairs from all over the data, from seed to answer."""
    numbers = sorted({(2 * i + 1) * total // (2 * _SAMPLES) for i in range(_SAMPLES)} if total else ())
    if numbers:
        report.heading("Pairs and how they came about")
    for number in numbers:
        text = describe(folder, number + 1, longest=_LONGEST).rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        report.text(f"{fence}yaml\n{text}\n{fence}")


def draw_gaps(gaps: Mapping[int, Mapping[int, int]], threshold: float, path: Path, width: float = 1.0) -> Any:
    """Histogram of S(strong) - S(target) of all scored versions, stacked; what is kept lies outside of the two
    lines. `gaps`: version -> bin (see `gap_bin`) -> number; returns the figure."""
    figure, [axes] = panels(width=8, height=4)
    floor: Counter[int] = Counter()
    for number, (version, own) in enumerate(sorted(gaps.items())):
        # A bin lies between multiples of its width; that of no gap at all is a narrow bar on its spot
        centres = [width * (bin - math.copysign(0.5, bin) if bin else 0) for bin in own]
        widths = [width * (0.76 if bin else 0.2) for bin in own]
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": f"version {version}"}
        axes.bar(centres, list(own.values()), widths, [floor[bin] for bin in own], **look)
        floor.update(own)
    for side in (-threshold, threshold):
        axes.axvline(side, color="0.25", linestyle="--", linewidth=1)
    axes.set(xlabel=f"score of strong - score of target (kept: beyond {threshold:g})", ylabel="versions")
    return save(figure, path)


def draw_coverage(use_cases: Mapping[str, Mapping[str, int]], path: Path) -> Any:
    """A bar a use case: basic instructions, and how many of them became pairs; the largest 25, others summed up."""
    rows = list(use_cases.items())
    if len(rows) > _MOST_ROWS:
        rows, rest = rows[: _MOST_ROWS - 1], [own for _, own in rows[_MOST_ROWS - 1 :]]
        rows.append((f"{len(rest)} others", {name: sum(own[name] for own in rest) for name in rest[0]}))
    figure, [axes] = panels(width=8, height=1.4 + 0.27 * len(rows))
    for name, colour, height in (("made", BEFORE, 0.8), ("kept", COLOURS[4], 0.56), ("exported", COLOURS[0], 0.3)):
        axes.barh(range(len(rows)), [own[name] for _, own in rows], height, color=colour, label=name)
    labels = [name.replace("$", r"\$")[:45] for name, _ in rows]  # matplotlib would read mathematics
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("instructions")
    return save(figure, path)


def _listed(numbers: Mapping[str, int]) -> str:
    """The first few."""
    first, rest = list(numbers.items())[:_MOST_LISTED], list(numbers.values())[_MOST_LISTED:]
    parts = [f"{number} {reason}" for reason, number in first]
    return quoted(", ".join([*parts, f"{sum(rest)} for other reasons"] if rest else parts))


def _share(part: int | None, whole: int) -> str:
    if not whole or part is None or not 0 <= part <= whole:
        return "n/a"
    low, high = wilson(part, whole)
    return f"{part / whole:.1%} ({100 * low:.0f} to {100 * high:.0f})"


def _between(interval: list[float] | None, digits: int) -> str:
    return f" ({interval[0]:+.{digits}f} to {interval[1]:+.{digits}f})" if interval else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A number or an interval; nothing for what is neither."""
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 2 and all(map(_is_number, value)):
        return " to ".join(map(_shown, value))
    return "" if not _is_number(value) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or one that is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
