"""How often one side wins: the raw rate, and two that do not pay for length.

Judges like long answers. Two ways take that out: an average over strata of who wrote more, and a regression that says
what the rate would be at equal length. Both are only as good as the overlap of lengths in the data.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ..stats import bootstrap, group_index, wilson


WIN, TIE, LOSS = 1.0, 0.5, 0.0
STRATA = ("shorter", "equal", "longer")
EQUAL_WITHIN = 1.2
"""Answers are about equally long if neither is more than this times as long as the other."""

_PRECISE = 1e-9


def win_rate(
    outcomes: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The mean outcome, a tie being half a win.

    The interval is Wilson's where rows are independent (too wide rather than too narrow where there are ties), with
    groups a percentile bootstrap over them; where all rows have one outcome, Wilson's over the number of groups.

    Args:
        outcomes: 1 win, 0.5 tie, 0 loss, `(N,)`.
        groups: What rows belong to, such as the query, `(N,)`; rows of a group are drawn together.
        confidence: Coverage, in (0, 1).
        resamples, seed: Of the bootstrap.

    Returns:
        JSON-ready: `value`, `low`, `high`, `n`, and `interval`, "wilson" or "bootstrap".

    Raises:
        ValueError: No rows, an outcome that is none of the three (names the row), or another number of groups.
    """
    values = check_outcomes(outcomes)
    number = group_index(groups, len(values))[1]
    value = float(values.mean())
    result = {"value": value, "n": len(values)}
    if groups is None or number < 2 or np.ptp(values) == 0:
        low, high = wilson(value * number, number, confidence)
        return result | {"low": low, "high": high, "interval": "wilson"}
    settings: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    bounds = bootstrap(lambda times: times @ values / times.sum(axis=1), len(values), groups=groups, **settings)
    return result | {"low": bounds[0], "high": bounds[1], "interval": "bootstrap"}


def length_balanced(
    outcomes: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The mean of the win rates among answers that are shorter, about equally long (`EQUAL_WITHIN`) and longer.

    Strata without rows are left out and named. A stratum of few rows has as much weight as one of many: the interval
    is not to be trusted where one has less than about five. It is a percentile bootstrap within strata; with groups,
    whole groups are drawn, and resamples that leave a stratum empty are left out.

    Args:
        outcomes: 1 win, 0.5 tie, 0 loss, `(N,)`.
        lengths: Of the answers whose wins are counted, in any unit, `(N,)`.
        other_lengths: Of the answers of the other side, in the same unit.
        groups, confidence, resamples, seed: See `win_rate`.

    Returns:
        JSON-ready: `value`, `low`, `high` (None where no resample has all strata), `strata`: name -> `{"n", "value"}`,
        and `empty`: the names of those without rows.

    Raises:
        ValueError: As `win_rate`; columns of unlike lengths, or a length that is negative or not finite.
    """
    values = check_outcomes(outcomes)
    ratio = _log_ratio(lengths, other_lengths, len(values))
    band = math.log(EQUAL_WITHIN) + _PRECISE
    stratum = np.where(ratio < -band, 0, np.where(ratio > band, 2, 1))
    members = {name: np.flatnonzero(stratum == k) for k, name in enumerate(STRATA) if k in stratum}

    def balanced(times: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # nan where a stratum is empty
            rates = [(times[:, rows] @ values[rows]) / times[:, rows].sum(axis=1) for rows in members.values()]
        return np.mean(rates, axis=0)

    drawn: dict[str, Any] = {"strata": stratum} if groups is None else {"groups": groups}
    low, high = bootstrap(balanced, len(values), **drawn, resamples=resamples, confidence=confidence, seed=seed)
    strata: dict[str, dict[str, Any]] = {name: {"n": 0, "value": None} for name in STRATA}
    strata |= {name: {"n": len(rows), "value": float(values[rows].mean())} for name, rows in members.items()}
    value, empty = float(balanced(np.ones((1, len(values))))[0]), [name for name in STRATA if name not in members]
    return {"value": value, "low": low, "high": high, "strata": strata, "empty": empty}


def length_adjusted(
    outcomes: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The win rate at equal length, by logistic regression, as length-controlled AlpacaEval (arXiv 2404.04475) has it.

    P(win) = sigmoid(intercept + slope tanh(r / s)), r being the log of the ratio of lengths (each plus 1, so that an
    empty answer has one) and s its root mean square: not its standard deviation around a mean, because 0 must stay
    equal length. The value is sigmoid(intercept). A tie counts as half a win and half a loss.

    The slope has scikit-learn's L2 penalty (C = 1), so that it stays finite where length alone decides. With outcomes
    of one kind, or answers all equally long, there is nothing to fit: the value is the raw rate. Where one side is
    longer throughout, the value is an extrapolation: `overlap`, the smaller of the shares of rows in which either side
    is longer, is then 0. The interval is a percentile bootstrap over rows or groups, each fitted anew with the same s.

    Args:
        outcomes, lengths, other_lengths: See `length_balanced`.
        groups, confidence, resamples, seed: See `win_rate`.

    Returns:
        JSON-ready: `value`, `low`, `high`, `slope`, `overlap`; `reason`, why the value is the raw rate, else None.

    Raises:
        ValueError: As `length_balanced`.
    """
    values = check_outcomes(outcomes)
    ratio = _log_ratio(lengths, other_lengths, len(values))
    overlap = float(min((ratio > 0).mean(), (ratio < 0).mean()))
    settings: dict[str, Any] = {"groups": groups, "resamples": resamples, "confidence": confidence, "seed": seed}
    reason = "all outcomes are the same" if np.ptp(values) == 0 else None
    if reason is None and not ratio.any():
        reason = "all answers are equally long"
    if reason is not None:
        raw = win_rate(outcomes, **settings)
        kept = {name: raw[name] for name in ("value", "low", "high")}
        return kept | {"slope": 0.0, "overlap": overlap, "reason": reason}
    x = np.tanh(ratio / math.sqrt(float(np.mean(ratio**2))))
    low, high = bootstrap(lambda times: _sigmoid(fit_logistic(x, values, times)[:, 0]), len(values), **settings)
    intercept, slope = fit_logistic(x, values, np.ones((1, len(values))))[0]
    value = float(_sigmoid(intercept))
    return {"value": value, "low": low, "high": high, "slope": float(slope), "overlap": overlap, "reason": None}


def fit_logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Intercept and slope `(R, 2)` of logistic regressions on x `(N,)` of y in [0, 1], for many weightings `(R, N)`.

    Minimises sum_i w_i CE(y_i, sigmoid(a + b x_i)) + b^2 / 2 by Newton's method, as `LogisticRegression` of
    scikit-learn does for one weighting in two milliseconds; a bootstrap has thousands. The intercept is -inf or inf,
    and the slope 0, where all rows with weight are lost or won.
    """
    won, total = weights @ y, weights.sum(axis=1)
    one_sided = (won <= 0) | (won >= total)
    solution = np.zeros((len(weights), 2))
    solution[one_sided, 0] = np.where(won <= 0, -np.inf, np.inf)[one_sided]
    open_ = np.flatnonzero(~one_sided)
    for _ in range(100):
        if not len(open_):
            break
        own = weights[open_]
        p = _sigmoid(solution[open_, :1] + solution[open_, 1:] * x)
        residual, spread = own * (p - y), own * p * (1 - p)
        first, second = residual.sum(axis=1), residual @ x + solution[open_, 1]
        aa, ab, bb = spread.sum(axis=1), spread @ x, spread @ x**2 + 1
        step = np.stack([bb * first - ab * second, aa * second - ab * first], axis=1) / (aa * bb - ab**2)[:, None]
        # Newton's step overshoots where the curve is flat: half of a unit at a time gets there too
        largest = np.abs(step).max(axis=1, keepdims=True)
        solution[open_] -= step * np.minimum(1.0, 0.5 / np.maximum(largest, 1e-12))
        open_ = open_[largest[:, 0] > _PRECISE]
    return solution


def check_outcomes(outcomes: Sequence[float]) -> np.ndarray:
    """Outcomes as an array. Raises `ValueError` where there are none, or one is not 1, 0.5 or 0."""
    if not len(outcomes):
        raise ValueError("there are no outcomes: give 1, 0.5 or 0 for every pair that was judged")
    for row, outcome in enumerate(outcomes):
        if outcome not in (LOSS, TIE, WIN):
            raise ValueError(f"row {row}: {outcome!r} is no outcome; give 1 for a win, 0.5 for a tie, 0 for a loss")
    return np.asarray(outcomes, dtype=float)


def _log_ratio(lengths: Sequence[float], other_lengths: Sequence[float], rows: int) -> np.ndarray:
    """Log of (length + 1) / (other length + 1), `(N,)`."""
    columns = []
    for name, column in (("lengths", lengths), ("other_lengths", other_lengths)):
        values = np.asarray(column, dtype=float)
        if values.shape != (rows,):
            raise ValueError(f"`{name}` must be one number a row: {rows} of them, got an array of {values.shape}")
        bad = ~np.isfinite(values) | (values < 0)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"row {row}: a length of {values[row]} in `{name}`; it must be finite and not negative")
        columns.append(np.log1p(values))
    return columns[0] - columns[1]


def _sigmoid(values: Any) -> Any:
    return 0.5 * (1 + np.tanh(np.asarray(values) / 2))
