"""Small measures of generated text."""

from collections.abc import Sequence
from itertools import pairwise


def _word_pairs(text: str) -> list[tuple[str, str]]:
    return list(pairwise(text.lower().split()))


def distinct_2(texts: Sequence[str]) -> float:
    """Mean over texts of distinct word pairs / word pairs, in [0, 1]. Low values mean a text repeats itself.

    Averaged over texts, so that it does not fall as more texts are added. Texts of fewer than two words are left out;
    1.0 if none remains.
    """
    shares = [len(set(pairs)) / len(pairs) for pairs in map(_word_pairs, texts) if pairs]
    return sum(shares) / len(shares) if shares else 1.0


def corpus_distinct_2(texts: Sequence[str]) -> float:
    """Distinct word pairs / word pairs over all texts together, in [0, 1] (distinct-2 of arXiv 1510.03055).

    Falls with the number of texts; compare only sets of equal size. 1.0 without any pair.
    """
    pairs = [pair for text in texts for pair in _word_pairs(text)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0
