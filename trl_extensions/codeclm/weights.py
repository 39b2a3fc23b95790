"""How much each row counts in training: by the gap its answer showed, or so that all metadata count alike."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


WEIGHT_BY = (None, "gap", "metadata")

Pair = tuple[str, frozenset[str]]
"""What metadata are counted by: the use case and the set of its skills, both in lower case, white space tidied."""


def gap_weight(gap: float, low: float, high: float) -> float:
    """The size of a gap, clipped.

    Args:
        gap: Score of the strong model's answer minus that of the target's, in points (arXiv 2404.05875, section 3.3).
        low: Smallest weight, above 0.
        high: Largest weight.
    """
    return min(max(abs(gap), low), high)


def pair_of(use_case: str, skills: Iterable[str]) -> Pair:
    """The pair that metadata are counted by."""
    return _tidy(use_case), frozenset(map(_tidy, skills))


def pair_weight(pair: Pair, counts: Mapping[Pair, int]) -> float:
    """One over the rows of a pair, so that the weights of all its rows sum to 1; 1 for a pair that was not counted."""
    return 1 / max(1, counts.get(pair, 1))


def count_pairs(pairs: Iterable[Pair]) -> dict[Pair, int]:
    """Rows of each pair."""
    return dict(Counter(pairs))


def mean_one(weights: Sequence[float], mean: float | None = None) -> list[float]:
    """Positive weights, divided by their mean or by the one given."""
    mean = math.fsum(weights) / len(weights) if mean is None else mean
    return [weight / mean for weight in weights]


def raw_weight(row: Mapping[str, Any], by: str, gap_range: tuple[float, float], counts: Mapping[Pair, int]) -> float:
    """The weight of an exported row, not rescaled yet.

    Args:
        row: With `scores` for "gap", with `metadata` for "metadata".
        by: "gap" or "metadata".
        gap_range: As `gap_weight`.
        counts: As `pair_weight`.

    Raises:
        ValueError: The row lacks what is needed; says what to do, but not which row it is.
    """
    return gap_weight(read_gap(row), *gap_range) if by == "gap" else pair_weight(read_pair(row), counts)


def read_gap(row: Mapping[str, Any]) -> float:
    """`scores.gap` of an exported row.

    Raises:
        ValueError: It is not there, or no finite number.
    """
    if "scores" not in row:
        raise ValueError(f"no column `scores` {_LOST}")
    gap = row["scores"].get("gap") if isinstance(row["scores"], Mapping) else row["scores"]
    if gap is None:
        raise ValueError("`scores.gap` is empty, the pair was never scored; use weight_by='metadata', or no weights")
    if isinstance(gap, bool) or not isinstance(gap, int | float) or not math.isfinite(gap):
        raise ValueError(f"`scores.gap` must be a finite number, got {gap!r:.80}")
    return float(gap)


def read_pair(row: Mapping[str, Any]) -> Pair:
    """The pair of an exported row's `metadata`.

    Raises:
        ValueError: It is not there, or lacks a use case or skills.
    """
    if "metadata" not in row:
        raise ValueError(f"no column `metadata` {_LOST}")
    metadata = row["metadata"] if isinstance(row["metadata"], Mapping) else {}
    use_case, skills = metadata.get("use_case"), metadata.get("skills")
    if not isinstance(use_case, str) or not use_case.strip():
        raise ValueError(f"`metadata` needs a text `use_case`, got {row['metadata']!r:.80}")
    if not isinstance(skills, list | tuple) or not all(isinstance(skill, str) for skill in skills):
        raise ValueError(f"`metadata` needs a list of texts `skills`, got {row['metadata']!r:.80}")
    return pair_of(use_case, skills)


_LOST = "to weigh by: give exported rows; in a trainer set remove_unused_columns=False and leave packing off"


def _tidy(text: str) -> str:
    return " ".join(text.split()).casefold()
