"""Intervals of shares and ratios, against published numbers, hand calculation and normal theory."""

import math

import numpy as np
import pytest
from scipy import stats

from trl_extensions.core.stats import Spread, bootstrap, bootstrap_ratio, group_index, wilson


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, no continuity correction)
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_published_numbers(self, successes, n, low, high):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)

    def test_none_and_all_by_hand(self):
        # (p - 0)^2 = z^2 p (1 - p) / n: p = 0 or z^2 / (n + z^2); z = 1.959964, z^2 = 3.841459
        assert wilson(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459, rel=1e-6))
        assert wilson(10, 10) == (pytest.approx(10 / 13.841459, rel=1e-6), 1.0)

    def test_other_confidence_by_hand(self):
        # half of 4 at z = 1 (68.27 %): (p - 1/2)^2 = p (1 - p) / 4, so p = 1/2 +- sqrt(1/20)
        one_sigma = math.erf(1 / math.sqrt(2))
        assert wilson(2, 4, one_sigma) == pytest.approx((0.5 - math.sqrt(0.05), 0.5 + math.sqrt(0.05)))

    @pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (40, 1000)])
    @pytest.mark.parametrize("confidence", [0.8, 0.95])
    def test_scipy_has_the_same_for_whole_counts(self, successes, n, confidence):
        theirs = pytest.importorskip("scipy.stats").binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson(successes, n, confidence) == pytest.approx(tuple(theirs), abs=1e-12)

    def test_nothing_seen_nothing_known(self):
        assert wilson(0, 0) == (0.0, 1.0)

    @pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 5)])
    def test_impossible_counts(self, successes, n):
        with pytest.raises(ValueError, match=f"successes = {successes} must lie between 0 and total = {n}"):
            wilson(successes, n)

    @pytest.mark.parametrize("confidence", [0, 1, 95])
    def test_impossible_confidence(self, confidence):
        with pytest.raises(ValueError, match=f"confidence = {confidence} must lie between 0 and 1"):
            wilson(1, 2, confidence)
        with pytest.raises(ValueError, match=f"confidence = {confidence} must lie between 0 and 1"):
            bootstrap_ratio([1, 2], [1, 2], confidence)


def mean_of(values):
    values = np.asarray(values, float)
    return lambda times: (times @ values) / times.sum(axis=1)


class TestBootstrap:
    def test_two_rows_by_hand(self):
        # Means of two draws of 0 and 1: 0 (1/4), 1/2 (1/2), 1 (1/4)
        assert bootstrap(mean_of([0, 1]), 2, confidence=0.4) == (0.5, 0.5)
        assert bootstrap(mean_of([0, 1]), 2) == (0.0, 1.0)

    def test_groups_are_drawn_whole(self):
        # Two groups of unlike size: means of two draws are 0, 1 / 4 (one of each) and 1
        values, groups = [1, 0, 0, 0], ["a", "b", "b", "b"]
        seen = set()

        def mean(times):
            seen.update(map(tuple, times.tolist()))
            return mean_of(values)(times)

        assert bootstrap(mean, 4, groups=groups, confidence=0.4) == (0.25, 0.25)
        assert seen == {(2, 0, 0, 0), (1, 1, 1, 1), (0, 2, 2, 2)}

    def test_strata_keep_their_sizes(self):
        strata = np.array(["x", "y", "x", "y", "y"])

        def sizes(times):
            assert (times[:, strata == "x"].sum(axis=1) == 2).all() and (
                times[:, strata == "y"].sum(axis=1) == 3
            ).all()
            return times[:, 0]

        assert bootstrap(sizes, 5, strata=strata) == (0.0, 2.0)

    def test_resamples_without_a_value_are_left_out(self):
        assert bootstrap(lambda times: np.where(times[:, 0] > 0, 3.0, np.nan), 2) == (3.0, 3.0)
        assert bootstrap(lambda times: np.full(len(times), np.nan), 2) == (None, None)

    def test_blocks_do_not_matter(self, monkeypatch):
        values = np.arange(7.0)
        whole = bootstrap(mean_of(values), 7, seed=4)
        monkeypatch.setattr("trl_extensions.core.stats.BLOCK", 30)
        assert bootstrap(mean_of(values), 7, seed=4) == whole

    def test_no_group_is_a_group_of_its_own(self):
        index, number = group_index(["a", None, "a", None], 4)
        assert (index.tolist(), number) == ([0, 1, 0, 2], 3)
        with pytest.raises(ValueError, match="2 groups for 3 rows"):
            group_index(["a", "b"], 3)


class TestRatio:
    def test_two_rows_by_hand(self):
        # Draws of two rows: both the first (1/4): 1 / 1; one of each (1/2): 1 / 4; both the second (1/4): 0 / 3.
        # The middle 40 % are all 1/4 (a mean of the rows' own ratios would be 1/2), the middle 95 % reach both ends.
        rows = ([1, 0], [1, 3])
        assert bootstrap_ratio(*rows, confidence=0.4) == (0.25, 0.25)
        assert bootstrap_ratio(*rows) == (0.0, 1.0)

    def test_rows_of_one_ratio_leave_no_doubt(self):
        assert bootstrap_ratio([2, 4, 10], [1, 2, 5]) == (2.0, 2.0)

    def test_agrees_with_normal_theory(self):
        # A ratio R of means has the standard error sd(x - R y) / (mean(y) sqrt(n)), to first order.
        random = np.random.default_rng(3)
        y = random.integers(20, 60, size=500)
        x = random.poisson(0.05 * y)
        ratio = x.sum() / y.sum()
        error = np.std(x - ratio * y, ddof=1) / y.mean() / math.sqrt(500)
        low, high = bootstrap_ratio(x.tolist(), y.tolist())
        assert low == pytest.approx(ratio - 1.96 * error, abs=0.2 * error)
        assert high == pytest.approx(ratio + 1.96 * error, abs=0.2 * error)

    def test_the_seed_decides(self):
        x, y = [1, 0, 2, 0, 5], [10, 20, 30, 7, 11]
        assert bootstrap_ratio(x, y, seed=1) == bootstrap_ratio(x, y, seed=1)
        assert bootstrap_ratio(x, y, resamples=20, seed=1) != bootstrap_ratio(x, y, resamples=20, seed=2)

    def test_rows_without_tokens_are_left_out(self):
        assert bootstrap_ratio([1, 0, 0, 2], [5, 0, 0, 6]) == bootstrap_ratio([1, 2], [5, 6])
        assert all(map(math.isnan, bootstrap_ratio([1, 0], [5, 0])))

    @pytest.mark.parametrize("rows", [0, 1])
    def test_too_few_rows_tell_nothing(self, rows):
        assert all(map(math.isnan, bootstrap_ratio([1] * rows, [2] * rows)))

    @pytest.mark.parametrize(
        ("numerator", "denominator"), [(1, 0), (1, -2), (math.nan, 1), (1, math.inf), (-math.inf, 3)]
    )
    def test_a_row_that_is_no_ratio_is_named(self, numerator, denominator):
        with pytest.raises(ValueError, match=r"row 1: .* is no ratio"):
            bootstrap_ratio([1, numerator, 3], [1, denominator, 2])

    def test_unequal_lengths(self):
        with pytest.raises(ValueError, match="2 numerators but 3 denominators"):
            bootstrap_ratio([1, 2], [1, 2, 3])


class TestSpread:
    """Values of S seeds on U rows, whose mean over rows they are: influence is the rows themselves."""

    def of(self, rows, **options):
        rows = np.asarray(rows, float)[..., None]
        return Spread.of(rows.mean(axis=1), rows, **options)

    def test_rows_alone_are_the_textbooks_t(self):
        rows = np.random.default_rng(0).random(30)
        low, high = self.of(rows[None], fixed_seeds=True).interval(np.ones(1))
        expected = stats.t.interval(0.95, 29, rows.mean(), stats.sem(rows))
        assert (low, high) == pytest.approx(expected)

    def test_seeds_alone_are_the_textbooks_t(self):
        # Rows are all alike, so that nothing of the error is theirs
        means = np.array([0.6, 0.7, 0.75])
        low, high = self.of(np.repeat(means[:, None], 20, axis=1)).interval(np.ones(1))
        assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, means.mean(), stats.sem(means)))

    def test_parts_by_hand(self):
        # Two seeds, two rows: a = (0, 1), b = (0, 3). Variance of the rows' means (0, 2) over 2 rows: 1; of the seeds'
        # own rows, 1 / 2 and 9 / 2, mean 5 / 2 over 2 rows: 5 / 4; the difference, 1 / 4, is in the seeds' variance,
        # that of (1 / 2, 3 / 2) over 2 seeds: 1 / 4.
        own = self.of([[0, 1], [0, 3]])
        assert own.rows == pytest.approx(0.75) and own.seeds == pytest.approx(0.25)
        t = math.tan(0.95 * math.pi / 2)  # one degree of freedom
        assert own.half_width(np.ones(1)) == pytest.approx(t * (0.75 + 0.25) / 1)

    def test_repeated_seeds_add_nothing(self):
        rows = np.random.default_rng(1).random(25)
        once, thrice = self.of(rows[None], fixed_seeds=True), self.of(np.stack([rows] * 3))
        assert thrice.interval(np.ones(1)) == pytest.approx(once.interval(np.ones(1)))

    def test_ratio_without_error_and_without_bounds(self):
        ones, two = np.ones((2, 10)), np.full((2, 10), 2.0)
        both = np.stack([ones, two], axis=2)
        own = Spread.of(both.mean(axis=1), both)
        assert own.ratio(np.array([1.0, 0]), np.array([0, 1.0])) == (0.5, 0.5)
        noisy = np.random.default_rng(2).normal(size=(2, 10, 2))
        assert Spread.of(noisy.mean(axis=1), noisy).ratio(np.array([1.0, 0]), np.array([0, 1.0])) is None

    def test_too_little(self):
        with pytest.raises(ValueError, match="at least two seeds"):
            self.of([[0, 1]])
        with pytest.raises(ValueError, match=r"at least two rows \(or groups of rows\), got 1"):
            self.of([[0], [1]])
