"""The module `crr` of the library `evaluate`, loaded by its path without a network."""

import evaluate
import pytest

from trl_extensions.core.stats import wilson
from trl_extensions.metrics import metric_path


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(metric_path("crr"))


def test_both_orders_by_hand(metric):
    verdicts = [
        ("win", "win"),  # a win
        ("win", "tie"),  # ties: only one win,
        ("win", "loss"),  # a contradiction,
        ("loss", "win"),  # another,
        ("tie", "tie"),
        ("loss", "tie"),  # and only one loss
        ("loss", "loss"),  # a loss
        ("win", "unread"),  # unread
        ("unread", "loss"),
    ]
    predictions, swapped = map(list, zip(*verdicts, strict=True))
    result = metric.compute(predictions=predictions, swapped=swapped)
    low, high = wilson(6, 7)
    assert result == {
        "crr": 6 / 7, "low": low, "high": high, "wins": 1, "ties": 5, "losses": 1, "unread": 2, "contradictions": 2,
    }  # fmt: skip


def test_final_outcomes_in_batches(metric):
    metric.add_batch(predictions=["win", "loss", "unread"])
    metric.add_batch(predictions=["loss", "tie", "loss"])
    result = metric.compute(confidence=0.8)
    assert (result["crr"], result["wins"], result["ties"], result["losses"]) == (0.4, 1, 1, 3)
    assert (result["low"], result["high"]) == wilson(2, 5, 0.8)
    assert (result["unread"], result["contradictions"]) == (1, None)


def test_a_judge_of_places_recovers_everything_and_is_found_out(metric):
    result = metric.compute(predictions=["win"] * 5, swapped=["loss"] * 5)
    assert result["crr"] == 1.0 and result["contradictions"] == 5


def test_nothing_read(metric):
    result = metric.compute(predictions=["unread", "unread"])
    assert result["crr"] is result["low"] is result["high"] is None and result["unread"] == 2


def test_bad_input(metric):
    with pytest.raises(ValueError, match="row 1 of `predictions`: 'won' is no verdict"):
        metric.compute(predictions=["win", "won"])
    with pytest.raises(ValueError, match="2 predictions but 1 swapped"):
        metric.compute(predictions=["win", "win"], swapped=["win"])
    with pytest.raises(ValueError, match="row 0 of `swapped`: None is no verdict"):
        metric.compute(predictions=["win"], swapped=[None])


def test_says_what_it_is(metric):
    assert metric.name == "crr" and "2404.05875" in metric.citation
