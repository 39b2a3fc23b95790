"""Keep the weak labels that are worth training on: the confident ones."""

from collections.abc import Sequence

import numpy as np

from ..labels.calibrate import confidence


def keep_confident(
    soft_labels: np.ndarray,
    *,
    threshold: float | None = None,
    budget: float | int | None = None,
    balanced: bool = False,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, str]:
    """Choose confident rows.

    Args:
        soft_labels: `(N, K)`.
        threshold: Keep rows whose `ensembles.confidence` is at least this, in [0, 1].
        budget: Keep the most confident ones, this many rows (an `int`) or this share of the N rows (a `float` above 0
            and up to 1). With `threshold`: at most so many of those above it.
        balanced: Keep equally many rows of each predicted class (the most likely one), as many as the budget and the
            rarest of them allow, so that an easy class does not crowd out a hard one.
        class_names: For messages.
        seed: Decides between rows of equal confidence.

    Returns:
        Positions of the kept rows, ascending, and one line for a log.

    Raises:
        ValueError: Neither threshold nor budget, one out of range, or a class that is predicted somewhere but in no
            row that would be kept.
    """
    soft_labels = np.asarray(soft_labels, dtype=np.float64)
    if soft_labels.ndim != 2 or not len(soft_labels):
        raise ValueError(f"soft labels must have the shape (rows >= 1, classes), got {soft_labels.shape}")
    rows, num_classes = soft_labels.shape
    wanted = _wanted_rows(threshold, budget, rows)
    sure, predicted = confidence(soft_labels), soft_labels.argmax(axis=1)
    order = np.lexsort((np.random.default_rng(seed).permutation(rows), -sure))
    if threshold is not None:
        order = order[sure[order] >= threshold]
    names = [str(label) for label in range(num_classes)] if class_names is None else list(class_names)
    if balanced:
        _check_classes(predicted, order, names, balanced)
        present = np.unique(predicted)
        counts = np.bincount(predicted[order], minlength=num_classes)[present]
        each = min(wanted // len(present), counts.min())
        order = np.concatenate([order[predicted[order] == label][:each] for label in present])
    kept = np.sort(order[:wanted])
    _check_classes(predicted, kept, names, balanced)
    return kept, _summary(sure, predicted, kept, names)


def _wanted_rows(threshold: float | None, budget: float | int | None, rows: int) -> int:
    """Most rows to keep."""
    if threshold is None and budget is None:
        raise ValueError("nothing says which rows are confident; give a `threshold` or a `budget`")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}; give a confidence between 0 and 1")
    if budget is None:
        return rows
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1:
        return min(budget, rows)
    if isinstance(budget, float) and 0 < budget <= 1:
        return max(round(budget * rows), 1)
    raise ValueError(f"`budget` is {budget!r}; give a number of rows (1, 2, ...) or a share above 0.0 and up to 1.0")


def _check_classes(predicted: np.ndarray, kept: np.ndarray, names: list[str], balanced: bool) -> None:
    lost = np.setdiff1d(predicted, predicted[kept])
    if not len(lost):
        return
    count = int((predicted == lost[0]).sum())
    remedy = "lower the threshold or raise the budget" + ("" if balanced else ", or keep rows `balanced`")
    raise ValueError(
        f"class {names[lost[0]]!r}, predicted for {count} of {len(predicted)} rows, would not be kept at all; {remedy}"
    )


def _summary(sure: np.ndarray, predicted: np.ndarray, kept: np.ndarray, names: list[str]) -> str:
    counts = np.bincount(predicted[kept], minlength=len(names))
    classes = ", ".join(f"{count} {name!r}" for name, count in zip(names, counts, strict=True))
    return (
        f"kept {len(kept)} of {len(sure)} rows ({classes}), each of confidence {sure[kept].min():.2f} or more; "
        f"dropped {len(sure) - len(kept)}; how many of the kept labels are right is not known"
    )
