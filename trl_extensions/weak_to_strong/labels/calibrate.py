"""Probabilities of weak models, calibrated one by one and combined to the soft labels of an ensemble.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599) makes them mean what they say: soft labels carry how sure a
weak model is, and one that is always sure hands on its errors as facts.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...core.extras import import_extra


logger = logging.getLogger(__name__)

# A slice that a model gets all right wants T = 0, one on which it is worse than chance T = infinity
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 100.0
MIN_ROWS = 20  # of a slice that says enough; else the temperature stays 1
METHODS = ("soft", "hard", "accuracy")  # of `combine`


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> tuple[float, str]:
    """The temperature T > 0 under which true labels are most likely, and why T is not the optimum, if it is not.

    Minimises the mean of -log softmax(log p / T)[label], which is convex in 1 / T, within `MIN_TEMPERATURE` and
    `MAX_TEMPERATURE`; above 1, the model was too sure. Rows whose true class has probability 0 have an infinite loss
    at any T and are left out.

    Args:
        probs: `(N, K)` probabilities.
        labels: `(N,)` true classes, 0..K-1, of rows that the model was not trained on.
    """
    logs, labels = _logs(probs), np.asarray(labels)
    if labels.shape != logs.shape[:1]:
        raise ValueError(f"{len(logs)} rows of probabilities but labels of shape {labels.shape}; give one a row")
    own = logs[np.arange(len(logs)), labels]
    possible = np.isfinite(own)
    logs, own = logs[possible], own[possible]
    finite = np.where(np.isfinite(logs), logs, 0.0)

    def slope(beta: float) -> float:
        """Of the mean loss by 1 / T: what the model expects log p to be, less what it is for the true class; rises."""
        return float(((_softmax(logs * beta) * finite).sum(axis=1) - own).mean())

    temperature, notes = 1.0, []
    if not possible.all():
        notes.append(f"{(~possible).sum()} rows with probability 0 for their class left out")
    if len(logs) < MIN_ROWS:
        notes.append(f"T stays 1: {len(logs)} rows are too few to calibrate, {MIN_ROWS} needed")
    elif slope(1 / MIN_TEMPERATURE) < 0:
        temperature = MIN_TEMPERATURE
        notes.append(f"T cut at {MIN_TEMPERATURE}: all but no errors in the slice, or a model far too unsure")
    elif slope(1 / MAX_TEMPERATURE) > 0:
        temperature = MAX_TEMPERATURE
        notes.append(f"T cut at {MAX_TEMPERATURE}: on the slice the model is no better than guessing")
    else:
        low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
        temperature = 1 / import_extra("scipy.optimize").brentq(slope, low, high, xtol=1e-15, rtol=1e-14)
    return temperature, "; ".join(notes)


def apply_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) of each row, `(N, K)` -> `(N, K)` probabilities; a probability of 0 stays 0."""
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; give a number above 0")
    return _softmax(_logs(probs) * (1 / temperature))


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
    """Mean over rows of |accuracy - mean confidence| of the row's bin, in [0, 1]; nan without rows. Bins have equal
    width over (0, 1], each with its right end; the largest of a row of `probs` `(N, K)` is its confidence."""
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if not len(probs):
        return float("nan")
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(places, weights=right - confidence, minlength=bins)).sum() / len(probs))


def combine(
    probs: np.ndarray, method: Literal["soft", "hard", "accuracy"] = "soft", accuracies: Sequence[float] | None = None
) -> np.ndarray:
    """Soft labels `(N, K)` of an ensemble, from probabilities `(M, N, K)` of M >= 1 models.

    "soft": the mean probability. "hard": the share of models whose most likely class it is; a model undecided between
    classes gives each its part of the vote, and a tie between models stays one. "accuracy": the mean probability
    weighted by `vote_weights(accuracies, K)`, of accuracies on rows that the models were not trained on.
    """
    probs = _of_models(probs)
    if method == "soft":
        return probs.mean(axis=0)
    if method == "hard":
        top = probs == probs.max(axis=2, keepdims=True)
        return (top / top.sum(axis=2, keepdims=True)).mean(axis=0)
    if method == "accuracy":
        if accuracies is None or len(accuracies) != len(probs):
            raise ValueError(f"an accuracy-weighted vote of {len(probs)} models needs as many accuracies")
        return np.average(probs, axis=0, weights=vote_weights(accuracies, probs.shape[2]))
    raise ValueError(f"`ensemble` is {method!r}; give one of {', '.join(METHODS)}")


def vote_weights(accuracies: Sequence[float], num_classes: int) -> np.ndarray:
    """Weight of each model's vote by its accuracy a: log((K - 1) a / (1 - a)), summing to 1, `(M,)`.

    These log-odds are the best weights for the votes of independent models whose errors are spread evenly over the
    other classes (Zhu et al. 2009). Accuracies count as at most 0.999; a model no better than chance has weight 0, and
    where all are, they weigh the same and a warning is logged.
    """
    if not all(0 <= accuracy <= 1 for accuracy in accuracies):
        raise ValueError(f"accuracies must lie between 0 and 1, got {list(accuracies)}")
    capped = np.minimum(accuracies, 0.999)
    odds = np.where(capped > 0, capped * (num_classes - 1) / (1 - capped), 1.0)
    weights = np.maximum(np.log(odds), 0.0)
    if not weights.any():
        logger.warning("no weak model is better than chance on held-out rows; all votes count the same")
        weights = np.ones_like(weights)
    return weights / weights.sum()


def disagreement(probs: np.ndarray) -> np.ndarray:
    """How far models are from their mean: the mean over models of the total variation distance, `(M, N, K)` -> `(N,)`.

    That is the probability mass a model would have to move to say what the ensemble says, half the sum of absolute
    differences. 0 only where all models say the same; at most 1 - 1 / M.
    """
    probs = _of_models(probs)
    # Differences to the first model, so that equal models give exactly 0
    offsets = probs - probs[0]
    return 0.5 * np.abs(offsets - offsets.mean(axis=0)).sum(axis=2).mean(axis=0)


def confidence(soft_labels: np.ndarray) -> np.ndarray:
    """How far soft labels are from even: (max - 1/K) / (1 - 1/K), `(N, K)` -> `(N,)` in [0, 1]."""
    soft_labels = np.asarray(soft_labels, dtype=np.float64)
    even = 1 / soft_labels.shape[1]
    return np.clip((soft_labels.max(axis=1) - even) / (1 - even), 0.0, 1.0)


def _of_models(probs: np.ndarray) -> np.ndarray:
    probs = np.asarray(probs, dtype=np.float64)
    if probs.ndim != 3 or not probs.shape[0] or probs.shape[2] < 2:
        raise ValueError(f"probabilities must have the shape (models, rows, classes >= 2), got {probs.shape}")
    return probs


def _logs(probs: np.ndarray) -> np.ndarray:
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"probabilities must have the shape (rows, classes >= 2), got {values.shape}")
    if (values < 0).any():
        raise ValueError("a probability is negative; give probabilities, not logarithms")
    with np.errstate(divide="ignore"):
        return np.log(values)


def _softmax(logs: np.ndarray) -> np.ndarray:
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
