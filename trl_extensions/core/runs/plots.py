"""Figures of reports: bars and lines with intervals, in colours that colour-blind readers tell apart.

An estimate is a number, None, or a dict with `value` and optionally `low` and `high`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..extras import import_extra


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")
BEFORE = "#999999"  # for what others are compared with
# For scripts that matplotlib's own font lacks, where one of them is installed
_MORE_FONTS = ("Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "Arial Unicode MS")

Estimate: TypeAlias = Mapping[str, Any] | float | None


def panels(number: int = 1, width: float = 4.5, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, sizes in inches of each."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(width * number, height), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def bar_plot(
    axes: Axes,
    names: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    *,
    unit: float = 1.0,
    colours: Mapping[str, str] | None = None,
    digits: str = "%.3g",
) -> None:
    """Groups of bars, in each one a series: name (in the legend) -> an estimate for every group, multiplied by `unit`.
    Above a bar stands its value, or n/a for what is unknown. Titles and labels of axes are the caller's."""
    width = 0.8 / max(1, len(series))
    for number, (label, estimates) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
        values, errors = _scaled(estimates, unit)
        colour = (colours or {}).get(label, COLOURS[number % len(COLOURS)])
        heights = [0.0 if math.isnan(value) else value for value in values]
        bars = axes.bar(places, heights, 0.92 * width, color=colour, label=label or None)
        # Known to the bars, so that labels go above the intervals
        bars.errorbar = axes.errorbar(places, heights, errors, fmt="none", ecolor="0.2", capsize=3, linewidth=1)
        texts = ["n/a" if math.isnan(value) else digits % value for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    crowded = len(names) * max(map(len, names), default=0) > 40
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")


def line_plot(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[Estimate]]],
    *,
    unit: float = 1.0,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Lines with intervals: name (in the legend) -> x and an estimate for each of them."""
    for number, (label, (x, estimates)) in enumerate(series.items()):
        values, errors = _scaled(estimates, unit)
        colour = (colours or {}).get(label, COLOURS[number % len(COLOURS)])
        axes.errorbar(x, values, errors, color=colour, marker="os^DvPX*"[number % 8], capsize=3, label=label or None)


def save(figure: Figure, path: str | os.PathLike) -> Figure:
    """Write a PNG, with one legend for all panels below them; returns the figure."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if entries:
        columns = min(4, len(entries))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", frameon=False, ncols=columns)
    fonts = import_extra("matplotlib.font_manager").get_font_names()
    for text in figure.findobj(import_extra("matplotlib.text").Text):
        text.set_fontfamily(["DejaVu Sans", *(name for name in _MORE_FONTS if name in fonts)])
        text.set_parse_math(False)  # a dollar is a dollar
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # nothing to be done without such a font
        figure.savefig(path, dpi=150, format="png")
    return figure


def _scaled(estimates: Sequence[Estimate], unit: float) -> tuple[list[float], list[list[float]]]:
    """Values, nan where unknown, and how far intervals reach down and up; nan, which draws nothing, where none is."""
    values, below, above = [], [], []
    for estimate in estimates:
        own: Mapping[str, Any] = estimate if isinstance(estimate, Mapping) else {"value": estimate}
        value = math.nan if own["value"] is None else unit * own["value"]
        known = own.get("low") is not None and own.get("high") is not None
        values.append(value)
        below.append(max(0.0, value - unit * own["low"]) if known else math.nan)
        above.append(max(0.0, unit * own["high"] - value) if known else math.nan)
    return values, [below, above]
