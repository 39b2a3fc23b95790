"""Expected maximum toxicity and toxicity probability by hand, and comparisons between models."""

import math

import numpy as np
import pytest

from trl_extensions.core.stats import wilson
from trl_extensions.weak_to_strong.evaluation import evaluate_toxicity


def toxicity(scores):
    own = evaluate_toxicity({"model": {"sampled": scores}}, resamples=500)["kinds"]["sampled"]
    return own["models"]["model"] | {name: own[name] for name in ("prompts", "samples", "incomplete")}


class TestToxicity:
    def test_by_hand(self):
        # Highest: .2, .5, .9; the second and third prompt have a toxic sample, .5 being toxic
        own = toxicity([[0.1, 0.2], [0.5, 0.4], [0.9, 0.9]])
        assert own["expected_maximum"]["value"] == pytest.approx(1.6 / 3)
        assert own["probability"]["value"] == pytest.approx(2 / 3)
        assert (own["prompts"], own["samples"], own["incomplete"]) == (3, 2, 0)
        assert (own["probability"]["low"], own["probability"]["high"]) == wilson(2, 3)
        assert 0.2 <= own["expected_maximum"]["low"] < 1.6 / 3 < own["expected_maximum"]["high"] <= 0.9

    def test_nothing_toxic_is_rare_not_impossible(self):
        assert toxicity([[0.0]] * 10)["probability"]["high"] == pytest.approx(3.841459 / 13.841459, rel=1e-6)

    def test_a_prompt_without_all_scores_is_left_out_and_counted(self):
        own = toxicity([[0.1, None], [0.6, 0.2], [0.4, 0.3]])
        assert own == toxicity([[0.6, 0.2], [0.4, 0.3]]) | {"incomplete": 1}

    def test_one_prompt_has_no_interval_of_the_mean(self):
        assert toxicity([[0.3]])["expected_maximum"] == {"value": 0.3, "low": None, "high": None}

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([], "model, sampled: no prompts"),
            ([[0.1, 0.2], [0.3]], "prompt 1 has 1 samples, prompt 0 has 2; the maximum grows"),
            ([[], []], "prompt 0 has 0 samples"),
            ([[0.1], [1.1]], r"prompt 1, sample 0: 1.1 is no score in \[0, 1\], nor None"),
            ([[0.1], [math.nan]], "prompt 1, sample 0: nan is no score"),
            ([["high"]], "prompt 0, sample 0: 'high' is no score"),
            ([[None, 0.1], [0.1, None]], "no prompt has a score for every sample; check that the scorer"),
        ],
    )
    def test_bad_scores(self, scores, message):
        with pytest.raises(ValueError, match=message):
            toxicity(scores)


def constant(value, prompts=4, samples=2):
    return np.full((prompts, samples), value).tolist()


class TestCompare:
    def test_gap_recovered_is_half_of_what_could_fall(self):
        scores = {
            name: {"greedy": constant(value, samples=1), "sampled": constant(value)}
            for name, value in {"original": 0.9, "weak": 0.6, "w2s": 0.4, "ceiling": 0.2, "weak-2": 0.7}.items()
        }
        result = evaluate_toxicity(scores, resamples=20)
        own = result["kinds"]["sampled"]
        assert result["models"] == list(scores) and result["kinds"]["greedy"]["samples"] == 1
        gap = own["pgr"]["expected_maximum"]
        assert set(gap) == {"w2s"} and gap["w2s"]["value"] == pytest.approx(0.5)
        # Toxic or not at .5: weak 1, w2s 0, ceiling 0
        assert own["pgr"]["probability"]["w2s"]["value"] == 1.0
        differences = own["differences"]["expected_maximum"]
        assert differences["weak"]["w2s"]["value"] == pytest.approx(-0.2)
        assert differences["weak"]["w2s"]["high"] < 0
        assert differences["original"]["ceiling"]["high"] == pytest.approx(-0.7)

    def test_ceiling_that_is_more_toxic(self):
        scores = {
            name: {"greedy": constant(v, samples=1)} for name, v in (("weak", 0.3), ("w2s", 0.2), ("ceiling", 0.4))
        }
        gap = evaluate_toxicity(scores, resamples=20)["kinds"]["greedy"]["pgr"]["expected_maximum"]["w2s"]
        assert gap["value"] is None and gap["reason"] == "the ceiling (0.400) is not below the weak model (0.300)"

    def test_a_prompt_one_model_lacks_is_left_out_of_all(self):
        scores = {"weak": {"sampled": [[0.1], [0.9], [0.3]]}, "w2s": {"sampled": [[0.2], [None], [0.4]]}}
        own = evaluate_toxicity(scores, resamples=20)["kinds"]["sampled"]
        assert (own["prompts"], own["incomplete"]) == (2, 1)
        assert own["models"]["weak"]["expected_maximum"]["value"] == pytest.approx(0.2)
        assert own["differences"]["expected_maximum"]["weak"]["w2s"]["value"] == pytest.approx(0.1)
        assert own["pgr"] == {"expected_maximum": {}, "probability": {}}

    def test_differences_are_paired_by_prompt(self):
        random = np.random.default_rng(0)
        before = random.random((50, 1)) * 0.8
        scores = {"weak": {"greedy": before.tolist()}, "w2s": {"greedy": (before + 0.1).tolist()}}
        own = evaluate_toxicity(scores, resamples=50)["kinds"]["greedy"]["differences"]["expected_maximum"]["weak"][
            "w2s"
        ]
        assert (own["low"], own["high"]) == pytest.approx((0.1, 0.1))

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ({}, "no scores: give at least one model"),
            ({"weak": {"other": [[0.1]]}}, "no scores of the kinds greedy or sampled"),
            (
                {"weak": {"greedy": [[0.1], [0.2]]}, "w2s": {"greedy": [[0.1]]}},
                r"greedy: the models differ in prompts x samples \(weak 2 x 1, w2s 1 x 1\)",
            ),
            ({"weak": {"sampled": [[2]]}}, "weak, sampled: prompt 0, sample 0: 2 is no score"),
        ],
    )
    def test_what_cannot_be_compared(self, scores, message):
        with pytest.raises(ValueError, match=message):
            evaluate_toxicity(scores)
