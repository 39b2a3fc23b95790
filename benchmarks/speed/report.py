"""Tables and a figure of what `__main__` measured. Everything is a ratio of two paths run side by side."""

import statistics
from pathlib import Path
from typing import Any

from .cases import Case, LabelsCase, SamiCase, SamiGrowth, SharedPromptCase, TntCase, TntGrowth, WeakToStrongCase
from .figure import draw


class Results:
    """What was measured of the cases at hand, by case and path."""

    def __init__(self, rows: list[dict[str, Any]], cases: list[Case]) -> None:
        self.rows = rows
        measured = {row.get("case") for row in rows if row["what"] == "time"}
        self.cases = [case for case in cases if case.name in measured]

    def of(self, kind: type) -> list[Case]:
        """Measured cases of one kind."""
        return [case for case in self.cases if isinstance(case, kind)]

    def ratios(self, case: Case, path: str, to: str, clock: str = "cpu") -> list[float]:
        """Time of a path over that of another, round by round."""
        seconds = {
            (row["path"], row["round"]): row[clock]
            for row in self.rows
            if row["what"] == "time" and row["case"] == case.name
        }
        rounds = sorted(
            {number for name, number in seconds if name == path} & {n for name, n in seconds if name == to}
        )
        return [seconds[path, number] / seconds[to, number] for number in rounds]

    def alone(self, case: Case, field: str, path: str) -> float | None:
        """`mb` or `flops` of a path."""
        found = [r[field] for r in self.rows if r["what"] == "alone" and r["case"] == case.name and r["path"] == path]
        return found[0] if found else None

    def memory_ratio(self, case: Case, path: str, to: str) -> float | None:
        """Peak memory of a path over that of another, both beyond the loaded models."""
        own, other = (self.alone(case, "mb", name) for name in (path, to))
        return own / other if own is not None and other else None

    def bookkeeping(self) -> list[dict[str, Any]]:
        """Of `measure_bookkeeping`."""
        return [row for row in self.rows if row["what"] == "bookkeeping"]

    def startup(self) -> dict[str, Any] | None:
        """Of `measure_startup`."""
        return next((row for row in self.rows if row["what"] == "startup"), None)


def write_report(rows: list[dict[str, Any]], cases: list[Case], output: Path) -> None:
    """Write `speed.md` and `speed.png` of what there is so far."""
    results = Results(rows, cases)
    parts = [_bars(results), _sami(results), _sft(results), _tnt(results), _others(results)]
    parts += [_growth(results), _bookkeeping(results), _startup(results)]
    (output / "speed.md").write_text("\n".join(part for part in parts if part))
    draw(results, output / "speed.png")


def _bars(results: Results) -> str:
    """Targets beside what was measured; times are CPU times of the whole process, medians over the rounds."""
    lines = []
    for case in results.of(SamiCase):
        target = {(2, 200): 2.1, (4, 200): 2.6, (4, 450): 3.5}.get((case.constitutions, case.prompt))
        if target:
            lines.append(_bar(f"{case.name}: plain / ours, time", "≥", target, results.ratios(case, "plain", "ours")))
        if (case.constitutions, case.prompt) == (2, 200):
            memory = results.memory_ratio(case, "ours", "plain")
            lines.append(_bar(f"{case.name}: ours / plain, memory", "≤", 0.65, [memory], once=True))
        for path in ("SFT", "SFT at labels"):
            if path in case.paths:
                lines.append(_bar(f"{case.name}: ours / {path}, time", "≤", 1.25, results.ratios(case, "ours", path)))
    for case in results.of(TntCase):
        lines += [
            _bar(f"{case.name}: ours / dense, time", "≤", 0.75, results.ratios(case, "ours", "dense")),
            _bar(f"{case.name}: ours / dense, memory", "≤", 0.45, [results.memory_ratio(case, "ours", "dense")], True),
            _bar(f"{case.name}: ours / distillation, time", "≤", 1.15, results.ratios(case, "ours", "distillation")),
        ]
    started = results.startup()
    if started:
        lines.append(
            _bar("`import trl_extensions` beyond Python, s", "≤", 0.3, [started["import"] - started["python"]], True)
        )
        lines.append(_bar("`trl-ext --help`, s", "≤", 1.0, [started["help"]], True))
    return _table("Targets", ("", "target", "measured", "met"), lines)


def _bar(what: str, sign: str, target: float, values: list[float | None], once: bool = False) -> tuple[str, ...]:
    if not values or None in values:
        return (what, f"{sign} {target:g}", "", "")
    middle = statistics.median(values)
    met = middle >= target if sign == "≥" else middle <= target
    shown = _number(middle) if once else _spread(values)
    return (what, f"{sign} {target:g}", shown, "yes" if met else "no")


def _sami(results: Results) -> str:
    lines = []
    for case in sorted(results.of(SamiCase), key=lambda case: (case.constitutions, case.prompt)):
        floors = [results.alone(case, "flops", path) for path in ("plain", "ours")]
        lines.append((
            str(case.constitutions),
            str(case.prompt),
            _spread(results.ratios(case, "plain", "ours")),
            _spread(results.ratios(case, "plain", "ours", "wall")),
            _number(results.memory_ratio(case, "ours", "plain")),
            *(_number(flops and flops / case.floor()) for flops in floors),
        ))  # fmt: skip
    head = (
        "C",
        "prompt",
        "plain / ours, CPU time",
        "wall time",
        "ours / plain, memory",
        "FLOPs / floor: plain",
        "ours",
    )
    return _table("SAMI: the plain C x C path against ours", head, lines)


def _sft(results: Results) -> str:
    lines = []
    for case in results.of(SamiCase):
        for path in case.paths[2:]:
            lines.append((
                case.name,
                path,
                _spread(results.ratios(case, "ours", path)),
                _spread(results.ratios(case, "ours", path, "wall")),
                _number(results.memory_ratio(case, "ours", path)),
            ))  # fmt: skip
    return _table("SAMI: ours against TRL's SFT", ("", "against", "CPU time", "wall time", "memory"), lines)


def _tnt(results: Results) -> str:
    lines = []
    for case in results.of(TntCase):
        for path in case.paths:
            flops = results.alone(case, "flops", path)
            lines.append((
                case.name,
                path,
                _spread(results.ratios(case, path, "dense")),
                _spread(results.ratios(case, path, "dense", "wall")),
                _number(results.memory_ratio(case, path, "dense")),
                _number(flops and flops / case.floor()),
            ))  # fmt: skip
    head = ("", "path", "CPU time / dense", "wall time / dense", "memory / dense", "FLOPs / floor")
    return _table("TNT, 4 x 256 tokens, vocabulary 49,152", head, lines)


def _others(results: Results) -> str:
    lines = []
    for case in results.of((SharedPromptCase, WeakToStrongCase, LabelsCase)):
        first, *rest = case.paths
        for path in rest:
            lines.append((
                case.name,
                f"{path} / {first}",
                _spread(results.ratios(case, path, first)),
                _spread(results.ratios(case, path, first, "wall")),
                _number(results.memory_ratio(case, path, first)),
            ))  # fmt: skip
    head = ("", "", "CPU time", "wall time", "memory")
    return _table("Shared prompts, token distributions, labelling", head, lines)


def _bookkeeping(results: Results) -> str:
    rows = sorted(results.bookkeeping(), key=lambda row: row["rows"])
    lines = [
        (
            f"{row['rows']:,}",
            f"{row['calls']:,}",
            _number(row["cpu"] / row["rows"] / (rows[0]["cpu"] / rows[0]["rows"])),
            f"{row['mb']:.0f}",
        )
        for row in rows
    ]
    head = ("instructions", "calls", f"CPU time of each / at {rows[0]['rows']:,}" if rows else "", "memory, MB")
    return _table("CodecLM without models", head, lines)


def _growth(results: Results) -> str:
    parts = []
    for case in results.of((SamiGrowth, TntGrowth)):
        first = case.paths[0]
        lines = [
            (path, _spread(results.ratios(case, path, first)), _number(results.memory_ratio(case, path, first)))
            for path in case.paths
        ]
        what = "C" if isinstance(case, SamiGrowth) else "vocabulary"
        parts.append(_table(f"How ours grows: {case.name}", (what, f"CPU time / {first}", f"memory / {first}"), lines))
    return "\n".join(parts)


def _startup(results: Results) -> str:
    started = results.startup()
    if not started:
        return ""
    lines = [
        ("`import trl_extensions`", _number(started["import"] / started["python"]), _yes(started["loads_torch"])),
        ("`trl-ext --help`", _number(started["help"] / started["python"]), _yes(started["help_loads_torch"])),
    ]
    return _table("Start-up", ("", "time / Python's own start", "loads torch"), lines)


def _table(title: str, head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    if not lines:
        return ""
    rows = [head, ("---",) * len(head), *lines]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _spread(values: list[float | None]) -> str:
    if not values or None in values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f} (n = 1)"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}, n = {len(values)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
