"""Several weak models as one: their votes as soft labels, and how much they disagree."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np


logger = logging.getLogger(__name__)

METHODS = ("soft", "hard", "accuracy")


def combine(
    probs: np.ndarray,
    method: Literal["soft", "hard", "accuracy"] = "soft",
    accuracies: Sequence[float] | None = None,
) -> np.ndarray:
    """Soft labels of an ensemble.

    Args:
        probs: `(M, N, K)` probabilities of M >= 1 models for N rows and K classes.
        method:
            "soft": the mean probability. "hard": the share of models whose most likely class it is; a model undecided
            between classes gives each its part of the vote, and a tie between models stays one. "accuracy": the mean
            probability weighted by `vote_weights(accuracies, K)`.
        accuracies: Accuracy of each model on rows it was not trained on, for "accuracy".

    Returns:
        `(N, K)`, each row summing to 1.

    Raises:
        ValueError: An unknown method, another shape, or not one accuracy for each model.
    """
    probs = _checked(probs)
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

    Raises:
        ValueError: An accuracy out of [0, 1].
    """
    accuracies = np.asarray(accuracies, dtype=np.float64)
    if not ((accuracies >= 0) & (accuracies <= 1)).all():
        raise ValueError(f"accuracies must lie between 0 and 1, got {accuracies.tolist()}")
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
    probs = _checked(probs)
    # Differences to the first model, so that equal models give exactly 0
    offsets = probs - probs[0]
    return 0.5 * np.abs(offsets - offsets.mean(axis=0)).sum(axis=2).mean(axis=0)


def confidence(soft_labels: np.ndarray) -> np.ndarray:
    """How far soft labels are from even: (max - 1/K) / (1 - 1/K), `(N, K)` -> `(N,)` in [0, 1]."""
    soft_labels = np.asarray(soft_labels, dtype=np.float64)
    even = 1 / soft_labels.shape[1]
    return np.clip((soft_labels.max(axis=1) - even) / (1 - even), 0.0, 1.0)


def _checked(probs: np.ndarray) -> np.ndarray:
    probs = np.asarray(probs, dtype=np.float64)
    if probs.ndim != 3 or not probs.shape[0] or probs.shape[2] < 2:
        raise ValueError(f"probabilities must have the shape (models, rows, classes >= 2), got {probs.shape}")
    return probs
