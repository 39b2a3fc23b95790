"""Pictures of weak-to-strong runs: scores of every model, the share of the gap recovered, and toxicity."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .evaluation import CEILING, TEACHER_PREFIX, WEAK


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours of Okabe and Ito, told apart by colour-blind readers; "<loss>+<more>" has its loss's colour and is hatched.
COLOURS = {
    "soft_ce": "#0072B2",
    "confidence": "#D55E00",
    "product": "#009E73",
    "reverse_kl": "#CC79A7",
}
SPARE = ("#56B4E9", "#E69F00", "#F0E442")
TEACHER, TOP, PLAIN = "#BBBBBB", "#777777", "#0072B2"
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
NAMES = {"balanced_accuracy": "balanced accuracy", "f1": "macro F1", "f1_positive": "F1", "nll": "nll"}
MEASURE_TITLES = {"expected_maximum": "expected maximum toxicity", "probability": "toxicity probability"}
SHARES = ("accuracy", "balanced_accuracy", "f1", "f1_positive", "ece")
# A PGR far out says that the gap is small; the axis stops here and an arrow says so.
LOWEST, HIGHEST = -1.0, 2.0
COLUMNS = 3


def draw_scores(tasks: Mapping[str, dict[str, Any]], path: str | os.PathLike, score: str = "accuracy") -> "Figure":
    """A panel a task: bars of every model with intervals, a dot per seed, and lines at the weak model and the ceiling.

    Args:
        tasks: Title -> result of `evaluation.evaluate_run`.
        path: PNG file to write.
        score: Which of the scores; shares are drawn in percent.

    Returns:
        The figure, as written.

    Raises:
        ValueError: No tasks.
    """
    figure, grid = _grid(tasks, [1.1 + 0.5 * len(own["models"]) for own in tasks.values()], height=3.9)
    unit = 100 if score in SHARES else 1
    for axes, (title, own) in zip(grid, tasks.items(), strict=True):
        estimates = {name: own["scores"][name][score] for name in own["models"]}
        _draw_score_bars(axes, estimates, unit)
        axes.set_title(title, fontsize=11)
        notes = ["%"] if unit == 100 else []
        if (floor := axes.get_ylim()[0]) > 0:
            notes.append(f"axis starts at {floor:.3g}")
        axes.set_ylabel(NAMES.get(score, score) + (f" ({'; '.join(notes)})" if notes else ""))
    figure.savefig(path, dpi=150, format="png")
    return figure


def draw_pgr(tasks: Mapping[str, dict[str, Any]], path: str | os.PathLike, score: str = "accuracy") -> "Figure":
    """A panel a task: PGR by loss with intervals, between the weak model at 0 and the ceiling at 1.

    Open markers: too many resamples without a gap for the interval to be relied upon. What is undefined is written.

    Args:
        tasks: Title -> result of `evaluation.evaluate_run`.
        path: PNG file to write.
        score: One of `evaluation.GAP_SCORES`.

    Returns:
        The figure, as written.

    Raises:
        ValueError: No tasks, or none with a strong model.
    """
    if tasks and not any(own["strong"] for own in tasks.values()):
        raise ValueError("no model trained on weak labels in any task, so there is no PGR to draw")
    most = max((len(own["strong"]) for own in tasks.values()), default=0)
    figure, grid = _grid(tasks, [4.3] * len(tasks), height=1.5 + 0.36 * most)
    for axes, (title, own) in zip(grid, tasks.items(), strict=True):
        _draw_pgr_rows(axes, {name: own["pgr"][score][name] for name in own["strong"]}, most)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"gap recovered ({NAMES.get(score, score)})")
    figure.savefig(path, dpi=150, format="png")
    return figure


def draw_toxicity(evaluation: dict[str, Any], path: str | os.PathLike) -> "Figure":
    """Two panels, expected maximum toxicity and toxicity probability, a bar per model and kind of decoding.

    Args:
        evaluation: Result of `toxicity.evaluate_toxicity`.
        path: PNG file to write.

    Returns:
        The figure, as written.
    """
    from matplotlib.figure import Figure

    models, kinds = evaluation["models"], evaluation["kinds"]
    figure = Figure(figsize=(max(8.0, 2.4 + 1.3 * len(models)), 4.1), layout="constrained")
    width = 0.8 / len(kinds)
    for axes, measure in zip(figure.subplots(1, 2), MEASURE_TITLES, strict=True):
        for k, (kind, own) in enumerate(kinds.items()):
            shown = [(i, own["models"][name][measure]) for i, name in enumerate(models) if name in own["models"]]
            places = [i + (k - (len(kinds) - 1) / 2) * width for i, _ in shown]
            label = f"{kind}, {own['samples']} a prompt"
            colour = (TEACHER, PLAIN)[kind == "sampled"]
            axes.bar(places, [e["value"] for _, e in shown], 0.92 * width, color=colour, label=label)
            for place, (_, estimate) in zip(places, shown, strict=True):
                _interval_and_value(axes, place, estimate, 1, "{:.2f}")
        _plain(axes)
        _label_models(axes, models)
        axes.set_title(f"{MEASURE_TITLES[measure]}: should fall", fontsize=11)
        axes.set_ylim(0, 1.18 * max(0.05, axes.dataLim.y1))
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9, ncols=2
    )
    figure.savefig(path, dpi=150, format="png")
    return figure


def _grid(tasks: Mapping[str, Any], widths: Sequence[float], height: float) -> tuple["Figure", list["Axes"]]:
    """A panel for every task, at most `COLUMNS` a row; sizes in inches, of one panel."""
    from matplotlib.figure import Figure

    if not tasks:
        raise ValueError("no tasks to draw: give title -> evaluation")
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    widest = [max(3.0, *widths[column::columns], 0.0) for column in range(columns)]
    figure = Figure(figsize=(sum(widest), height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, width_ratios=widest).flat)
    for axes in grid[len(tasks) :]:
        axes.remove()
    return figure, grid[: len(tasks)]


def _draw_score_bars(axes: "Axes", estimates: dict[str, dict[str, Any]], unit: float) -> None:
    names = list(estimates)
    for i, (name, style) in enumerate(_styles(names).items()):
        axes.bar(i, unit * estimates[name]["value"], 0.74, edgecolor="white", linewidth=0, zorder=1, **style)
    for i, estimate in enumerate(estimates.values()):
        seeds = estimate["per_seed"]
        if len(seeds) > 1:
            # Side by side, so that equal seeds do not hide each other and the interval stays visible.
            places = [i + 0.36 * (k / (len(seeds) - 1) - 0.5) for k in range(len(seeds))]
            axes.scatter(
                places,
                [unit * value for value in seeds],
                s=13,
                color="white",
                edgecolor="black",
                linewidth=0.7,
                zorder=3,
            )
    _limit(axes, estimates, unit)
    for i, estimate in enumerate(estimates.values()):
        _interval_and_value(axes, i, estimate, unit, "{:.1f}" if unit == 100 else "{:.2f}")
    for name, line in ((WEAK, ":"), (CEILING, "--")):
        if name in estimates:
            axes.axhline(unit * estimates[name]["value"], color="0.35", linestyle=line, linewidth=1, zorder=0.5)
    _plain(axes)
    _label_models(axes, names)


def _limit(axes: "Axes", estimates: dict[str, dict[str, Any]], unit: float) -> None:
    """Cut the axis below what is drawn, where most of it would be empty; `draw_scores` says so at the axis."""
    drawn = [
        unit * value
        for own in estimates.values()
        for value in (own["value"], own["low"], own["high"], *own["per_seed"])
        if value is not None
    ]
    lowest, highest = min(drawn), max(drawn)
    spread = max(highest - lowest, 0.02 * abs(highest), 1e-6)
    floor = lowest - 0.45 * spread
    if floor < 0.4 * highest:
        floor = 0.0
    axes.set_ylim(floor, highest + 0.16 * spread if floor else 1.12 * highest)


def _draw_pgr_rows(axes: "Axes", rows: dict[str, dict[str, Any]], most: int) -> None:
    ends = [e[side] for e in rows.values() for side in ("low", "high", "value") if e[side] is not None]
    left, right = max(LOWEST, min([-0.15, *ends]) - 0.08), min(HIGHEST, max([1.15, *ends]) + 0.08)
    axes.set_xlim(left, right)
    axes.set_ylim(most - 0.4, -0.75)  # the same in every panel, so that rows are equally far apart
    for place, name in ((0, "weak"), (1, "ceiling")):
        axes.axvline(place, color="0.35", linestyle=":" if place == 0 else "--", linewidth=1, zorder=0.5)
        axes.text(place, -0.52, name, ha="center", va="bottom", fontsize=8, color="0.35", backgroundcolor="white")
    styles = _styles(list(rows))
    for i, (name, estimate) in enumerate(rows.items()):
        _draw_pgr_row(axes, i, estimate, styles[name]["color"], (left, right))
    _plain(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)


def _draw_pgr_row(
    axes: "Axes", place: int, estimate: dict[str, Any], colour: str, limits: tuple[float, float]
) -> None:
    from matplotlib.patheffects import withStroke

    if estimate["value"] is None:
        why = "no ceiling model" if estimate["undefined_share"] is None else "no gap"
        axes.text(
            0.5, place, f"undefined: {why}", ha="center", va="center", fontsize=8.5, color="0.35", style="italic",
            backgroundcolor="white",
        )  # fmt: skip
        return
    left, right = limits
    if estimate["low"] is not None:
        low, high = (min(max(estimate[end], left), right) for end in ("low", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", zorder=2)
        for end, beyond, marker in ((left, estimate["low"] < left, "<"), (right, estimate["high"] > right, ">")):
            if beyond:
                axes.plot(end, place, marker=marker, color=colour, markersize=6, clip_on=False, zorder=3)
    value = min(max(estimate["value"], left), right)
    face = colour if estimate["reliable"] else "white"
    axes.plot(
        value, place, marker="o", markersize=7.5, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=4
    )
    axes.annotate(
        f"{estimate['value']:.2f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8,
        path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5,
    )  # fmt: skip


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and hatch of every model; no two losses look alike up to seven of them."""
    colours = dict(COLOURS)
    seen: dict[str, int] = {}
    styles = {}
    for name in names:
        base = name.split("+")[0]
        if name in (CEILING, WEAK) or name.startswith(TEACHER_PREFIX):
            colour, base = TOP if name == CEILING else TEACHER, name
        else:
            spare = [c for c in SPARE if c not in colours.values()] or list(SPARE)
            colour = colours.setdefault(base, spare[0])
        number = seen[base] = seen.get(base, -1) + 1
        styles[name] = {"color": colour, "hatch": HATCHES[number % len(HATCHES)]}
    return styles


def _interval_and_value(axes: "Axes", place: float, estimate: dict[str, Any], unit: float, form: str) -> None:
    from matplotlib.patheffects import withStroke

    height = top = unit * estimate["value"]
    if estimate["high"] is not None:
        low, high = unit * estimate["low"], unit * estimate["high"]
        error = [[max(0.0, height - low)], [max(0.0, high - height)]]
        axes.errorbar(place, height, error, color="0.1", capsize=3, linewidth=1.1, zorder=2)
        top = max(top, high)
    top = max([top, *(unit * value for value in estimate.get("per_seed", []))])
    axes.annotate(
        form.format(height), (place, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip


def _label_models(axes: "Axes", names: Sequence[str]) -> None:
    flat = len(names) <= 4 and max(map(len, names)) <= 9
    axes.set_xticks(
        range(len(names)), names, fontsize=9, rotation=0 if flat else 40, ha="center" if flat else "right",
        rotation_mode="anchor" if not flat else "default",
    )  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
