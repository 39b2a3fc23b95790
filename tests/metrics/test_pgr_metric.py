"""The module `pgr` of the library `evaluate`, loaded by its path without a network."""

import evaluate
import numpy as np
import pytest

from trl_extensions.metrics import metric_path
from trl_extensions.weak_to_strong.evaluation import pgr_interval


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(metric_path("pgr"))


HUNDRED = {
    "references": [1] * 100,
    "weak_predictions": [1] * 60 + [0] * 40,
    "predictions": [1] * 70 + [0] * 30,
    "ceiling_predictions": [1] * 80 + [0] * 20,
}


def test_by_hand(metric):
    result = metric.compute(**HUNDRED)
    assert result["pgr"] == pytest.approx(0.5)
    assert (result["weak"], result["strong"], result["ceiling"]) == (0.6, 0.7, 0.8)
    assert result["reason"] is None


def test_batches_and_options(metric):
    random = np.random.default_rng(0)
    columns = {name: random.integers(3, size=60) for name in HUNDRED}
    columns["ceiling_predictions"] = columns["references"].copy()
    options = {"groups": [i // 3 for i in range(60)], "confidence": 0.8}
    for part in (slice(0, 25), slice(25, 60)):
        metric.add_batch(**{name: own[part] for name, own in columns.items()})
    result = metric.compute(**options)
    right = [
        (columns[name] == columns["references"]).astype(float)
        for name in ("weak_predictions", "predictions", "ceiling_predictions")
    ]
    expected = pgr_interval(*right, **options)
    assert (result["pgr"], result["low"], result["high"]) == (expected["value"], expected["low"], expected["high"])


def test_options_of_the_bootstrap_are_gone_with_a_line(metric):
    with pytest.warns(FutureWarning, match="no effect"):
        assert metric.compute(**HUNDRED, resamples=100, seed=1)["pgr"] == pytest.approx(0.5)


def test_undefined(metric):
    result = metric.compute(**HUNDRED | {"ceiling_predictions": [1] * 60 + [0] * 40})
    assert result["pgr"] is result["low"] is result["high"] is None
    assert result["reason"] == "the ceiling (0.600) is not above the weak model (0.600)"


def test_says_what_it_is(metric):
    assert metric.name == "pgr" and "2312.09390" in metric.citation
    assert set(metric.features) == set(HUNDRED)


def test_unknown_metric():
    with pytest.raises(ValueError, match="no metric 'bleu'; there are crr, pgr, win_rate"):
        metric_path("bleu")
