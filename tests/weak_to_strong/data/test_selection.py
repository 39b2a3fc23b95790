"""Which rows are confident enough."""

import numpy as np
import pytest

from trl_extensions.weak_to_strong.data.selection import keep_confident


def soft(*first_class):
    return np.array([[p, 1 - p] for p in first_class])


def kept(soft_labels, **options):
    return keep_confident(soft_labels, **options)[0].tolist()


# Confidences |2 p - 1|: .8 .2 .6 .9 .1
FIVE = soft(0.9, 0.6, 0.2, 0.05, 0.45)


def test_threshold_budget_and_both():
    assert kept(FIVE, threshold=0.55) == [0, 2, 3]
    assert kept(FIVE, threshold=0.0) == [0, 1, 2, 3, 4]
    assert kept(FIVE, budget=2) == [0, 3]
    assert kept(FIVE, budget=0.6) == [0, 2, 3]
    assert kept(FIVE, budget=1.0) == [0, 1, 2, 3, 4]
    assert kept(FIVE, budget=100) == [0, 1, 2, 3, 4]
    assert kept(FIVE, threshold=0.55, budget=2) == [0, 3]
    assert kept(FIVE, threshold=0.55, budget=4) == [0, 2, 3]


def test_the_threshold_is_included():
    assert kept(soft(0.75, 0.25, 0.7), threshold=0.5) == [0, 1]


def test_balanced_by_predicted_class():
    # Class 0: rows 0 to 3 (.9 .8 .7 .6 sure), class 1: rows 4 and 5 (.2 .1)
    labels = soft(0.95, 0.9, 0.85, 0.8, 0.4, 0.45)
    assert kept(labels, budget=4, balanced=True) == [0, 1, 4, 5]
    assert kept(labels, budget=3, balanced=True) == [0, 4]
    assert kept(labels, budget=6, balanced=True) == [0, 1, 4, 5]
    with pytest.raises(ValueError, match=r"class 'bad', predicted for 2 of 6 rows, .*or keep rows `balanced`"):
        keep_confident(labels, budget=4, class_names=["good", "bad"])
    with pytest.raises(ValueError, match=r"class '1', .*lower the threshold or raise the budget$"):
        keep_confident(labels, threshold=0.5, balanced=True)


def test_a_class_that_is_never_predicted_is_not_missed():
    labels = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.4, 0.35, 0.25]])
    assert kept(labels, budget=2) == [0, 1]
    assert kept(labels, budget=3, balanced=True) == [0, 1]


def test_ties_are_broken_by_the_seed_and_not_by_position():
    labels = soft(*[1.0, 0.0] * 100)
    chosen = kept(labels, budget=0.5)
    assert chosen == kept(labels, budget=0.5) != kept(labels, budget=0.5, seed=1)
    assert max(chosen) > 150 and chosen == sorted(set(chosen)) and len(chosen) == 100


def test_summary_is_one_line():
    _, summary = keep_confident(FIVE, threshold=0.55, class_names=["safe", "unsafe"])
    assert summary == (
        "kept 3 of 5 rows (1 'safe', 2 'unsafe'), each of confidence 0.60 or more; dropped 2; how many of the kept "
        "labels are right is not known"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a `threshold` or a `budget`"),
        ({"threshold": 1.1}, "`threshold` is 1.1"),
        ({"threshold": -0.1}, "`threshold` is -0.1"),
        ({"budget": 0}, "`budget` is 0"),
        ({"budget": 0.0}, "`budget` is 0.0"),
        ({"budget": 1.5}, "`budget` is 1.5"),
        ({"budget": True}, "`budget` is True"),
        ({"budget": "all"}, "`budget` is 'all'"),
        ({"threshold": 0.99}, "would not be kept at all"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(ValueError, match=message) as error:
        keep_confident(FIVE, **options)
    assert "\n" not in str(error.value)


def test_no_rows():
    with pytest.raises(ValueError, match="must have the shape"):
        keep_confident(np.empty((0, 2)), budget=1)
