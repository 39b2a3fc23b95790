"""How often one side wins: the raw rate, and two that do not pay for length.

Judges like long answers. Two ways take that out: an average over strata of who wrote more, and a regression that says
what the rate would be at equal length. Both are only as good as the overlap of lengths in the data.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ..extras import import_extra
from ..stats import bootstrap, group_index, wilson


WIN, TIE, LOSS = 1.0, 0.5, 0.0
STRATA = ("shorter", "equal", "longer")
EQUAL_WITHIN = 1.2
"""Answers are about equally long if neither is more than this times as long as the other."""


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
        confidence, resamples, seed: Coverage of the interval, in (0, 1), and its bootstrap.

    Returns:
        JSON-ready: `value`, `low`, `high`, `n`, and `interval`, "wilson" or "bootstrap".

    Raises:
        ValueError: No rows, an outcome that is none of the three (names the row), or another number of groups.
    """
    values = check_outcomes(outcomes)
    number = group_index(groups, len(values))[1]
    value = float(values.mean())
    result = {"value": value, "n": len(values), "interval": "wilson"}
    bounds: tuple[float | None, float | None] = wilson(value * number, number, confidence)
    if groups is not None and np.ptp(values) > 0 and number > 1:
        settings: dict[str, Any] = {"groups": groups, "resamples": resamples, "confidence": confidence, "seed": seed}
        bounds = bootstrap(lambda times: times @ values / times.sum(axis=1), len(values), **settings)
        result["interval"] = "bootstrap"
    return result | {"low": bounds[0], "high": bounds[1]}


def length_balanced(
    outcomes: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The mean of the win rates among answers that are shorter, about equally long (`EQUAL_WITHIN`) and longer.

    Strata without rows are left out and named. A stratum of few rows has as much weight as one of many: the interval
    is not to be trusted where one has less than about five. It is a percentile bootstrap within strata; with groups,
    whole groups are drawn, and resamples that leave a stratum empty are left out.

    Args:
        outcomes, groups: As in `win_rate`.
        lengths, other_lengths: Of the answers whose wins are counted and of the others, in one unit, `(N,)` each.
        settings: `confidence`, `resamples` and `seed`, as in `win_rate`.

    Returns:
        JSON-ready: `value`, `low`, `high` (None where no resample has all strata), `strata`: name -> `{"n", "value"}`,
        and `empty`: the names of those without rows.

    Raises:
        ValueError: As `win_rate`; columns of unlike lengths, or a length that is negative or not finite.
    """
    values, ratio = _checked(outcomes, lengths, other_lengths)
    band = math.log(EQUAL_WITHIN) + 1e-9
    stratum = np.where(ratio < -band, 0, np.where(ratio > band, 2, 1))
    members = {name: np.flatnonzero(stratum == k) for k, name in enumerate(STRATA)}
    empty = [name for name, rows in members.items() if not len(rows)]

    def balanced(times: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # nan where a stratum is empty
            own = [(times[:, rows], values[rows]) for rows in members.values() if len(rows)]
            return np.mean([(drawn @ won) / drawn.sum(axis=1) for drawn, won in own], axis=0)

    within: Any = stratum if groups is None else None
    low, high = bootstrap(balanced, len(values), groups=groups, strata=within, **settings)
    strata = {
        name: {"n": len(rows), "value": float(values[rows].mean()) if len(rows) else None}
        for name, rows in members.items()
    }
    value = float(balanced(np.ones((1, len(values))))[0])
    return {"value": value, "low": low, "high": high, "strata": strata, "empty": empty}


def length_adjusted(
    outcomes: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float], **settings: Any
) -> dict[str, Any]:
    """The win rate at equal length, by logistic regression, as length-controlled AlpacaEval (arXiv 2404.04475) has it.

    P(win) = sigmoid(intercept + slope tanh(r / s)), r being the log of the ratio of lengths (each plus 1, so that an
    empty answer has one) and s its root mean square: not its standard deviation around a mean, because 0 must stay
    equal length. The value is sigmoid(intercept). A tie counts as half a win and half a loss.

    The slope has scikit-learn's L2 penalty (C = 1), so that it stays finite where length alone decides. With outcomes
    of one kind, or answers all equally long, there is nothing to fit: the value is the raw rate. Where one side is
    longer throughout, the value is an extrapolation: `overlap`, the smaller of the shares of rows in which either side
    is longer, is then 0. The interval is a percentile bootstrap over rows or groups, each fitted anew with the same s.

    Arguments and errors are those of `length_balanced`; `resamples` is 500 by default.

    Returns:
        JSON-ready: `value`, `low`, `high`, `slope`, `overlap`; `reason`, why the value is the raw rate, else None.
    """
    settings = {"resamples": 500, **settings}  # each is a fit of some milliseconds
    values, ratio = _checked(outcomes, lengths, other_lengths)
    result = {"slope": 0.0, "overlap": float(min((ratio > 0).mean(), (ratio < 0).mean())), "reason": None}
    if np.ptp(values) == 0 or not ratio.any():
        raw = win_rate(outcomes, **settings)
        reason = "all outcomes are the same" if np.ptp(values) == 0 else "all answers are equally long"
        return {name: raw[name] for name in ("value", "low", "high")} | result | {"reason": reason}
    x = np.tanh(ratio / math.sqrt(float(np.mean(ratio**2))))

    def rates(times: np.ndarray) -> np.ndarray:
        return np.array([fit_logistic(x, values, own)[0] for own in times])

    low, high = bootstrap(rates, len(values), **settings)
    value, slope = fit_logistic(x, values, np.ones(len(values)))
    return {"value": value, "low": low, "high": high} | result | {"slope": slope}


def fit_logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The rate at x = 0 and the slope of a logistic regression on x of y in [0, 1] with weights, `(N,)` each."""
    won = float(weights @ y / weights.sum())
    if won in (0.0, 1.0):  # a fit would have an infinite intercept
        return won, 0.0
    model = import_extra("sklearn.linear_model").LogisticRegression(solver="newton-cholesky", tol=1e-8)
    rows, labels = np.tile(x, 2)[:, None], np.repeat([1, 0], len(x))
    model.fit(rows, labels, np.concatenate([weights * y, weights * (1 - y)]))
    return float(model.predict_proba([[0.0]])[0, 1]), float(model.coef_[0, 0])


def check_outcomes(outcomes: Sequence[float]) -> np.ndarray:
    """Outcomes as an array. Raises `ValueError` where there are none, or one is not 1, 0.5 or 0."""
    if not len(outcomes):
        raise ValueError("there are no outcomes: give 1, 0.5 or 0 for every pair that was judged")
    for row, outcome in enumerate(outcomes):
        if outcome not in (LOSS, TIE, WIN):
            raise ValueError(f"row {row}: {outcome!r} is no outcome; give 1 for a win, 0.5 for a tie, 0 for a loss")
    return np.asarray(outcomes, dtype=float)


def _checked(outcomes: Sequence[float], *lengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes, and the log of (length + 1) / (other length + 1), `(N,)` each."""
    values, columns = check_outcomes(outcomes), []
    for name, column in zip(("lengths", "other_lengths"), lengths, strict=True):
        own = np.asarray(column, dtype=float)
        if own.shape != values.shape:
            raise ValueError(f"`{name}` must be one number a row: {len(values)} of them, got an array of {own.shape}")
        if (bad := ~np.isfinite(own) | (own < 0)).any():
            row = int(bad.argmax())
            raise ValueError(f"row {row}: a length of {own[row]} in `{name}`; it must be finite and not negative")
        columns.append(np.log1p(own))
    return values, columns[0] - columns[1]
