"""The lowest and highest score a scorer gives, and the harm in [0, 1] that a score between them stands for."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .scorers import Scorer


def checked_range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest score as floats.

    Raises:
        ValueError: Not two finite numbers, the lower one first.
    """
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"`range` of a scorer is {values!r:.60}; give its lowest and highest score, such as [0, 1]")
    return low, high


def harm(score: float, scorer: "Scorer") -> float:
    """How bad a score is, in [0, 1]: 0 at the best end of the scorer's range, 1 at the worst."""
    low, high = scorer.range
    share = (score - low) / (high - low)
    return 1 - share if scorer.higher_is_better else share


def check_scores(rows: Iterable[dict[str, Any]], scorer: "Scorer") -> None:
    """Make sure that scored rows have scores in the scorer's range, or none.

    Raises:
        ValueError: A score outside of it; names scorer and row.
    """
    low, high = scorer.range
    for row in rows:
        score = row["scores"][scorer.name]
        if score is not None and not low <= score <= high:
            raise ValueError(
                f"scorer {scorer.name!r} gave row {row['id']!r} the score {score:g}, outside of its range {low:g} to "
                f"{high:g}: set `range` of the scorer to the lowest and highest score it can give (what is scored "
                "already is kept), or use another scorer."
            )
