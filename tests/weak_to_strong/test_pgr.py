"""Performance gap recovered and its bootstrap, against hand calculation and normal theory."""

import itertools
import math

import numpy as np
import pytest

from trl_extensions.weak_to_strong.evaluation import (
    performance_gap_recovered,
    pgr_interval,
    resampled_scores,
    summarise_difference,
    summarise_pgr,
    sums_by_group,
    why_undefined,
)


def means(sums):
    return sums[..., :1] / sums[..., 1:]


def units_of(*models):
    """`(N, M, 2)` of one seed: values and ones."""
    values = np.stack([np.asarray(own, float) for own in models], axis=1)
    return np.stack([values, np.ones_like(values)], axis=2)


def accuracies(n, *shares):
    """A column of n ones and zeros for each share of ones, the ones first."""
    return [np.arange(n) < round(n * share) for share in shares]


class TestValue:
    @pytest.mark.parametrize(
        ("weak", "strong", "ceiling", "expected"),
        [(0.6, 0.7, 0.8, 0.5), (0.5, 0.5, 0.9, 0.0), (0.5, 0.4, 0.75, -0.4), (0.5, 0.8, 0.7, 1.5), (0.2, 0.6, 0.6, 1)],
    )
    def test_by_hand(self, weak, strong, ceiling, expected):
        assert performance_gap_recovered(weak, strong, ceiling) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("ceiling", [0.6, 0.5])
    def test_no_gap(self, ceiling):
        assert performance_gap_recovered(0.6, 0.7, ceiling) is None
        assert why_undefined(0.6, ceiling) == f"the ceiling ({ceiling:.3f}) is not above the weak model (0.600)"
        assert why_undefined(0.6, 0.61) is None

    def test_rounding_is_no_gap(self):
        # 0.1 + 0.2 is above 0.3 by 5e-17
        assert performance_gap_recovered(0.3, 0.5, 0.1 + 0.2) is None

    def test_lower_is_better(self):
        # Toxicity falls from .4 to .3, with .2 to be had
        assert performance_gap_recovered(0.4, 0.3, 0.2, higher_is_better=False) == pytest.approx(0.5)
        assert performance_gap_recovered(0.4, 0.3, 0.5, higher_is_better=False) is None
        assert why_undefined(0.4, 0.5, higher_is_better=False) == (
            "the ceiling (0.500) is not below the weak model (0.400)"
        )


class TestInterval:
    def test_two_rows_by_hand(self):
        # Row 1: only the ceiling is right; row 2: strong and ceiling are. Draws of two rows: 1/4 twice row 1: 0 / 1;
        # 1/2 one of each: .5 / 1; 1/4 twice row 2: 1 / 1. All defined; the middle 40 % are .5, 95 % reach the ends.
        rows = ([0, 0], [0, 1], [1, 1])
        assert pgr_interval(*rows, confidence=0.4) == {
            "value": 0.5, "low": 0.5, "high": 0.5, "reason": None, "undefined_share": 0.0, "reliable": True,
        }  # fmt: skip
        wide = pgr_interval(*rows)
        assert (wide["low"], wide["high"]) == (0.0, 1.0)

    def test_share_of_resamples_without_a_gap(self):
        # The gap lies in one row of two: without it (1/4 of draws) there is none; with it the strong model has it all
        result = pgr_interval([0, 1], [1, 1], [1, 1], resamples=20000)
        # four standard errors of a share of 20,000
        assert result["undefined_share"] == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 20000))
        assert not result["reliable"]
        assert (result["value"], result["low"], result["high"]) == (1.0, 1.0, 1.0)

    def test_five_per_cent_is_the_limit(self):
        draws = np.array([[0.0, 0.5, 1.0]] * 95 + [[1.0, 0.5, 1.0]] * 5)
        point = np.array([0.0, 0.5, 1.0])
        assert summarise_pgr(point, draws)["reliable"]
        draws[0] = [1.0, 0.5, 0.9]
        assert not summarise_pgr(point, draws)["reliable"]

    def test_undefined_says_why_and_has_no_interval(self):
        result = pgr_interval(*accuracies(100, 0.6, 0.7, 0.55))
        assert (result["value"], result["low"], result["high"]) == (None, None, None)
        assert result["reason"] == "the ceiling (0.550) is not above the weak model (0.600)"
        assert result["undefined_share"] == 1.0  # the weak model is right wherever the ceiling is

    def test_lower_is_better_mirrors(self):
        draws = np.random.default_rng(0).random((500, 3)) * 0.1 + [0.3, 0.2, 0.1]
        low = summarise_pgr(draws.mean(axis=0), draws, higher_is_better=False)
        high = summarise_pgr(-draws.mean(axis=0), -draws)
        for name in ("value", "low", "high", "undefined_share"):
            assert low[name] == pytest.approx(high[name], abs=1e-12)
        assert low["value"] is not None

    def test_doubled_rows_in_groups_change_nothing(self):
        rows = (np.random.default_rng(1).random((3, 40)) < [[0.5], [0.6], [0.8]]).astype(float)
        twice = np.repeat(rows, 2, axis=1)
        plain = pgr_interval(*rows, resamples=300)
        assert pgr_interval(*twice, groups=[f"question {i // 2}" for i in range(80)], resamples=300) == plain
        alone = pgr_interval(*twice, resamples=300)
        assert alone["high"] - alone["low"] < plain["high"] - plain["low"]

    @pytest.mark.parametrize(
        ("weak", "ceiling", "options", "message"),
        [
            ([1, 0], [1, 1, 1], {}, r"weak, strong and ceiling have \[2, 3, 3\] items"),
            ([1, math.nan, 0], [1, 1, 1], {}, "weak, item 1: nan is no score"),
            ([], [1, 1, 1], {}, r"have \[0, 3, 3\] items"),
            ([1, 0, 0], [1, 1, 1], {"groups": ["a", "a"]}, "2 groups for 3 rows"),
            (
                [1, 0, 0],
                [1, 1, 1],
                {"groups": ["a"] * 3},
                r"at least two rows \(or groups of rows\), got 1",
            ),
            ([1, 0, 0], [1, 1, 1], {"confidence": 95}, "confidence = 95 must lie between 0 and 1"),
            ([1, 0, 0], [1, 1, 1], {"resamples": 0}, "resamples = 0 must be at least 1"),
        ],
    )
    def test_bad_input(self, weak, ceiling, options, message):
        with pytest.raises(ValueError, match=message):
            pgr_interval(weak, [1, 1, 0], ceiling, **options)


class TestBootstrap:
    def test_all_draws_of_two_seeds_and_two_rows(self):
        # Row values 0, 1 in seed A and 2, 6 in seed B, the same rows in both. 4 draws of rows times 4 of seeds.
        units = [units_of([0, 1]), units_of([2, 6])]
        exact = sorted(
            (units[s][list(rows), 0, 0].mean() + units[t][list(rows), 0, 0].mean()) / 2
            for rows in itertools.product(range(2), repeat=2)
            for s, t in itertools.product(range(2), repeat=2)
        )
        draws = resampled_scores(units, means, resamples=40000)[:, 0, 0]
        values, counts = np.unique(draws, return_counts=True)
        expected, times = np.unique(exact, return_counts=True)
        np.testing.assert_allclose(values, expected)
        # five standard errors of a share
        np.testing.assert_allclose(counts / 40000, times / 16, atol=5 * math.sqrt(0.25 / 40000))

    def test_standard_error_of_one_seed_is_the_textbooks(self):
        values = np.random.default_rng(2).random(400)
        draws = resampled_scores([units_of(values)], means, resamples=4000)
        # The error of a standard deviation of 4000 draws is 1.1 % of it
        assert draws.std() == pytest.approx(values.std() / 20, rel=0.06)

    def test_rows_that_are_hard_in_every_seed_do_not_average_out(self):
        values = np.random.default_rng(3).random(200)
        together = resampled_scores([units_of(values)] * 4, means, resamples=3000).std()
        assert together == pytest.approx(values.std() / math.sqrt(200), rel=0.08)

    def test_models_share_their_draws(self):
        values = np.random.default_rng(4).random(50)
        draws = resampled_scores([units_of(values, values + 0.1)], means, resamples=100)[:, :, 0]
        np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 0.1)
        assert draws[:, 0].std() > 0
        assert summarise_difference(0.1, draws[:, 1] - draws[:, 0])["above_zero"] == 1.0
        assert summarise_difference(0.0, draws[:, 0] - draws[:, 0]) == {
            "value": 0.0, "low": 0.0, "high": 0.0, "above_zero": 0.0,
        }  # fmt: skip

    def test_blocks_of_draws_fit_together(self, monkeypatch):
        units = [units_of(np.arange(10))]
        # 7 draws at a time, the last block of 6
        monkeypatch.setattr("trl_extensions.weak_to_strong.evaluation.BLOCK", 70)
        draws = resampled_scores(units, means, resamples=20)
        assert draws.shape == (20, 1, 1)
        assert len(np.unique(draws)) > 10  # no block repeats another


class TestGroups:
    def test_in_order_of_appearance_and_none_alone(self):
        sums = sums_by_group(np.array([1, 2, 4, 8, 16]), ["b", None, "a", "b", None])
        assert sums.tolist() == [9, 2, 4, 16]
