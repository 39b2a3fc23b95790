"""Divide rows in two without tearing groups apart: who learns from true labels, who is labelled, who calibrates.

Weak-to-strong experiments train the weak model on the true labels of one half and let it label the other
(arXiv 2312.09390, section 3).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from .examples import Example, Pair


Row = TypeVar("Row", Example, Pair)

_HALVES, _SLICE = 0, 1  # streams of random numbers, so that a slice does not repeat what the halves drew


def split_halves(
    examples: Sequence[Row], *, share: float = 0.5, seed: int, by_group: bool = True
) -> tuple[list[Row], list[Row]]:
    """Split into rows whose true labels the weak models see, and rows that they will label.

    Args:
        examples: At least two rows.
        share: Of the rows that go to the first part, in (0, 1).
        seed: Same rows, share and seed: same parts.
        by_group: Whether rows of one `group` stay together. A row without a group is one by itself.

    Returns:
        Both parts, neither empty, each in the order of `examples`. With groups the first part is filled
        with groups in random order up to `share`, or one group beyond it where that is nearer; without any each class
        is split by `share`, to within a row.

    Raises:
        ValueError: A share out of range, fewer than two rows or groups, or parts that would be empty.
    """
    first = _draw(examples, share, seed, _HALVES, by_group)
    return _divided(examples, first)


def take_slice(
    examples: Sequence[Row], share: float, *, seed: int, by_group: bool = True
) -> tuple[list[Row], list[Row]]:
    """Set a slice of rows aside, for calibration: `(slice, rest)`. Arguments and errors as for `split_halves`."""
    first = _draw(examples, share, seed, _SLICE, by_group)
    return _divided(examples, first)


def _divided(examples: Sequence[Row], first: set[int]) -> tuple[list[Row], list[Row]]:
    return (
        [row for i, row in enumerate(examples) if i in first],
        [row for i, row in enumerate(examples) if i not in first],
    )


def _draw(examples: Sequence[Row], share: float, seed: int, stream: int, by_group: bool) -> set[int]:
    """Positions of the first part."""
    if not 0 < share < 1:
        raise ValueError(f"the share is {share}; give a number between 0 and 1")
    if len(examples) < 2:
        raise ValueError(f"{len(examples)} rows cannot be split; give at least two")
    random = np.random.default_rng([stream, seed])
    if by_group and any(row.group is not None for row in examples):
        first = _whole_groups(examples, share, random)
    else:
        first = _by_class(examples, share, random)
    if not 0 < len(first) < len(examples):
        raise ValueError(
            f"a share of {share} of {len(examples)} rows leaves one part empty; give more rows or another share"
        )
    return first


def _by_class(examples: Sequence[Row], share: float, random: np.random.Generator) -> set[int]:
    """Systematic sampling along the rows sorted by class: every class, and all together, gets its share +- 1."""
    order = random.permutation(len(examples))
    order = sorted(order.tolist(), key=lambda i: -1 if examples[i].label is None else examples[i].label)
    marks = np.floor(np.arange(len(order) + 1) * share + random.random())
    return {i for i, before, after in zip(order, marks, marks[1:], strict=False) if after > before}


def _whole_groups(examples: Sequence[Row], share: float, random: np.random.Generator) -> set[int]:
    groups = defaultdict(list)
    for i, row in enumerate(examples):
        groups[("row", i) if row.group is None else ("group", row.group)].append(i)
    if len(groups) < 2:
        raise ValueError(
            f"all {len(examples)} rows are of group {examples[0].group!r}, which must stay whole; give rows of more "
            "groups, or `by_group=False`"
        )
    wanted = share * len(examples)
    members = list(groups.values())
    first: set[int] = set()
    others: list[list[int]] = []
    for place in random.permutation(len(members)):
        if len(first) + len(members[place]) <= wanted:
            first.update(members[place])
        else:
            others.append(members[place])
    # One that does not fit may still come nearer than none
    short = wanted - len(first)
    nearest = min(others, key=lambda group: len(group))
    if not first or len(nearest) - short < short:
        first.update(nearest)
    return first
