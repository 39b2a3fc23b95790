"""Pictures of a patch on two axes: what it removed, and what it left alone (arXiv 2406.13660, section 5)."""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours of Okabe and Ito, told apart by colour-blind readers, and a marker each; targeted variants first.
STYLES = {
    "ff": ("#0072B2", "o"),
    "rr": ("#D55E00", "s"),
    "rf": ("#009E73", "^"),
    "fll": ("#CC79A7", "D"),
    "rll": ("#56B4E9", "v"),
    "ul": ("#E69F00", "P"),
    "nl": ("#000000", "X"),
    "sft": ("#808080", "*"),
}
BASELINES = ("ul", "nl", "sft")
BEFORE, AFTER, KEPT = "#999999", "#0072B2", "#009E73"
# Where an alpha may stand relative to its point, in typographic points; the first that is free is taken.
PLACES = [(8, 6), (-8, 6), (8, -7), (-8, -7), (0, 10), (0, -11), (13, 0), (-13, 0), (15, 13), (-15, 13), (15, -14)]


def draw_tradeoff(points: Sequence[dict[str, Any]], path: str | os.PathLike) -> "Figure":
    """Reduction of the unwanted rate against preservation, a line per variant over alpha; up and right is better.

    Args:
        points: Dicts with `variant` (one of `STYLES`), `alpha` (not written for "sft", which has none), `reduction`
            (1 - rate after / rate before; below 0 where the rate rose) and `preservation` (share of clean greedy
            outputs unchanged), both as shares, not in percent. `reduction_interval` and `preservation_interval`
            ([low, high], shares too) draw error bars. Two points of one variant and alpha are two runs.
        path: PNG file to write.

    Returns:
        The figure, as written.

    Raises:
        ValueError: No points, an unknown variant, or a value that is no share.
    """
    from matplotlib.figure import Figure

    _check_points(points)
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for variant, (colour, marker) in STYLES.items():
        own = sorted((p for p in points if p["variant"] == variant), key=lambda p: p.get("alpha") or 0.0)
        if not own:
            continue
        x, y = ([100 * p[name] for p in own] for name in ("reduction", "preservation"))
        dashed = variant in BASELINES
        x_error, y_error = _error_bars(own, "reduction"), _error_bars(own, "preservation")
        axes.errorbar(x, y, y_error, x_error, fmt="none", ecolor=colour, elinewidth=1, alpha=0.35, zorder=1.5)
        axes.plot(
            x, y, color=colour, marker=marker, markersize=9 if marker in "*PX" else 7,
            linestyle="--" if dashed else "-", linewidth=1.6, markeredgecolor="white", markeredgewidth=0.7,
            label=f"{variant} (baseline)" if dashed else variant,
        )  # fmt: skip
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="unwanted rate removed (% of the original's)", ylabel="clean greedy outputs unchanged (%)")
    axes.margins(0.07)
    axes.set_title("better: up and to the right", loc="right", fontsize=9, color="0.4")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title="loss; numbers: alpha")
    _label_alphas(axes, points)
    figure.savefig(path, dpi=150, format="png")
    return figure


def draw_two_axes(evaluation: dict[str, Any], path: str | os.PathLike) -> "Figure":
    """One run: the unwanted rate before and after with 95 % intervals, and what is left of the original's behaviour.

    Args:
        evaluation: `original` and `patched`, each a dict of `greedy` and `sampled` (either may be missing on both
            sides) with a result of `preservation.unwanted`; and `preservation`, the result of the function so named.
        path: PNG file to write.

    Returns:
        The figure, as written.

    Raises:
        ValueError: Neither `greedy` nor `sampled` is there on both sides.
    """
    from matplotlib.figure import Figure

    before, after = evaluation["original"], evaluation["patched"]
    kinds = [kind for kind in ("greedy", "sampled") if kind in before and kind in after]
    if not kinds:
        raise ValueError("nothing to draw: `original` and `patched` both need an entry `greedy` or `sampled`.")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for shift, side, colour, name in ((-0.19, before, BEFORE, "original"), (0.19, after, AFTER, "patched")):
        places = [i + shift for i in range(len(kinds))]
        _draw_bars(left, places, [side[kind]["share"] for kind in kinds], colour, width=0.34, label=name)
    left.set_xticks(range(len(kinds)), [f"{kind}\n(n = {_counts(before[kind], after[kind])})" for kind in kinds])
    left.set(title="unwanted: should fall", ylabel="outputs with an unwanted span (%)")
    left.set_xlim(-0.6, len(kinds) - 0.4)
    left.set_ylim(0, 1.3 * _tallest(left))
    left.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")

    clean = evaluation["preservation"]["clean"]
    values = [clean["exact_match"], *({"value": _share(clean, name)} for name in ("bleu", "rouge_l"))]
    values.append({"value": clean["first_difference"]})
    _draw_bars(right, list(range(len(values))), values, KEPT, width=0.6)
    right.set_xticks(range(len(values)), ["unchanged\nword for word", "BLEU", "ROUGE-L", "words before\na difference"])
    right.set(title="preserved: should stay at 100", ylabel="likeness to the original (%)")
    right.set_xlabel(f"{clean['n']} greedy outputs that were clean")
    right.axhline(100, color="0.6", linestyle=":", linewidth=1)
    right.set_ylim(0, 115)
    right.set_yticks(range(0, 101, 20))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
    figure.savefig(path, dpi=150, format="png")
    return figure


def _draw_bars(
    axes: "Axes", places: list[float], estimates: list[dict], colour: str, width: float, label: str | None = None
) -> None:
    """Bars in percent, the value above the bar or its interval; an estimate of None is written as n/a."""
    heights = [100 * (e["value"] or 0.0) for e in estimates]
    axes.bar(places, heights, width, color=colour, label=label)
    for place, height, estimate in zip(places, heights, estimates, strict=True):
        top = height
        if estimate.get("high") is not None:
            low, top = 100 * estimate["low"], 100 * estimate["high"]
            axes.errorbar(place, height, [[height - low], [top - height]], color="0.2", capsize=3, linewidth=1)
        text = "n/a" if estimate["value"] is None else f"{height:.3g}"
        axes.annotate(text, (place, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)


def _share(clean: dict[str, Any], name: str) -> float | None:
    return clean[name] / 100 if name == "bleu" and clean[name] is not None else clean[name]


def _counts(before: dict[str, Any], after: dict[str, Any]) -> str:
    return str(before["n"]) if before["n"] == after["n"] else f"{before['n']}, {after['n']}"


def _tallest(axes: "Axes") -> float:
    """The highest value drawn, error bars included; at least 1 %, so that an empty panel has a scale."""
    return max(1.0, axes.dataLim.y1)


def _error_bars(points: list[dict[str, Any]], name: str) -> list[list[float]] | None:
    """Distances below and above, in percent; nan, which draws nothing, for a point without an interval."""
    intervals = [p.get(f"{name}_interval") for p in points]
    if not any(intervals):
        return None
    pairs = [
        (max(0.0, p[name] - interval[0]), max(0.0, interval[1] - p[name])) if interval else (math.nan, math.nan)
        for p, interval in zip(points, intervals, strict=True)
    ]
    return [[100 * distance for distance in side] for side in zip(*pairs, strict=True)]


def _label_alphas(axes: "Axes", points: Sequence[dict[str, Any]]) -> None:
    """Write each alpha beside its point, where it hides neither a point nor another alpha as far as there is room."""
    from matplotlib.patheffects import withStroke

    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, which the pixels depend on
    pixel = figure.dpi / 72
    spots = [axes.transData.transform((100 * p["reduction"], 100 * p["preservation"])) for p in points]
    # Boxes as centre and half size: of markers, of stretches of line (crossed if need be), and of labels as they come.
    taken = [(x, y, 5 * pixel, 5 * pixel) for x, y in spots]
    taken += [(x, y, 1.2 * pixel, 1.2 * pixel) for x, y in _along_lines(axes, 3 * pixel)]
    for point, (x, y) in zip(points, spots, strict=True):
        if point["variant"] == "sft" or point.get("alpha") is None:
            continue
        text = f"{point['alpha']:g}"
        size = (2.3 * len(text) * pixel, 4 * pixel)
        boxes = [(x + dx * pixel, y + dy * pixel, *size) for dx, dy in PLACES]
        best = min(range(len(PLACES)), key=lambda i: sum(_overlap(boxes[i], other) for other in taken))
        taken.append(boxes[best])
        axes.annotate(
            text, axes.transData.inverted().transform((x, y)), xytext=PLACES[best], textcoords="offset points",
            ha="center", va="center", fontsize=7.5, color=STYLES[point["variant"]][0],
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _along_lines(axes: "Axes", step: float) -> Iterator[tuple[float, float]]:
    """Points on the lines and error bars drawn, `step` pixels apart."""
    paths = [line.get_xydata() for line in axes.lines]
    paths += [bar for bars in axes.collections for bar in bars.get_segments()]
    for path in paths:
        places = axes.transData.transform(path)
        for (x0, y0), (x1, y1) in pairwise(places):
            pieces = max(1, int(math.hypot(x1 - x0, y1 - y0) / step))
            for i in range(pieces):
                yield x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area two boxes share, in pixels squared."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0] - a[2], b[0] - b[2])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1] - a[3], b[1] - b[3])
    return max(0.0, width) * max(0.0, height)


def _check_points(points: Sequence[dict[str, Any]]) -> None:
    if not points:
        raise ValueError("no points to draw: give one dict per trained model.")
    for i, point in enumerate(points):
        if point["variant"] not in STYLES:
            raise ValueError(f"point {i}: variant {point['variant']!r} is not one of {', '.join(STYLES)}.")
        for name, low in (("reduction", -math.inf), ("preservation", 0.0)):
            if point[name] is None or not low <= point[name] <= 1:
                raise ValueError(
                    f"point {i}: {name} = {point[name]} is no share; give 0.9 for 90 %, and leave out what is unknown."
                )
