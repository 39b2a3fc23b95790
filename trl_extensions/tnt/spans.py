"""Negative spans: which characters of a completion are unwanted, and which tokens that makes unwanted.

Offsets count Python characters (code points), start at 0 and are half-open: `text[start:end]` is the unwanted part.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_spans(spans: Any, length: int, where: str) -> list[tuple[int, int]]:
    """The spans of one row as pairs of Python integers, in the given order.

    Args:
        spans: Pairs `[start, end]`, as lists, tuples or numpy arrays; None means no spans. Spans may overlap, touch
            and be empty (`start == end`).
        length: Characters of the text that the spans point into.
        where: What messages call the row.

    Raises:
        ValueError: A span that is no pair of integers, is reversed, or points outside the text.
    """
    if spans is None:
        return []
    if isinstance(spans, (str, bytes, dict)) or not hasattr(spans, "__len__"):
        raise ValueError(f"{where}: `negative_spans` must be a list of [start, end] pairs, got {_short(spans)}.")
    checked = []
    for i, span in enumerate(spans):
        name = f"{where}: `negative_spans[{i}]`"
        if isinstance(span, (str, bytes, dict)) or not hasattr(span, "__len__") or len(span) != 2:
            raise ValueError(f"{name} must be a pair [start, end] of character offsets, got {_short(span)}.")
        if not all(isinstance(offset, Integral) and not isinstance(offset, bool) for offset in span):
            raise ValueError(f"{name} must hold two integers (character offsets), got {_short(span)}.")
        start, end = map(int, span)
        if start > end:
            raise ValueError(f"{name} is reversed: it starts at {start}, behind its end {end}. Swap the two.")
        if start < 0 or end > length:
            raise ValueError(
                f"{name} is [{start}, {end}), outside the completion, which has {length} characters: offsets count "
                "from 0, in characters (not bytes or UTF-16 units), into the last assistant message of a chat."
            )
        checked.append((start, end))
    return checked


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def negative_tokens(offsets: Sequence[Sequence[int]], spans: Sequence[Sequence[int]]) -> list[bool]:
    """Which tokens overlap a span (the rule of TNT's data: one unwanted character makes a token unwanted).

    A token `[a, b)` overlaps a span `[start, end)` where `a < end` and `start < b`. An empty span overlaps nothing,
    and a token without characters (`a == b`) is never negative. The byte tokens of one character share its offsets,
    and so its fate; " here" with its space is unwanted if "here" is, and kept if the span ends before the space.

    Args:
        offsets: One `(a, b)` per token, in characters, as `return_offsets_mapping=True` gives them.
        spans: `(start, end)` pairs in characters of the same text.

    Returns:
        One bool per token.
    """
    spans = [(start, end) for start, end in spans if start < end]
    return [a < b and any(a < end and start < b for start, end in spans) for a, b in offsets]


def cover_text(offsets: Sequence[Sequence[int]], text: str) -> list[tuple[int, int]]:
    """The offsets, widened so that no character between two tokens belongs to none of them.

    Some tokenizers trim the space off the offsets of " here", and some drop characters (an accent that normalisation
    merges into its letter). A span on such a character alone would touch nothing, and what it marks would be kept.

    Args:
        offsets: One `(a, b)` per token, in characters, in the order of the text.
        text: What was tokenised.

    Returns:
        The offsets, where spaces that no token covers went to the token behind them (as byte-level tokens have them)
        and other characters to the token, or the byte tokens of one character, before them.
    """
    covered: list[tuple[int, int]] = []
    end = 0  # of the text covered so far
    for a, b in [*offsets, (len(text), len(text))]:
        if a > end:
            split = end + len(text[end:a].rstrip()) if covered else end
            for i in range(len(covered) - 1, -1, -1):
                if covered[i][1] != end:
                    break
                covered[i] = (covered[i][0], split)
            a = split
        covered.append((a, b))
        end = max(end, b)
    return covered[:-1]
