"""The module `win_rate` of the library `evaluate`, loaded by its path without a network."""

import evaluate
import pytest

from trl_extensions.core.judge.win_rate import length_adjusted, length_balanced, win_rate
from trl_extensions.core.stats import wilson
from trl_extensions.metrics import metric_path


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(metric_path("win_rate"))


# The longer answer wins, and that of the model is the longer one in 3 of 4 rows
LONGER_WINS = {
    "predictions": [1, 1, 1, 0],
    "prediction_lengths": [90, 80, 70, 10],
    "reference_lengths": [20, 20, 20, 20],
}


def test_by_hand(metric):
    result = metric.compute(**LONGER_WINS)
    assert result["win_rate"] == 0.75 and result["n"] == 4
    assert (result["low"], result["high"]) == wilson(3, 4)
    assert result["length_balanced"]["value"] == 0.5 and result["length_balanced"]["empty"] == ["equal"]
    assert result["length_adjusted"]["value"] < 0.75


def test_batches_and_options(metric):
    columns = {
        "predictions": [1.0, 0.5, 0.0, 1.0, 1.0, 0.0] * 3,
        "prediction_lengths": [float(10 + 7 * i % 31) for i in range(18)],
        "reference_lengths": [20.0] * 18,
    }
    for part in (slice(0, 5), slice(5, 18)):
        metric.add_batch(**{name: own[part] for name, own in columns.items()})
    options = {"groups": [i // 2 for i in range(18)], "resamples": 100, "confidence": 0.8, "seed": 7}
    result = metric.compute(**options)
    raw = win_rate(columns["predictions"], **options)
    assert (result["win_rate"], result["low"], result["high"]) == (raw["value"], raw["low"], raw["high"])
    assert result["length_balanced"] == length_balanced(*columns.values(), **options)
    assert result["length_adjusted"] == length_adjusted(*columns.values(), **options)


def test_bad_outcome(metric):
    with pytest.raises(ValueError, match=r"row 1: 2\.0 is no outcome"):
        metric.compute(predictions=[1, 2], prediction_lengths=[1, 1], reference_lengths=[1, 1])


def test_says_what_it_is(metric):
    assert metric.name == "win_rate" and "2404.04475" in metric.citation
    assert set(metric.features) == set(LONGER_WINS)
