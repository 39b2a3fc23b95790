"""How often a strong model follows its weak teacher, where the teacher is right and where it is wrong.

A model that only imitates follows both alike; one that generalizes keeps what is right and corrects what is wrong
(weak-to-strong generalization, arXiv 2312.09390, section 5.1).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ..core.stats import wilson_interval


def agreement_with_weak(
    labels: Sequence[np.ndarray],
    weak: Sequence[np.ndarray],
    strong: Sequence[np.ndarray],
    *,
    groups: Sequence[Sequence[Hashable] | None] | None = None,
    confidence: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """Shares of test rows on which a strong model says what the weak one says, split by whether that is right.

    Shares are means over all rows and seeds. Wilson's intervals count the rows (or groups of rows) of one seed only:
    exact for one seed, on the safe side for more, since the seeds are tested on the same or similar rows.

    Args:
        labels: True classes, an array `(N,)` a seed.
        weak: Classes the weak model predicts, likewise.
        strong: Classes the strong model predicts, likewise.
        groups: For every seed which rows belong together (None: a row by itself), or None.
        confidence: Coverage, in (0, 1).

    Returns:
        JSON-ready. `right`, rows whose weak label is right: the share agreed on is what the strong model kept.
        `wrong`, the others: the share agreed on are errors it imitated. Each with `n` (rows, summed over seeds),
        `value`, `low`, `high` and `per_seed`; None where there is no such row. `wrong` has `corrected` too, the share
        of these rows where the strong model is right (1 - `value` for two classes, less for more).

    Raises:
        ValueError: Seeds or arrays of unlike lengths.
    """
    if not len(labels) == len(weak) == len(strong):
        raise ValueError(f"{len(labels)} seeds of labels, {len(weak)} of weak and {len(strong)} of strong predictions")
    by_seed = groups if groups is not None else [None] * len(labels)
    right, wrong, corrected = [], [], []
    for i, (truth, teacher, pupil, own) in enumerate(zip(labels, weak, strong, by_seed, strict=True)):
        truth, teacher, pupil = np.asarray(truth), np.asarray(teacher), np.asarray(pupil)
        if not len(truth) == len(teacher) == len(pupil):
            raise ValueError(
                f"seed {i}: {len(truth)} labels, {len(teacher)} weak and {len(pupil)} strong predictions; score the "
                "same rows with both models"
            )
        follows, is_right = pupil == teacher, teacher == truth
        right.append(_count(follows, is_right, own))
        wrong.append(_count(follows, ~is_right, own))
        corrected.append(_count(pupil == truth, ~is_right, own))
    fixed = _share(corrected, confidence)
    fixed.pop("n")
    return {"right": _share(right, confidence), "wrong": _share(wrong, confidence) | {"corrected": fixed}}


def _count(hits: np.ndarray, rows: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[int, int, int]:
    """Hits among some rows, these rows, and how many of them are independent."""
    n = int(rows.sum())
    independent = n
    if groups is not None:
        own = [groups[i] for i in np.flatnonzero(rows)]
        independent = len({g for g in own if g is not None}) + sum(g is None for g in own)
    return int((hits & rows).sum()), n, independent


def _share(counts: list[tuple[int, int, int]], confidence: float) -> dict[str, Any]:
    hits, n = sum(count[0] for count in counts), sum(count[1] for count in counts)
    if not n:
        return {"n": 0, "value": None, "low": None, "high": None, "per_seed": [None] * len(counts)}
    independent = sum(count[2] for count in counts) / len(counts)
    low, high = wilson_interval(min(hits * independent / n, independent), independent, confidence)
    per_seed = [count[0] / count[1] if count[1] else None for count in counts]
    return {"n": n, "value": hits / n, "low": low, "high": high, "per_seed": per_seed}
