"""The figure beside the tables: what is saved, and how cost grows."""

import statistics
from pathlib import Path

from .cases import SamiCase, SamiGrowth, TntCase, TntGrowth


_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8c8c8c")


def draw(results, path: Path) -> None:
    """Draw what was measured so far."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    _sami(axes[0, 0], results)
    _tnt(axes[0, 1], results)
    _growth(axes[1, 0], results, SamiGrowth, "constitutions C")
    _growth(axes[1, 1], results, TntGrowth, "vocabulary")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _sami(axis, results) -> None:
    cases = results.of(SamiCase)
    prompts = sorted({case.prompt for case in cases})
    for place, prompt in enumerate(prompts):
        own = sorted((case for case in cases if case.prompt == prompt), key=lambda case: case.constitutions)
        shifted = [case.constitutions + 0.25 * (place - (len(prompts) - 1) / 2) for case in own]
        heights = [statistics.median(results.ratios(case, "plain", "ours")) for case in own]
        drawn = axis.bar(shifted, heights, width=0.23, color=_COLOURS[place], label=f"prompt of {prompt} tokens")
        axis.bar_label(drawn, fmt="%.1f", fontsize=8)
    axis.set_title("SAMI step: times faster than the plain C x C path")
    axis.set_xlabel("constitutions C; responses of 60 tokens")
    axis.set_ylabel("CPU time, plain / ours")
    if cases:
        axis.set_xticks(sorted({case.constitutions for case in cases}))
        axis.legend(frameon=False)


def _tnt(axis, results) -> None:
    case = next((case for case in results.of(TntCase) if not case.frozen_head), None)
    axis.set_title("TNT step, 4 x 256 tokens: against full logits")
    axis.set_ylabel("relative to dense")
    if case is None:
        return
    names = list(case.paths)
    measures = {
        "CPU time": [statistics.median(results.ratios(case, name, "dense")) for name in names],
        "memory beyond the models": [results.memory_ratio(case, name, "dense") or 0.0 for name in names],
    }
    for place, (label, heights) in enumerate(measures.items()):
        shifted = [i + 0.4 * place - 0.2 for i in range(len(names))]
        drawn = axis.bar(shifted, heights, width=0.38, color=_COLOURS[place], label=label)
        axis.bar_label(drawn, fmt="%.2f", fontsize=8)
    labels = {"dense": "full logits", "distillation": "TRL's\ndistillation loss", "no head": "no head\nat all"}
    axis.set_xticks(range(len(names)), [labels.get(name, name) for name in names])
    axis.set_ylim(top=1.2 * max(height for heights in measures.values() for height in heights))
    axis.legend(frameon=False, ncols=2, loc="upper center")


def _growth(axis, results, kind: type, label: str) -> None:
    case = next(iter(results.of(kind)), None)
    axis.set_visible(case is not None)
    if case is None:
        return
    axis.set_xlabel(label)
    first = case.paths[0]
    axis.set_title(f"How ours grows: {case.name}")
    axis.set_ylabel(f"relative to {first}")
    sizes = [int(path) for path in case.paths]
    times = [statistics.median(results.ratios(case, path, first)) for path in case.paths]
    memory = [results.memory_ratio(case, path, first) for path in case.paths]
    axis.plot(sizes, times, "o-", color=_COLOURS[0], label="CPU time")
    if None not in memory:
        axis.plot(sizes, memory, "s-", color=_COLOURS[1], label="memory beyond the models")
    power = 2 if kind is SamiGrowth else 1
    expected = [(size / sizes[0]) ** power for size in sizes]
    axis.plot(sizes, expected, ":", color=_COLOURS[3], label="C²" if power == 2 else "proportional")
    axis.set_xticks(sizes, [str(size) if size < 1000 else f"{size / 1000:.0f}k" for size in sizes])
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
