"""Performance gap recovered and its interval, against hand calculation and Fieller's quadratic."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.w2s_coverage import coverage
from trl_extensions.weak_to_strong.evaluation import (
    Comparison,
    performance_gap_recovered,
    pgr_interval,
    sums_by_group,
    why_undefined,
)


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
        # Row 1: only the ceiling is right; row 2: strong and ceiling are. The gap is 1 in both rows, so its error is 0
        # and the ratio is the mean of 0 and 1, with standard error 1 / 2 and one degree of freedom: t = 1 at 50 %.
        own = pgr_interval([0, 0], [0, 1], [1, 1], confidence=0.5)
        assert own == {"value": 0.5, "low": pytest.approx(0, abs=1e-8), "high": pytest.approx(1), "reason": None}

    def test_fieller_by_his_quadratic(self):
        # Bounds are the roots of (A - rB)^2 = t^2 (vaa - 2 r vab + r^2 vbb), over N rows with N - 1 degrees of freedom
        rows = (np.random.default_rng(0).random((3, 150)) < [[0.5], [0.65], [0.85]]).astype(float)
        own = pgr_interval(*rows)
        above, below = rows[1] - rows[0], rows[2] - rows[0]
        (vaa, vab), (_, vbb) = np.cov(above, below) / 150
        t2 = stats.t.ppf(0.975, 149) ** 2
        roots = np.roots(
            [
                below.mean() ** 2 - t2 * vbb,
                -2 * (above.mean() * below.mean() - t2 * vab),
                above.mean() ** 2 - t2 * vaa,
            ]
        )
        assert (own["low"], own["high"]) == pytest.approx(sorted(roots), abs=1e-7)
        assert own["value"] == pytest.approx(above.mean() / below.mean())

    def test_a_gap_that_is_not_clear_of_zero(self):
        # Gap .02 of 100 rows: 8 rows gained, 6 lost, standard error sqrt(.14 - .0004) / sqrt(99) = .0375
        weak, ceiling = np.ones(100), np.ones(100)
        weak[:8], ceiling[8:14] = 0, 0
        result = pgr_interval(weak, ceiling, ceiling)
        assert (result["value"], result["low"], result["high"]) == (None, None, None)
        assert "+0.020 ± 0.075" in result["reason"]

    def test_undefined_says_why_and_has_no_interval(self):
        result = pgr_interval(*accuracies(100, 0.6, 0.7, 0.55))
        assert (result["value"], result["low"], result["high"]) == (None, None, None)
        assert result["reason"] == "the ceiling (0.550) is not above the weak model (0.600)"

    def test_lower_is_better_mirrors(self):
        values = np.random.default_rng(0).random((1, 40, 3)) * 0.1 + [0.3, 0.2, 0.1]
        names, mean = ("weak", "w2s", "ceiling"), values.mean(axis=1)
        low = Comparison(names, mean, values, fixed_seeds=True).pgr("w2s", higher_is_better=False)
        high = Comparison(names, -mean, -values, fixed_seeds=True).pgr("w2s")
        for name in ("value", "low", "high"):
            assert low[name] == pytest.approx(high[name], abs=1e-9)
        assert low["value"] is not None

    def test_doubled_rows_in_groups_change_nothing(self):
        rows = (np.random.default_rng(1).random((3, 40)) < [[0.5], [0.6], [0.8]]).astype(float)
        twice = np.repeat(rows, 2, axis=1)
        plain = pgr_interval(*rows)
        grouped = pgr_interval(*twice, groups=[f"question {i // 2}" for i in range(80)])
        assert [grouped[n] for n in ("value", "low", "high")] == pytest.approx(
            [plain[n] for n in ("value", "low", "high")]
        )
        alone = pgr_interval(*twice)
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
        ],
    )
    def test_bad_input(self, weak, ceiling, options, message):
        with pytest.raises(ValueError, match=message):
            pgr_interval(weak, [1, 1, 0], ceiling, **options)


class TestComparison:
    def test_models_are_paired(self):
        values = np.random.default_rng(4).random((1, 50, 1))
        both = np.concatenate([values, values + 0.1], axis=2)
        own = Comparison(("a", "b"), both.mean(axis=1), both, fixed_seeds=True)
        assert own.estimate({"b": 1, "a": -1}) == {n: pytest.approx(0.1) for n in ("value", "low", "high")}
        assert own.estimate({"a": 1})["low"] < own.estimate({"a": 1})["value"]

    def test_one_seed_and_one_row_have_no_interval(self):
        values = np.random.default_rng(4).random((2, 50, 1))
        assert Comparison(("a",), values[:1].mean(axis=1), values[:1]).estimate({"a": 1})["low"] is None
        assert Comparison(("a",), values[:, 0], values[:, :1]).estimate({"a": 1})["low"] is None
        assert Comparison(("a",), values.mean(axis=1), values).estimate({"a": 1})["low"] is not None


class TestCoverage:
    @pytest.mark.parametrize(("seeds", "deviation"), [(2, 0.04), (3, 0.0), (3, 0.04), (5, 0.02)])
    def test_intervals_hold_the_truth_in_93_to_97_of_100(self, seeds, deviation):
        runs = 500
        accuracy, gap, defined = coverage(seeds, deviation, runs=runs)
        error = 4 * math.sqrt(0.95 * 0.05 / runs)  # four standard errors of the simulation
        assert 0.93 - error <= accuracy <= 0.97 + error
        if seeds > 2:  # of two seeds next to none defines a PGR at 4 points
            assert defined > 0.5 and 0.93 - error <= gap


class TestGroups:
    def test_in_order_of_appearance_and_none_alone(self):
        sums = sums_by_group(np.array([1, 2, 4, 8, 16]), ["b", None, "a", "b", None])
        assert sums.tolist() == [9, 2, 4, 16]
