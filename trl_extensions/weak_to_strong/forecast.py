"""What a student gained over its weak teacher, forecast without a true label.

Where the two disagree, one of them is right more often. A third party that learnt from neither tells which: it sides
with that one. Let kappa(a, b) be the agreement of two classifiers beyond chance, P(a = b) - sum_k P(a = k) P(b = k).
If teacher, student and checker err independently of each other given the true class, then for two classes kappa(a, b)
= 2 pi (1 - pi) J(a) J(b), J being informedness, 2 x balanced accuracy - 1 (Dawid and Skene 1979; Parisi et al. 2014).
The ratio kappa(student, checker) / kappa(teacher, checker) is then J(student) / J(teacher), whatever the checker
knows. With two checkers J(teacher) itself follows, and the gain in balanced accuracy. For more classes this is exact
where every classifier errs alike in all of them.

Theory bounds the gain by the disagreement of teacher and student (arXiv 2405.15116) without saying how much of it is
gain; arXiv 2502.00620 ranks pairs of models by their representations. What is read here is agreement only, as in arXiv
2206.13089.

A checker that errs like the teacher (the same kind of model, the same training rows) makes the forecast too low, one
that errs like the student (the same features) too high, and no number in the predictions shows it.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.stats import Spread
from .evaluation import CONFIDENCE, sums_by_group


def forecast(
    teacher: Sequence[np.ndarray],
    student: Sequence[np.ndarray],
    checkers: Mapping[str, Sequence[np.ndarray]],
    *,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Forecast a student's gain from the classes that it, its teacher and checkers predict.

    Args:
        teacher, student: Predicted classes `(N,)` of the same rows, one array a seed.
        checkers: Name -> the same, of models or annotators that neither learnt from the teacher nor taught it.
        groups: Which rows belong together (None: a row by itself), `(N,)`.

    Returns:
        JSON-ready estimates `value`, `low`, `high` (no bounds of one seed): `disagreement` of teacher and student, the
        most that can have been gained; `ratio` of their informedness by all checkers together and, in `by_checker`, by
        each; `gain` in balanced accuracy, of two checkers or more. `reason` where a value is None: what makes the
        forecast worth nothing.
    """
    if not checkers:
        nothing = _estimate(None, reason="nobody checks: name `check_models` that learn from other labels")
        shares = [float((t != s).mean()) for t, s in zip(teacher, student, strict=True)]
        own = {"disagreement": _estimate(float(np.mean(shares))), "by_checker": {}}
        return {"checkers": [], "ratio": nothing, "gain": nothing} | own
    classes = 1 + max(int(np.max(own)) for own in (*teacher, *student, *(a for own in checkers.values() for a in own)))
    runs = [np.stack([t, s, *own]) for t, s, *own in zip(teacher, student, *checkers.values(), strict=True)]
    apart = np.stack([(said[0] != said[1]).astype(float) for said in runs])[..., None]
    places = [(a, b) for b in range(len(runs[0])) for a in range(b) if b > 1]
    kappas = np.stack([_beyond_chance(said, places, classes) for said in runs])
    one = len(runs) == 1
    disagreement = _spread(apart, groups).interval(np.ones(1)) if not one else (None, None)
    result: dict[str, Any] = {
        "checkers": list(checkers),
        "disagreement": _estimate(float(apart.mean()), disagreement),
        "by_checker": {},
    }
    spread = _spread(kappas, groups)
    pairs = {pair: place for place, pair in enumerate(places)}

    def of(first: int, over: Sequence[int]) -> np.ndarray:
        weights = np.zeros(len(places))
        weights[[pairs[first, b] for b in over]] = 1
        return weights

    numbers = range(2, len(runs[0]))
    for name, number in zip(checkers, numbers, strict=True):
        result["by_checker"][name] = _ratio(spread, of(1, [number]), of(0, [number]), one)
    result["ratio"] = _ratio(spread, of(1, numbers), of(0, numbers), one)
    called = np.bincount(np.concatenate(teacher), minlength=classes) / sum(map(len, teacher))
    result["gain"] = _gain(spread, of, pairs, numbers, 1 - float(called @ called), one)
    return result


def _beyond_chance(said: np.ndarray, places: Sequence[tuple[int, int]], classes: int) -> np.ndarray:
    """What each row adds to kappa of pairs of classifiers, `(N, P)`, in units of one row, from classes `(M, N)`."""
    shares = np.stack([np.bincount(own, minlength=classes) / len(own) for own in said])
    columns = []
    for a, b in places:
        by_chance = shares[b][said[a]] + shares[a][said[b]] - shares[a] @ shares[b]
        columns.append((said[a] == said[b]) - by_chance)
    return np.stack(columns, axis=1)


def _spread(rows: np.ndarray, groups: Sequence[Hashable] | None) -> Spread:
    """Of means over rows `(S, N, F)`."""
    means = rows.mean(axis=1)
    units = np.stack([sums_by_group(own - mean, groups) for own, mean in zip(rows, means, strict=True)])
    return Spread.of(means, units * units.shape[1] / rows.shape[1], fixed_seeds=len(rows) == 1)


def _estimate(
    value: float | None, bounds: tuple[Any, Any] = (None, None), reason: str | None = None
) -> dict[str, Any]:
    return {"value": value, "low": bounds[0], "high": bounds[1], "reason": reason}


def _ratio(spread: Spread, above: np.ndarray, below: np.ndarray, one: bool) -> dict[str, Any]:
    bounds = spread.ratio(above, below, CONFIDENCE)
    if bounds is None or below @ spread.mean < 0:
        return _estimate(None, reason="checker and teacher do not clearly agree more often than by chance")
    return _estimate(float(above @ spread.mean / (below @ spread.mean)), (None, None) if one else bounds)


def _gain(
    spread: Spread, of: Any, pairs: Mapping, numbers: Sequence[int], variety: float, one: bool
) -> dict[str, Any]:
    """Gain in balanced accuracy, its interval by the delta method; J(teacher)^2 is kappa(teacher, b) kappa(teacher, c)
    over kappa(b, c) and `variety`, the chance that two rows differ in class."""
    if len(numbers) < 2:
        return _estimate(None, reason="one checker gives a ratio only: name another one")
    among = np.zeros(len(spread.mean))
    among[[pairs[b, c] for c in numbers for b in numbers if b < c]] = 1
    above, below = of(1, numbers), of(0, numbers)
    if any(w @ spread.mean <= spread.half_width(w, CONFIDENCE) for w in (below, among)) or not variety:
        return _estimate(None, reason="checkers and teacher do not clearly agree more often than by chance")
    number = len(numbers)

    def gain(kappas: np.ndarray) -> float:
        mean = {"teacher": kappas @ below / number, "among": kappas @ among / (number * (number - 1) / 2)}
        informed = np.sqrt(max(mean["teacher"] ** 2 / mean["among"] / variety, 0.0))
        return float((kappas @ above / (kappas @ below) - 1) * min(informed, 1.0) / 2)

    steps = 1e-6 * np.eye(len(spread.mean))
    slopes = np.array([(gain(spread.mean + step) - gain(spread.mean - step)) / 2e-6 for step in steps])
    value, half = gain(spread.mean), spread.half_width(slopes, CONFIDENCE)
    return _estimate(value, (None, None) if one else (value - half, value + half))
