"""Pictures of a run of CodecLM: the gaps by iteration, and how far each use case got."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Of Okabe and Ito, told apart by colour-blind readers, from the first round to the last.
_ROUNDS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
_MADE, _KEPT, _EXPORTED = "#CCCCCC", "#56B4E9", "#0072B2"
_MOST_BARS = 25


def draw_gaps(
    gaps: Mapping[int, Mapping[int, int]], threshold: float, path: str | os.PathLike, width: float = 1.0
) -> "Figure":
    """Histogram of S(strong) - S(target) over all versions that were scored, rounds stacked; what is kept lies outside
    the two lines.

    Args:
        gaps: Round -> bin (see `statistics.gap_bin`) -> number of versions.
        threshold: Of the gap.
        path: PNG file to write.
        width: Of a bin.

    Returns:
        The figure, as written.

    Raises:
        ValueError: Nothing was scored.
    """
    from matplotlib.figure import Figure

    bins = sorted({bin for own in gaps.values() for bin in own})
    if not bins:
        raise ValueError("no gaps to draw: no version was scored")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    # A bin lies between multiples of its width; that of no gap at all is drawn on its spot, narrow
    beside = {0: (-0.2, 0.2), 1: (0.25, 0.95), -1: (-0.95, -0.25)}
    edges = [
        beside.get(bin) or (bin - (0.95 if bin > 0 else -0.05), bin - (0.05 if bin > 0 else -0.95)) for bin in bins
    ]
    places, widths = [width * (low + high) / 2 for low, high in edges], [width * (high - low) for low, high in edges]
    floor = [0] * len(bins)
    for number, (round_, own) in enumerate(sorted(gaps.items())):
        heights = [own.get(bin, 0) for bin in bins]
        colour = _ROUNDS[number % len(_ROUNDS)]
        axes.bar(places, heights, widths, bottom=floor, color=colour, label=f"round {round_}", zorder=2)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    for side in (-threshold, threshold):
        axes.axvline(side, color="0.25", linestyle="--", linewidth=1, zorder=3)
    reach = max(threshold, width * max(map(abs, bins)))
    if threshold >= 1:  # all that scores from 1 to 10 allow
        reach = max(9.0, reach)
        axes.set_xticks(range(-9, 10, 3))
    axes.set_xlim(-reach - 0.3 * width, reach + 0.3 * width)
    axes.set(xlabel="score of strong - score of target", ylabel="versions")
    axes.set_title(f"kept: beyond the lines at {threshold:g}", loc="right", fontsize=9, color="0.4")
    _plain(figure)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, format="png")
    return figure


def draw_coverage(use_cases: Mapping[str, Mapping[str, int]], path: str | os.PathLike) -> "Figure":
    """A bar a use case: basic instructions, and how many of them became pairs; the largest 25, others summed up.

    Args:
        use_cases: Name -> `made`, `kept` and `exported`, as in `statistics.collect`.
        path: PNG file to write.

    Returns:
        The figure, as written.

    Raises:
        ValueError: There are no use cases.
    """
    from matplotlib.figure import Figure

    if not use_cases:
        raise ValueError("no use cases to draw")
    rows = list(use_cases.items())
    if len(rows) > _MOST_BARS:
        rest = [own for _, own in rows[_MOST_BARS - 1 :]]
        summed = {name: sum(own[name] for own in rest) for name in ("made", "kept", "exported")}
        rows = [*rows[: _MOST_BARS - 1], (f"{len(rest)} others", summed)]
    figure = Figure(figsize=(8, 1.2 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for name, colour, height in (("made", _MADE, 0.8), ("kept", _KEPT, 0.56), ("exported", _EXPORTED, 0.3)):
        widths = [own[name] for _, own in rows]
        axes.barh(range(len(rows)), widths, height, color=colour, label=name, zorder=2)
    axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("instructions")
    _plain(figure)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, format="png")
    return figure


def _short(name: str) -> str:
    name = name.replace("$", r"\$")  # matplotlib would read mathematics
    return name if len(name) <= 45 else f"{name[:44].rstrip()}…"


def _plain(figure: "Figure") -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_label_text() in ("versions", "instructions"):
                axis.set_major_locator(MaxNLocator(integer=True))
