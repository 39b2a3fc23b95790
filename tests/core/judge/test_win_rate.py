"""Win rates by hand, by the equations of their fits, by scikit-learn, and where length alone decides."""

import math

import numpy as np
import pytest

from trl_extensions.core.judge.win_rate import (
    fit_logistic,
    length_adjusted,
    length_balanced,
    win_rate,
)
from trl_extensions.core.stats import wilson


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


class TestRaw:
    def test_by_hand(self):
        # 3 wins, 2 ties, 3 losses: 4 of 8
        result = win_rate([1, 1, 1, 0.5, 0.5, 0, 0, 0])
        assert result["value"] == 0.5 and result["n"] == 8 and result["interval"] == "wilson"
        assert (result["low"], result["high"]) == wilson(4, 8)

    def test_groups_widen_the_interval(self):
        # ten queries of six rows that all go the same way know what ten rows know
        outcomes = [1.0] * 30 + [0.0] * 30
        groups = [i // 6 for i in range(60)]
        wide, narrow = win_rate(outcomes, groups=groups), win_rate(outcomes, groups=range(60))
        assert wide["interval"] == narrow["interval"] == "bootstrap"
        ratio = (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"])
        assert ratio == pytest.approx(math.sqrt(6), rel=0.15)
        # the middle 95 % of the share of heads in 60 tosses is 0.5 +- 1.96 sqrt(0.25 / 60) = 0.5 +- 0.127
        assert (narrow["low"], narrow["high"]) == pytest.approx((0.373, 0.627), abs=0.02)

    def test_no_row_of_another_kind(self):
        # every resample is the same, so the number of groups decides
        result = win_rate([1.0] * 12, groups=[i // 3 for i in range(12)])
        assert result["value"] == 1.0 and (result["low"], result["high"]) == wilson(4, 4)
        result = win_rate([0.5] * 12, groups=[i // 3 for i in range(12)])
        assert (result["low"], result["high"]) == wilson(2, 4)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"outcomes": []}, "there are no outcomes"),
            ({"outcomes": [1, 0.3]}, "row 1: 0.3 is no outcome"),
            ({"outcomes": [None, 1]}, "row 0: None is no outcome"),
            ({"outcomes": [math.nan]}, "row 0: nan is no outcome"),
            ({"outcomes": [1, 0], "groups": [1]}, "1 groups for 2 rows"),
            ({"outcomes": [1, 0], "confidence": 1.0}, "confidence = 1.0"),
            ({"outcomes": [1, 0], "groups": [1, 2], "resamples": 0}, "resamples = 0"),
        ],
    )
    def test_bad_input(self, settings, message):
        with pytest.raises(ValueError, match=message):
            win_rate(**settings)


class TestBalanced:
    def test_by_hand(self):
        # shorter: 1 of 2, equal (within 1.2): 2.5 of 3, longer: 4 of 5; mean of 1/2, 5/6 and 4/5
        lengths = [50, 10, 100, 110, 120, 121, 200, 200, 200, 200]
        others = [100] * 10
        outcomes = [1, 0, 1, 0.5, 1, 1, 1, 1, 1, 0]
        result = length_balanced(outcomes, lengths, others)
        assert result["strata"] == {
            "shorter": {"n": 2, "value": 0.5},
            "equal": {"n": 3, "value": pytest.approx(2.5 / 3)},
            "longer": {"n": 5, "value": 0.8},
        }
        assert result["value"] == pytest.approx((1 / 2 + 5 / 6 + 4 / 5) / 3) and result["empty"] == []

    def test_length_alone_decides(self):
        # the longer answer wins, and one side is longer in 3 of 4 rows: raw 0.75, balanced (0 + 1) / 2
        outcomes, lengths, others = [1, 1, 1, 0] * 10, [90, 80, 70, 10] * 10, [20] * 40
        assert win_rate(outcomes)["value"] == 0.75
        result = length_balanced(outcomes, lengths, others)
        assert result["value"] == 0.5 and result["empty"] == ["equal"]
        assert (result["low"], result["high"]) == (0.5, 0.5)  # nothing varies within a stratum

    def test_interval_of_two_strata(self):
        # each a share of 0.5 of 50 rows: the error of their mean is sqrt(2 * 0.25 / 50) / 2 = 0.05
        outcomes = [1, 0] * 50
        lengths, others = [10] * 50 + [40] * 50, [20] * 100
        result = length_balanced(outcomes, lengths, others, resamples=4000)
        assert (result["low"], result["high"]) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.012)
        # pairs of equal rows: half of what is known
        pairs = [0] * 25 + [1] * 25 + [1] * 25 + [0] * 25
        groups = [i // 5 for i in range(100)]
        wide = length_balanced(pairs, lengths, others, groups=groups)
        assert wide["high"] - wide["low"] > 1.5 * (result["high"] - result["low"])

    def test_groups_that_leave_a_stratum_empty(self):
        # two groups, one stratum each: a half of the resamples has both, and those are all alike
        result = length_balanced([1, 1, 0, 0], [10, 10, 40, 40], [20] * 4, groups="aabb")
        assert result["value"] == result["low"] == result["high"] == 0.5

    def test_empty_answers_have_a_length(self):
        result = length_balanced([1, 0, 0.5], [0, 10, 0], [10, 0, 0])
        assert [entry["n"] for entry in result["strata"].values()] == [1, 1, 1]
        assert result["value"] == 0.5

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            ([1, -1], "row 1: a length of -1.0 in `lengths`"),
            ([math.nan, 1], "row 0: a length of nan"),
            ([1], "one number a row: 2 of them"),
        ],
    )
    def test_bad_lengths(self, lengths, message):
        with pytest.raises(ValueError, match=message):
            length_balanced([1, 0], lengths, [1, 1])


class TestAdjusted:
    def test_symmetric_by_hand(self):
        # as often longer as shorter, and as many wins when longer as losses when shorter: 0.5 at equal length
        lengths, others = [819] * 3 + [19] * 3, [19] * 3 + [819] * 3  # (819 + 1) / (19 + 1) = 41 and 1 / 41
        result = length_adjusted([1, 1, 0, 0, 0, 1], lengths, others)
        assert result["value"] == pytest.approx(0.5, abs=1e-9) and result["slope"] > 0 and result["overlap"] == 0.5

    def test_score_equations(self):
        # at the optimum: sum (y - p) = 0, and sum (y - p) x = slope, which is the derivative of slope^2 / 2
        outcomes = np.array([1, 1, 0.5, 0, 1, 0, 0, 1, 0.5, 1])
        lengths = np.array([30, 25, 22, 10, 60, 15, 18, 33, 20, 45])
        others = np.array([20, 20, 21, 19, 25, 22, 20, 30, 26, 21])
        ratio = np.log((lengths + 1) / (others + 1))
        x = np.tanh(ratio / math.sqrt((ratio**2).mean()))
        result = length_adjusted(outcomes, lengths, others)
        slope, intercept = result["slope"], math.log(result["value"] / (1 - result["value"]))
        p = np.array([sigmoid(intercept + slope * value) for value in x])
        assert (outcomes - p).sum() == pytest.approx(0, abs=1e-6)
        assert ((outcomes - p) * x).sum() == pytest.approx(slope, abs=1e-6)
        assert result["low"] < result["value"] < result["high"]

    def test_equals_scikit_learn(self):
        from sklearn.linear_model import LogisticRegression

        random = np.random.default_rng(0)
        x, y = np.tanh(random.normal(size=40)), random.choice([0.0, 0.5, 1.0], size=40)
        weights = random.multinomial(40, np.full(40, 1 / 40), size=5).astype(float)
        weights[4] *= np.where(y == 1, 0.01, 1.0)  # nearly all lost
        for row in weights:
            # a tie is half a win and half a loss
            model = LogisticRegression(tol=1e-10, max_iter=10_000)
            model.fit(np.tile(x, 2)[:, None], [1] * 40 + [0] * 40, np.concatenate([row * y, row * (1 - y)]))
            expected = sigmoid(model.intercept_[0]), model.coef_[0, 0]
            assert fit_logistic(x, y, row) == pytest.approx(expected, abs=1e-4)

    def test_length_alone_decides(self):
        # separated: the slope is held by its penalty, and at equal length nobody is better
        result = length_adjusted([1, 0] * 20, [80, 10] * 20, [10, 80] * 20)
        assert result["value"] == pytest.approx(0.5, abs=1e-6) and 1 < result["slope"] < 20

    def test_finds_the_rate_that_made_the_data(self):
        # P(win) = sigmoid(log(0.7 / 0.3) + 2 x): at equal length 0.7, in the data more, since one side writes more
        random = np.random.default_rng(1)
        others = np.full(4000, 100.0)
        ratio = random.normal(0.5, 1.0, size=4000)
        lengths = np.exp(ratio) * 101 - 1
        lengths = np.maximum(lengths, 0)
        x = np.tanh(ratio / math.sqrt((ratio**2).mean()))
        wins = random.random(4000) < 1 / (1 + np.exp(-(math.log(0.7 / 0.3) + 2 * x)))
        outcomes = wins.astype(float)
        raw, result = win_rate(outcomes), length_adjusted(outcomes, lengths, others, resamples=200)
        assert raw["low"] > 0.72
        assert result["low"] < 0.7 < result["high"] and result["high"] - result["low"] < 0.06
        assert result["slope"] == pytest.approx(2, abs=0.3)

    def test_nothing_to_fit(self):
        all_won = length_adjusted([1, 1, 1], [1, 2, 3], [2, 2, 2])
        assert all_won["value"] == 1.0 and all_won["reason"] == "all outcomes are the same"
        assert (all_won["low"], all_won["high"]) == wilson(3, 3)
        equally_long = length_adjusted([1, 0, 1, 0.5], [5] * 4, [5] * 4)
        assert equally_long["value"] == 0.625 and equally_long["reason"] == "all answers are equally long"

    def test_resamples_of_one_kind_of_outcome(self):
        # one loss of five rows: a third of the resamples, (4/5)^5, has none of it
        result = length_adjusted([1, 1, 1, 1, 0], [10, 30, 12, 25, 20], [20] * 5)
        assert result["high"] == 1.0 and 0 < result["low"] < result["value"] < 1
        for won in (1.0, 0.0):
            assert fit_logistic(np.array([0.1, 0.2]), np.array([1.0, 0.0]), np.array([won, 1 - won])) == (won, 0.0)

    def test_always_longer(self):
        result = length_adjusted([1, 0, 1, 1], [30, 40, 50, 60], [20] * 4)
        assert result["overlap"] == 0.0


@pytest.mark.parametrize("rate", [length_balanced, length_adjusted])
def test_the_same_seed_gives_the_same_interval(rate):
    random = np.random.default_rng(2)
    columns = random.choice([0, 0.5, 1], 50), random.integers(1, 90, 50), random.integers(1, 90, 50)
    assert rate(*columns, seed=3) == rate(*columns, seed=3)
    assert rate(*columns, seed=3)["low"] != rate(*columns, seed=4)["low"]
