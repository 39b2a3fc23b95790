"""Confidence intervals for a share and for a ratio of two sums."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927), sensible at 0 and 1 too, where the usual +- is zero wide.

    The bounds are the shares p that lie z standard errors from the observed one, the error taken at p itself:
    (successes / n - p)^2 = z^2 p (1 - p) / n.

    Args:
        successes: How many of `n` have the property. Need not be whole, for counts reduced to an effective size.
        n: Independent observations.
        confidence: Coverage, in (0, 1).

    Returns:
        Low and high bound, in [0, 1]; (0, 1) for n = 0, where nothing is known.

    Raises:
        ValueError: If `successes` is not within [0, n], or `confidence` not within (0, 1).
    """
    z = _normal_quantile(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"successes = {successes} must lie between 0 and n = {n}.")
    if n == 0:
        return 0.0, 1.0
    # Multiplied out by n: no 0 / 0, and a zero count gives a bound of exactly zero.
    centre = successes + z * z / 2
    half = z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
    return 0.0 if successes == 0 else max(low, 0.0), 1.0 if successes == n else min(high, 1.0)


def bootstrap_ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators), drawing whole rows with replacement.

    For quantities per token, where rows differ in length and tokens of one row are not independent of each other.
    Where every numerator is zero every resample is too, and the interval is (0, 0): it cannot tell zero from rare.

    Args:
        numerators: One number a row, e.g. its spans, or its KL in nats summed over tokens.
        denominators: One number >= 0 a row, e.g. its tokens. Rows with zero tokens are left out.
        confidence: Coverage, in (0, 1).
        resamples: How often to draw.
        seed: Of the draws; the same rows and seed give the same interval.

    Returns:
        Low and high bound in the unit of the ratio; (nan, nan) with fewer than two rows.

    Raises:
        ValueError: If the two differ in length, a number is not finite, a denominator is negative, a row has a
            numerator but no denominator, or `confidence` is not within (0, 1).
    """
    _normal_quantile(confidence)
    numerators, denominators = _checked_rows(numerators, denominators)
    rows = len(denominators)
    if rows < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        drawn = random.integers(rows, size=rows)
        ratios[i] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1, e.g. 0.95.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _checked_rows(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, without the rows that have no tokens."""
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators but {len(denominators)} denominators: give one of each a row.")
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    bad = ~np.isfinite(numerators) | ~np.isfinite(denominators) | (denominators < 0)
    bad |= (denominators == 0) & (numerators != 0)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"row {row}: {numerators[row]} over {denominators[row]} is no ratio; both must be finite, the denominator "
            "not negative, and above zero where the numerator is not zero."
        )
    return numerators[denominators > 0], denominators[denominators > 0]
