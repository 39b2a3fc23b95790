"""Performance gap recovered (weak-to-strong generalization, arXiv 2312.09390) and its bootstrap interval.

PGR = (strong - weak) / (ceiling - weak): 0 where the strong model is no better than its teacher, 1 where it is as good
as the same model trained on true labels.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np


# A gap below this is rounding of equal scores, not a gap.
SMALLEST_GAP = 1e-12
# Share of resamples without a gap above which the rest no longer stands for all of them.
MOST_UNDEFINED = 0.05
# Numbers held by one block of draws (16 MiB of float64).
BLOCK = 1 << 21


def performance_gap_recovered(
    weak: float, strong: float, ceiling: float, *, higher_is_better: bool = True
) -> float | None:
    """Share of the gap between a weak model and the ceiling that the strong model recovered.

    Args:
        weak, strong, ceiling: One score each, in the same unit.
        higher_is_better: False for losses, error rates and toxicity.

    Returns:
        Below 0 where the strong model is worse than its teacher, above 1 where it is better than the ceiling; None
        where it is undefined, because the ceiling is not better than the weak model (`why_undefined` says so).
    """
    if why_undefined(weak, ceiling, higher_is_better=higher_is_better):
        return None
    return (strong - weak) / (ceiling - weak)


def why_undefined(weak: float, ceiling: float, *, higher_is_better: bool = True) -> str | None:
    """The reason for which there is no gap to recover; None where there is one."""
    gap = ceiling - weak if higher_is_better else weak - ceiling
    if gap > SMALLEST_GAP:
        return None
    side = "above" if higher_is_better else "below"
    return f"the ceiling ({ceiling:.3f}) is not {side} the weak model ({weak:.3f})"


def pgr_interval(
    weak: Sequence[Any],
    strong: Sequence[Any],
    ceiling: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    joint: bool = True,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """PGR of mean scores over items and seeds, with the interval of a bootstrap over both.

    The ratio is taken of means over seeds, not averaged over seeds: a seed with a small gap would decide the latter.

    Args:
        weak, strong, ceiling: A value for every test item, e.g. 1.0 where a model is right and 0.0 where not: `(N,)`
            for one seed, or a sequence over seeds of such arrays, in the same order for the three.
        groups: Which items belong together (None: an item by itself) and are drawn together, `(N,)`; with
            `joint=False` and several seeds a sequence over seeds.
        joint: The items are the same in every seed, and a resample takes the same ones from each.
        higher_is_better, confidence, resamples, seed: Of `performance_gap_recovered` and of the bootstrap.

    Returns:
        JSON-ready: see `summarise_pgr`.

    Raises:
        ValueError: Arrays that differ in length, numbers that are not finite, fewer than two items or groups.
    """
    models = [_over_seeds(values, name) for values, name in zip((weak, strong, ceiling), _ROLES, strict=True)]
    if len({len(values) for values in models}) > 1:
        counts = ", ".join(f"{name} {len(values)}" for values, name in zip(models, _ROLES, strict=True))
        raise ValueError(f"weak, strong and ceiling must have the same seeds, got {counts}; leave out the others")
    by_seed = [groups] * len(models[0]) if joint or len(models[0]) == 1 else groups
    units = [
        sums_by_group(_with_counts(values, i), None if by_seed is None else by_seed[i])
        for i, values in enumerate(zip(*models, strict=True))
    ]
    point = np.mean([_means(own.sum(axis=0)) for own in units], axis=0)[:, 0]
    draws = resampled_scores(units, _means, joint=joint, resamples=resamples, seed=seed)[:, :, 0]
    return summarise_pgr(point, draws, higher_is_better=higher_is_better, confidence=confidence)


def summarise_pgr(
    point: np.ndarray, draws: np.ndarray, *, higher_is_better: bool = True, confidence: float = 0.95
) -> dict[str, Any]:
    """PGR from scores and from their resamples.

    Args:
        point: `(3,)`: weak, strong, ceiling.
        draws: `(R, 3)`: the same in every resample.
        higher_is_better, confidence: See `pgr_interval`.

    Returns:
        JSON-ready: `value`, `low`, `high` (percentiles over the resamples that have a gap); `reason`, the cause
        why there is no value and no interval, else None; `undefined_share`, the share of resamples without a gap;
        `reliable`, False where that share is above 5 %, because the interval then describes a selection of them.
    """
    sign = 1.0 if higher_is_better else -1.0
    gaps = sign * (draws[:, 2] - draws[:, 0])
    defined = gaps > SMALLEST_GAP
    share = float((~defined).mean())
    weak, strong, ceiling = (float(number) for number in point)
    result: dict[str, Any] = {
        "value": performance_gap_recovered(weak, strong, ceiling, higher_is_better=higher_is_better),
        "low": None,
        "high": None,
        "reason": why_undefined(weak, ceiling, higher_is_better=higher_is_better),
        "undefined_share": share,
        "reliable": share <= MOST_UNDEFINED,
    }
    if result["reason"] is None and defined.any():
        ratios = sign * (draws[defined, 1] - draws[defined, 0]) / gaps[defined]
        result["low"], result["high"] = percentiles(ratios, confidence)
    return result


def summarise_difference(point: float, draws: np.ndarray, *, confidence: float = 0.95) -> dict[str, float]:
    """A paired difference: `value`, `low`, `high` and `above_zero`, the share of resamples above 0.

    Args:
        point: The difference itself.
        draws: `(R,)`: the difference in every resample.
        confidence: Coverage, in (0, 1).
    """
    low, high = percentiles(draws, confidence)
    return {"value": float(point), "low": low, "high": high, "above_zero": float((draws > SMALLEST_GAP).mean())}


def percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """Low and high bound of the middle `confidence` of some resamples `(R,)`."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1, e.g. 0.95")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sums_by_group(rows: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Sum `(N, ...)` over the rows of each group, groups in order of appearance; a row in group None stays alone.

    Raises:
        ValueError: Another number of groups than rows.
    """
    if groups is None:
        return rows
    if len(groups) != len(rows):
        raise ValueError(f"{len(groups)} groups for {len(rows)} rows: give one group (or None) a row")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault((i,) if g is None else g, len(numbers)) for i, g in enumerate(groups)]
    sums = np.zeros((len(numbers), *rows.shape[1:]))
    np.add.at(sums, index, rows)
    return sums


def resampled_scores(
    units: Sequence[np.ndarray],
    value: Callable[[np.ndarray], np.ndarray],
    *,
    joint: bool,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Hierarchical bootstrap: draw seeds with replacement and, in each seed drawn, its units with replacement.

    Models share every draw, so differences and ratios of their scores are paired.

    Args:
        units: An array `(U, M, F)` a seed: F statistics summed over each of U units (rows, or groups of them), for M
            models. Any score that depends on rows through sums will do: accuracy, recall, F1, a mean loss.
        value: From sums `(..., F)` to scores `(..., J)`.
        joint: The units are the same in every seed, and a resample takes the same ones from each seed drawn: what
            makes a test row hard is then no news in the next seed. Otherwise each seed drawn has a draw of its own.
        resamples: How often (R).
        seed: Of the draws.

    Returns:
        `(R, M, J)`: means of the scores over the seeds drawn.

    Raises:
        ValueError: Fewer than two units in a seed, no resamples, or `joint` with unlike numbers of units.
    """
    sizes = [len(own) for own in units]
    if not sizes or min(sizes) < 2:
        raise ValueError(f"an interval needs at least two rows (or groups of rows) a seed, got {sizes}: test on more")
    if joint and len(set(sizes)) > 1:
        raise ValueError(f"the seeds have {sizes} rows (or groups), so they are not the same rows: use joint=False")
    if resamples < 1:
        raise ValueError(f"resamples = {resamples} must be at least 1; 2000 are usual")
    random = np.random.default_rng(seed)
    draw = _joint_block if joint else _separate_block
    step = max(1, BLOCK // max(sizes))
    blocks = [
        draw(random, units, value, min(step, resamples - start)) / len(units) for start in range(0, resamples, step)
    ]
    return np.concatenate(blocks)


def _joint_block(random: np.random.Generator, units: Sequence[np.ndarray], value: Callable, size: int) -> np.ndarray:
    """Sum over the seeds drawn, `(size, M, J)`."""
    counts = _times_drawn(random, size, len(units[0]))
    seeds = _times_drawn(random, size, len(units))
    return sum(
        times[:, None, None] * value(_weighted_sums(counts, own)) for times, own in zip(seeds.T, units, strict=True)
    )


def _separate_block(
    random: np.random.Generator, units: Sequence[np.ndarray], value: Callable, size: int
) -> np.ndarray:
    total = 0.0
    for _ in units:
        chosen = random.integers(len(units), size=size)
        scores = None
        for i, own in enumerate(units):
            here = np.flatnonzero(chosen == i)
            found = value(_weighted_sums(_times_drawn(random, len(here), len(own)), own))
            if scores is None:
                scores = np.empty((size, *found.shape[1:]))
            scores[here] = found
        total = total + scores
    return total


def _times_drawn(random: np.random.Generator, size: int, n: int) -> np.ndarray:
    """How often each of n things is among n drawn with replacement, `(size, n)`."""
    drawn = random.integers(n, size=(size, n))
    drawn += np.arange(size)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _weighted_sums(counts: np.ndarray, units: np.ndarray) -> np.ndarray:
    n, models, statistics = units.shape
    return (counts @ units.reshape(n, models * statistics)).reshape(len(counts), models, statistics)


_ROLES = ("weak", "strong", "ceiling")


def _over_seeds(values: Sequence[Any], name: str) -> list[np.ndarray]:
    if not len(values):
        raise ValueError(f"{name} is empty: give a value for every test item")
    one_seed = np.ndim(values[0]) == 0
    arrays = [np.asarray(own, dtype=float) for own in ([values] if one_seed else values)]
    for i, own in enumerate(arrays):
        if own.ndim != 1:
            raise ValueError(f"{name}, seed {i}: expected one number an item, got an array of shape {own.shape}")
        if not np.isfinite(own).all():
            item = int(np.argmin(np.isfinite(own)))
            raise ValueError(f"{name}, seed {i}, item {item}: {own[item]} is no score; give finite numbers")
    return arrays


def _with_counts(values: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """`(N, M, 2)`: values, and ones to divide their sum by."""
    lengths = [len(own) for own in values]
    if len(set(lengths)) > 1:
        raise ValueError(f"seed {seed}: weak, strong and ceiling have {lengths} items; score the same ones")
    stacked = np.stack(values, axis=1)
    return np.stack([stacked, np.ones_like(stacked)], axis=2)


def _means(sums: np.ndarray) -> np.ndarray:
    return sums[..., :1] / sums[..., 1:]
