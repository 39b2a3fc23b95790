"""Weights of rows, by hand."""

from collections import Counter

import pytest

from trl_extensions.codeclm.weighted_loss import pair_of, raw_weight, read_gap, read_pair


@pytest.mark.parametrize(
    ("gap", "weight"), [(4.5, 4.5), (-4.5, 4.5), (0.0, 1.0), (0.5, 1.0), (-9.0, 6.0), (6.0, 6.0), (7, 6.0)]
)
def test_a_gap_counts_by_its_size_within_limits(gap, weight):
    assert raw_weight({"scores": {"gap": gap}}, "gap", (1.0, 6.0), {}) == weight


def test_pairs_are_equal_whatever_their_case_white_space_and_order():
    one = pair_of("Write  code", ["Python", "Regular expressions"])
    assert one == pair_of(" write code", ["regular  expressions", "python"])
    assert one != pair_of("Write code", ["Python"])
    assert one != pair_of("Explain code", ["Python", "Regular expressions"])


def test_every_pair_has_the_same_weight_in_sum():
    rows = [{"metadata": {"use_case": own, "skills": ["x"]}} for own in "aaabcc"]
    counts = Counter(map(read_pair, rows))
    assert sorted(counts.values()) == [1, 2, 3]
    weights = [raw_weight(row, "metadata", (1.0, 6.0), counts) for row in rows]
    assert weights == pytest.approx([1 / 3] * 3 + [1.0] + [1 / 2] * 2)
    new = {"metadata": {"use_case": "new", "skills": ["x"]}}
    assert raw_weight(new, "metadata", (1.0, 6.0), counts) == 1.0, "not counted: as a single row"


def test_rows_are_read():
    row = {"scores": {"strong": 9.0, "target": 4.5, "gap": 4.5}, "metadata": {"use_case": "A", "skills": ["x", "Y"]}}
    assert read_gap(row) == 4.5
    assert read_pair(row) == ("a", frozenset({"x", "y"}))
    assert raw_weight(row, "gap", (1.0, 4.0), {}) == 4.0
    assert raw_weight(row, "metadata", (1.0, 4.0), {read_pair(row): 4}) == 0.25


@pytest.mark.parametrize(
    ("row", "by", "message"),
    [
        ({}, "gap", "no column `scores` to weigh by.*remove_unused_columns=False"),
        ({"scores": None}, "gap", "never scored; use weight_by='metadata'"),
        ({"scores": {"strong": 9, "target": 3, "gap": None}}, "gap", "never scored"),
        ({"scores": {"gap": "much"}}, "gap", "finite number, got 'much'"),
        ({"scores": {"gap": float("nan")}}, "gap", "finite number, got nan"),
        ({"scores": {"gap": True}}, "gap", "finite number, got True"),
        ({}, "metadata", "no column `metadata`"),
        ({"metadata": None}, "metadata", "needs a text `use_case`, got None"),
        ({"metadata": {"use_case": " ", "skills": ["x"]}}, "metadata", "needs a text `use_case`"),
        ({"metadata": {"use_case": "a", "skills": "x"}}, "metadata", "needs a list of texts `skills`"),
        ({"metadata": {"use_case": "a", "skills": [1]}}, "metadata", "needs a list of texts `skills`"),
    ],
)
def test_what_cannot_be_weighed_is_said(row, by, message):
    with pytest.raises(ValueError, match=message) as error:
        raw_weight(row, by, (1.0, 6.0), {})
    assert "\n" not in str(error.value)
