"""Temperature scaling: make a weak model's probabilities mean what they say (Guo et al. 2017, arXiv 1706.04599).

Soft labels carry how sure a weak model is; a model that is always sure hands on its errors as facts.
"""

from dataclasses import dataclass

import numpy as np


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 100.0
"""Bounds. A slice that a model gets all right wants T = 0, one on which it is worse than chance T = infinity."""

MIN_ROWS = 20
"""A smaller slice says too little: the temperature stays 1."""


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Args:
        temperature: T; log-probabilities are divided by it. Above 1: the model was too sure.
        rows: Rows it was fitted on.
        nll_before: Mean negative log-likelihood of these rows before, in nats.
        nll_after: The same afterwards.
        note: Why the temperature is not the optimum, if it is not.
    """

    temperature: float
    rows: int
    nll_before: float
    nll_after: float
    note: str = ""

    def apply(self, probs: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, `(N, K)` -> `(N, K)`."""
        return apply_temperature(probs, self.temperature)


def fit_temperature(probs: np.ndarray, labels: np.ndarray, *, log_probs: bool = False) -> Calibration:
    """The temperature T > 0 under which true labels are most likely.

    Minimises the mean of -log softmax(log p / T)[label], which is convex in 1 / T, within `MIN_TEMPERATURE` and
    `MAX_TEMPERATURE`. Rows whose true class has probability 0 have an infinite loss at any T and are left out.

    Args:
        probs: `(N, K)` probabilities, or their logarithms up to a constant per row (logits).
        labels: `(N,)` true classes, 0..K-1, of rows that the model was not trained on.
        log_probs: Whether `probs` are logarithms.

    Returns:
        The calibration. Its note says if the slice was too small, the temperature was cut at a bound, or rows were
        left out.

    Raises:
        ValueError: Shapes that do not fit.
    """
    logs, labels = _logs(probs, log_probs), np.asarray(labels)
    if labels.shape != logs.shape[:1]:
        raise ValueError(f"{len(logs)} rows of probabilities but labels of shape {labels.shape}; give one a row")
    own = logs[np.arange(len(logs)), labels]
    possible = np.isfinite(own)
    logs, own = logs[possible], own[possible]
    notes = [f"{(~possible).sum()} rows with probability 0 for their class left out"] if not possible.all() else []
    if len(logs) < MIN_ROWS:
        notes.append(f"T stays 1: {len(logs)} rows are too few to calibrate, {MIN_ROWS} needed")
        beta = 1.0
    else:
        beta, bound = _minimise(logs, own)
        if bound:
            notes.append(bound)
    return Calibration(1 / beta, len(logs), _nll(logs, own, 1.0), _nll(logs, own, beta), "; ".join(notes))


def apply_temperature(probs: np.ndarray, temperature: float, *, log_probs: bool = False) -> np.ndarray:
    """softmax(log p / T) of each row, `(N, K)` -> `(N, K)` probabilities; a probability of 0 stays 0.

    Raises:
        ValueError: A temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; give a number above 0")
    scaled = _logs(probs, log_probs) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
    """Mean over rows of |accuracy - mean confidence| of the row's bin, in [0, 1]; nan without rows.

    Args:
        probs: `(N, K)` probabilities; the largest of a row is its confidence.
        labels: `(N,)` true classes.
        bins: Bins of equal width over (0, 1], each with its right end.
    """
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if not len(probs):
        return float("nan")
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(probs))


def _logs(probs: np.ndarray, log_probs: bool) -> np.ndarray:
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"probabilities must have the shape (rows, classes >= 2), got {values.shape}")
    if log_probs:
        return values
    if (values < 0).any():
        raise ValueError("a probability is negative; say `log_probs=True` for logarithms")
    with np.errstate(divide="ignore"):
        return np.log(values)


def _minimise(logs: np.ndarray, own: np.ndarray) -> tuple[float, str]:
    """Best 1 / T within the bounds, and what to say where it is at one of them."""
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if _slope(logs, own, high) < 0:
        return high, f"T cut at {MIN_TEMPERATURE}: all but no errors in the slice, or a model far too unsure"
    if _slope(logs, own, low) > 0:
        return low, f"T cut at {MAX_TEMPERATURE}: on the slice the model is no better than guessing"
    for _ in range(200):  # the slope rises with 1 / T: halve until the interval is one number wide
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _slope(logs, own, middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2, ""


def _slope(logs: np.ndarray, own: np.ndarray, beta: float) -> float:
    """Derivative of the mean loss by 1 / T: what the model expects log p to be, less what it is for the true class."""
    shares = apply_temperature(logs, 1 / beta, log_probs=True)
    expected = (shares * np.where(np.isfinite(logs), logs, 0.0)).sum(axis=1)
    return float((expected - own).mean())


def _nll(logs: np.ndarray, own: np.ndarray, beta: float) -> float:
    if not len(logs):
        return float("nan")
    top = logs.max(axis=1, keepdims=True)
    total = np.log(np.exp(beta * (logs - top)).sum(axis=1)) + beta * top[:, 0]
    return float((total - beta * own).mean())
