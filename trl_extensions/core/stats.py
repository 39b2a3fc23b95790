"""Confidence intervals: Wilson's for a share, Cochran's t for means over seeds and rows and for their ratios, the
percentile bootstrap for everything else."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from .extras import import_extra


BLOCK = 1 << 21  # numbers held by one block of resamples (16 MiB of float64)


def wilson(successes: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927), sensible at 0 and 1 too, where the usual +- is zero wide.

    The bounds are the shares p that lie z standard errors from the observed one, the error taken at p itself:
    (successes / total - p)^2 = z^2 p (1 - p) / total. Counts reduced to an effective size need not be whole (such
    `scipy.stats.binomtest` does not take); of no observations the interval is (0, 1).
    """
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    if not 0 <= successes <= total:
        raise ValueError(f"successes = {successes} must lie between 0 and total = {total}.")
    if total == 0:
        return 0.0, 1.0
    # Multiplied out by the total: no 0 / 0, and a zero count gives a bound of exactly zero.
    centre = successes + z * z / 2
    half = z * math.sqrt(successes * (total - successes) / total + z * z / 4)
    low, high = (centre - half) / (total + z * z), (centre + half) / (total + z * z)
    return 0.0 if successes == 0 else max(low, 0.0), 1.0 if successes == total else min(high, 1.0)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    rows: int,
    *,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of anything that depends on how often each of N rows counts.

    Args:
        statistic: From how often each row is drawn, `(R, N)`, to the values of R resamples, `(R,)`; resamples whose
            value is nan are left out, and if all are the interval is (None, None).
        groups: What rows belong to, `(N,)`: those of a group are drawn together, one in group None by itself.
        strata: Parts of which each resample has as many rows (or groups) as the data, `(N,)`.
    """
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples = {resamples} must be at least 1; 2000 are usual")
    index = group_index(groups, rows)[0]
    parts = np.zeros(rows) if strata is None else np.asarray(strata)
    members = [np.flatnonzero(parts == part) for part in np.unique(parts)]
    units = [np.unique(index[own], return_inverse=True)[1] for own in members]
    generators = [np.random.default_rng(seed + number) for number in range(len(members))]
    size, values = max(1, BLOCK // rows), []
    for start in range(0, resamples, size):
        times = np.empty((min(size, resamples - start), rows))
        for own, unit, generator in zip(members, units, generators, strict=True):
            number = int(unit.max()) + 1
            times[:, own] = generator.multinomial(number, np.full(number, 1 / number), size=len(times))[:, unit]
        values.append(statistic(times))
    found = np.concatenate(values)
    found = found[~np.isnan(found)]
    return percentiles(found, confidence) if len(found) else (None, None)


@dataclass(frozen=True)
class Spread:
    """How far means over seeds of F scores, measured on the same U test rows, lie from what further seeds and rows
    would give: the mean, and two parts of its covariance.

    Rows that every seed finds hard make an error that more seeds do not lessen; `rows` `(F, F)` is that part, known to
    U - 1 degrees of freedom. `seeds` `(F, F)`, what seeds differ by, the rows that only one finds hard among it, is
    known to S - 1 only; None where seeds are left out, and `rows` then is all there is.
    """

    mean: np.ndarray
    rows: np.ndarray
    seeds: np.ndarray | None
    row_df: int
    seed_df: int = 0

    @classmethod
    def of(cls, values: np.ndarray, influence: np.ndarray, *, fixed_seeds: bool = False) -> "Spread":
        """From values `(S, F)` and what each of U rows (or groups of rows) adds to them, `(S, U, F)`, in units of one
        row: of a mean, the row's own value. `fixed_seeds`: say nothing of other seeds; else S is at least 2."""
        number, units = influence.shape[:2]
        if units < 2:
            raise ValueError(f"an interval needs at least two rows (or groups of rows), got {units}: test on more")
        if number < 2 and not fixed_seeds:
            raise ValueError("an interval needs at least two seeds: one does not show what another would change")
        rows = _covariance(influence.mean(axis=0)) / units
        if fixed_seeds:
            return cls(values.mean(axis=0), rows, None, units - 1)
        # What a seed's own hard rows add to `rows` is in the differences between seeds already
        own = (sum(map(_covariance, influence)) / number / units - rows) / (number - 1)
        return cls(values.mean(axis=0), rows - own, _covariance(values) / number, units - 1, number - 1)

    def half_width(self, weights: np.ndarray, confidence: float = 0.95) -> float:
        """Half the interval of a weighted sum `(F,)` of the scores: Cochran's t (Cochran 1964), the mean of the two
        parts' t quantiles weighted by their variances. It errs on the wide side where neither part is small."""
        rows = max(float(weights @ self.rows @ weights), 0.0)
        if self.seeds is None:
            return _t(confidence, self.row_df) * math.sqrt(rows)
        seeds = max(float(weights @ self.seeds @ weights), 0.0)
        if rows + seeds == 0:
            return 0.0
        return (_t(confidence, self.row_df) * rows + _t(confidence, self.seed_df) * seeds) / math.sqrt(rows + seeds)

    def interval(self, weights: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
        """Low and high bound of a weighted sum `(F,)` of the scores."""
        value, half = float(weights @ self.mean), self.half_width(weights, confidence)
        return value - half, value + half

    def ratio(
        self, numerator: np.ndarray, denominator: np.ndarray, confidence: float = 0.95
    ) -> tuple[float, float] | None:
        """Interval of a ratio of two weighted sums after Fieller (1940): all r for which 0 lies in the interval of
        numerator - r * denominator. None where the denominator's own interval holds 0: no bounds follow then."""
        _check_confidence(confidence)
        below = float(denominator @ self.mean)
        if abs(below) <= self.half_width(denominator, confidence):
            return None
        value = float(numerator @ self.mean) / below

        def outside(r: float) -> float:
            weights = numerator - r * denominator
            return abs(float(weights @ self.mean)) - self.half_width(weights, confidence)

        if outside(value) >= 0:  # no error at all
            return value, value
        bounds = []
        for side in (-1, 1):
            step = 0.5
            while outside(value + side * step) < 0:
                step *= 2
            bounds.append(import_extra("scipy.optimize").brentq(outside, value, value + side * step, xtol=1e-9))
        return bounds[0], bounds[1]


def _covariance(rows: np.ndarray) -> np.ndarray:
    """`(F, F)` of `(N, F)`, by N - 1."""
    centred = rows - rows.mean(axis=0)
    return centred.T @ centred / (len(rows) - 1)


@cache
def _t(confidence: float, df: int) -> float:
    _check_confidence(confidence)
    return float(import_extra("scipy.special").stdtrit(df, (1 + confidence) / 2))


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators), drawing whole rows with replacement.

    For quantities per token (spans, or nats of KL, over tokens): rows differ in length, and tokens of one row are not
    independent. Rows of denominator 0 are left out; with fewer than two others the interval is (nan, nan). Where every
    numerator is zero it is (0, 0): it cannot tell zero from rare.
    """
    _check_confidence(confidence)
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators but {len(denominators)} denominators: give one of each a row.")
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    bad = ~np.isfinite(above) | ~np.isfinite(below) | (below < 0) | ((below == 0) & (above != 0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"row {row}: {above[row]} over {below[row]} is no ratio of finite numbers, the second >= 0.")
    above, below = above[below > 0], below[below > 0]
    if len(below) < 2:
        return math.nan, math.nan
    found = import_extra("scipy.stats").bootstrap(
        (above, below),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BLOCK // len(below)),
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def percentiles(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Low and high bound of the middle `confidence` of some resamples `(R,)`."""
    _check_confidence(confidence)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def group_index(groups: Sequence[Hashable] | None, rows: int) -> tuple[np.ndarray, int]:
    """For each row the number of its group, in order of appearance, and how many there are; None is a group of one."""
    if groups is None:
        return np.arange(rows), rows
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows: give one group (or None) a row")
    numbers: dict[Hashable, int] = {}
    keys = ((row,) if group is None else group for row, group in enumerate(groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys]), len(numbers)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1, e.g. 0.95.")
