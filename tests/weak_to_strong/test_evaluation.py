"""Scores of weak, weak-to-strong and ceiling models, by hand and by two paths."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from trl_extensions.weak_to_strong.evaluation import (
    Predictions,
    _auroc,
    _row_sums,
    _scores_of_sums,
    agreement_with_weak,
    evaluate_run,
    load_run,
    scores,
)


def predicting(classes, labels, k=2, sure=0.8, prefix="r"):
    """Predictions with probability `sure` on a class for each row."""
    probs = np.full((len(classes), k), (1 - sure) / (k - 1))
    probs[np.arange(len(classes)), classes] = sure
    return Predictions(tuple(f"{prefix}{i}" for i in range(len(classes))), np.array(labels), probs)


def flat(own):
    """The numbers of nested estimates."""
    if isinstance(own, dict):
        return [number for value in own.values() for number in flat(value)]
    return [float(value) for value in (own if isinstance(own, list) else [own]) if value is not None]


def random_run(accuracies, n=60, seeds=2, k=2):
    random = np.random.default_rng(5)
    labels = random.integers(k, size=n)
    run = {}
    for seed in range(seeds):
        own = {}
        for name, accuracy in accuracies.items():
            guess = np.where(random.random(n) < accuracy, labels, (labels + 1) % k)
            own[name] = predicting(guess, labels, k)
        run[seed] = own
    return run


FOUR = {"ceiling": 0.9, "soft_ce": 0.75, "weak:nb": 0.55, "weak": 0.6}


class TestPredictions:
    def row(self, **changes):
        return {"id": "a", "label": 1, "probs": [0.3, 0.7]} | changes

    def test_rows_with_more_columns_and_few_digits(self):
        own = Predictions.from_rows([self.row(text="x"), self.row(id="b", label=0, probs=[0.3333, 0.6668])])
        assert own.ids == ("a", "b") and own.labels.tolist() == [1, 0] and own.predicted.tolist() == [1, 1]
        np.testing.assert_allclose(own.probs.sum(axis=1), 1, rtol=1e-12)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"id": "a"}, r"row 1 \(id 'a'\): ids must be texts that occur once"),
            ({"id": 7}, r"row 1 \(id 7\): ids must be texts"),
            ({"label": None}, r"row 1 \(id 'b'\): label None is not one of 0 to 1; test rows need their true class"),
            ({"label": 2}, "label 2 is not one of 0 to 1"),
            ({"label": True}, "label True is not one of 0 to 1"),
            ({"probs": [0.2, 0.3, 0.5]}, r"row 1 \(id 'b'\): 3 probabilities, but the first row has 2"),
            ({"probs": [0.5, math.nan]}, "are no probabilities"),
            ({"probs": [-0.1, 1.1]}, "are no probabilities"),
            ({"probs": [0.6, 0.6]}, "are no probabilities; they must be >= 0 and sum to 1"),
            ({"probs": [1.0]}, "must be a list of at least two numbers"),
            ({"probs": None}, "must be a list of at least two numbers, got None"),
            ({"probs": ["yes", "no"]}, "must be a list of at least two numbers"),
        ],
    )
    def test_bad_rows_are_named(self, changes, message):
        with pytest.raises(ValueError, match=f"weak.jsonl: .*{message}"):
            Predictions.from_rows([self.row(), self.row(id="b") | changes], "weak.jsonl")

    def test_without_labels(self):
        own = Predictions.from_rows([self.row(label=None), self.row(id="b", label=None)])
        assert not own.labelled and own.labels.tolist() == [-1, -1]
        with pytest.raises(ValueError, match="label 1 is not one of"):
            Predictions.from_rows([self.row(label=None), self.row(id="b")])
        with pytest.raises(ValueError, match="no true labels"):
            evaluate_run({0: {"weak": own, "soft_ce": own}})

    def test_files(self, tmp_path):
        for seed, label in ((10, 1), (2, 0)):
            for model in ("weak", "soft_ce+weights"):
                path = tmp_path / f"seed_{seed}" / f"{model}.jsonl"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(self.row(label=label)) + "\n")
        run = load_run(tmp_path)
        assert list(run) == [2, 10] and set(run[2]) == {"weak", "soft_ce+weights"}
        assert run[10]["weak"].labels.tolist() == [1]
        with pytest.raises(FileNotFoundError, match=r"no predictions; expected files such as seed_0/weak\.jsonl"):
            load_run(tmp_path / "seed_2")


class TestScores:
    def test_by_hand(self):
        # Labels 1 1 1 0, said 1 1 0 0, each with .8: right .8 .8 .2 .8 on the true class
        own = scores(predicting([1, 1, 0, 0], [1, 1, 1, 0]))
        assert own["accuracy"] == pytest.approx(3 / 4)
        assert own["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
        # Class 1: 2 * 2 / (2 + 3); class 0: 2 * 1 / (2 + 1)
        assert own["f1_positive"] == pytest.approx(4 / 5)
        assert own["f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
        assert own["nll"] == pytest.approx(-(3 * math.log(0.8) + math.log(0.2)) / 4)
        assert own["ece"] == pytest.approx(0.8 - 0.75)

    def test_calibration_by_bins(self):
        # .9 in one bin, half right: |.9 - .5| on 2 rows; .7 in another, all right: |.7 - 1| on 1 row
        own = Predictions(tuple("abc"), np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.1, 0.9], [0.3, 0.7]]))
        assert scores(own)["ece"] == pytest.approx((0.4 * 2 + 0.3) / 3)

    def test_more_classes_have_no_positive_one(self):
        assert "f1_positive" not in scores(predicting([0, 1, 2], [0, 1, 1], k=3))

    @pytest.mark.parametrize("k", [2, 4])
    def test_sums_give_what_scikit_learn_gives(self, k):
        random = np.random.default_rng(k)
        for trial in range(20):
            # The last class occurs in neither labels nor predictions of every other trial
            labels = random.integers(max(2, k - trial % 2), size=30)
            probs = random.dirichlet(np.ones(k), size=30)
            if trial % 2 and k > 2:
                probs[:, -1] = 0
                probs /= probs.sum(axis=1, keepdims=True)
            own = Predictions(tuple(map(str, range(30))), labels, probs)
            expected = [value for name, value in scores(own).items() if name not in ("ece", "auroc")]
            np.testing.assert_allclose(_scores_of_sums(_row_sums(own).sum(axis=0)), expected, rtol=1e-9)

    def test_a_class_nobody_says(self):
        own = predicting([0, 0, 0], [0, 0, 0])
        expected = [value for name, value in scores(own).items() if name not in ("ece", "auroc")]
        np.testing.assert_allclose(_scores_of_sums(_row_sums(own).sum(axis=0)), expected)


class TestAuroc:
    @pytest.mark.parametrize("k", [2, 3])
    def test_scikit_learn_has_the_same(self, k):
        random = np.random.default_rng(k)
        probs = random.dirichlet(np.ones(k), size=60).round(1) + 1e-3  # ties
        own = Predictions(tuple(map(str, range(60))), np.arange(60) % k, probs / probs.sum(axis=1, keepdims=True))
        given = own.probs[:, 1] if k == 2 else own.probs
        expected = roc_auc_score(own.labels, given, multi_class="ovr")
        assert scores(own)["auroc"] == pytest.approx(expected)

    def test_influence_is_that_of_leaving_a_row_out(self):
        random = np.random.default_rng(0)
        own = Predictions(tuple(map(str, range(200))), np.arange(200) % 2, random.dirichlet(np.ones(2), size=200))
        area, influence = _auroc(own)
        without = np.array([_auroc(own.take(np.delete(np.arange(200), i)))[0] for i in range(200)])
        assert influence.mean() == pytest.approx(0, abs=1e-12)
        # The jackknife's values are those of a sum to first order, 1 / N
        np.testing.assert_allclose(influence, 199 * (area - without), atol=0.02)

    def test_one_class_has_none(self):
        assert "auroc" not in scores(predicting([0, 1, 0], [0, 0, 0]))


class TestParts:
    def test_classes_and_subgroups_by_hand(self):
        # Class 0: rows 0-3, class 1: rows 4-5; weak is wrong on 0 and 4
        labels = [0, 0, 0, 0, 1, 1]
        models = {
            "weak": predicting([1, 0, 0, 0, 0, 1], labels),
            "soft_ce": predicting([0, 0, 0, 0, 0, 1], labels),
            "ceiling": predicting([0, 0, 0, 0, 1, 1], labels),
        }
        dialects = {f"r{i}": "青" if i in (0, 4) else "b" for i in range(6)}
        own = evaluate_run({0: models, 1: models}, subgroups=dialects, class_names=["safe", "危険"])
        recalls = {name: own["by_class"][name]["scores"]["weak"]["value"] for name in ("safe", "危険")}
        assert recalls == {"safe": 0.75, "危険": 0.5} and own["by_class"]["safe"]["rows"] == 4
        assert (
            own["confusion"]["weak"] == confusion_matrix(labels, models["weak"].predicted).tolist() == [[3, 1], [1, 1]]
        )
        assert own["by_subgroup"]["青"]["rows"] == 2 and list(own["by_subgroup"]) == ["b", "青"]
        assert own["by_subgroup"]["青"]["scores"]["soft_ce"]["value"] == 0.5
        # 青: weak 0 of 2, soft_ce 1, ceiling 2; both rows have a gap of 1
        assert own["by_subgroup"]["青"]["pgr"]["soft_ce"]["value"] == 0.5
        assert own["worst"]["soft_ce"]["subgroup"] == "青" and own["worst"]["soft_ce"]["value"] == 0.5

    def test_the_worst_of_two_is_taken_at_half_the_error(self):
        run = random_run(FOUR, n=400, seeds=2)
        ids = run[0]["weak"].ids
        own = evaluate_run(run, subgroups={row_id: str(i % 2) for i, row_id in enumerate(ids)})
        for name, worst in own["worst"].items():
            plain = own["by_subgroup"][worst["subgroup"]]["scores"][name]
            assert worst["value"] == plain["value"] and worst["low"] < plain["low"]

    def test_too_many_subgroups(self):
        run = random_run(FOUR)
        with pytest.raises(ValueError, match="60 subgroups: name a column of at most 30 different values"):
            evaluate_run(run, subgroups={row_id: row_id for row_id in run[0]["weak"].ids})


class TestAgreement:
    def test_by_hand(self):
        labels = np.array([0, 0, 1, 1, 1])
        weak = [np.array([0, 1, 1, 1, 0])]  # right on rows 0, 2, 3
        strong = [np.array([0, 1, 1, 0, 1])]  # follows on 0, 1, 2
        own = agreement_with_weak(labels, weak, strong)
        assert (own["right"]["n"], own["right"]["value"]) == (3, pytest.approx(2 / 3))
        assert (own["wrong"]["n"], own["wrong"]["value"], own["wrong"]["corrected"]["value"]) == (2, 0.5, 0.5)
        # Wilson for 1 of 2: (p - 1/2)^2 = z^2 p (1 - p) / 2, so p = 1/2 +- sqrt(z^2 / (4 (2 + z^2)))
        half = math.sqrt(3.841459 / (4 * 5.841459))
        assert (own["wrong"]["low"], own["wrong"]["high"]) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-6)

    def test_another_error_is_neither_agreement_nor_correction(self):
        own = agreement_with_weak(np.array([0, 0]), [np.array([1, 1])], [np.array([2, 0])])
        assert own["wrong"]["value"] == 0.0 and own["wrong"]["corrected"]["value"] == 0.5
        assert own["right"] == {"n": 0, "value": None, "low": None, "high": None, "per_seed": [None]}

    def test_seeds_and_groups_do_not_count_as_rows(self):
        labels, weak, strong = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
        once, thrice = (
            agreement_with_weak(labels, [weak], [strong]),
            agreement_with_weak(labels, [weak] * 3, [strong] * 3),
        )
        assert thrice["right"]["n"] == 12 and thrice["right"]["per_seed"] == [0.5] * 3
        assert (thrice["right"]["low"], thrice["right"]["high"]) == (once["right"]["low"], once["right"]["high"])
        twice = [np.repeat(own, 2) for own in (labels, weak, strong)]
        doubled = agreement_with_weak(twice[0], twice[1:2], twice[2:], [i // 2 for i in range(8)])
        assert (doubled["right"]["low"], doubled["right"]["high"]) == (once["right"]["low"], once["right"]["high"])


class TestRun:
    def test_order_and_shape_of_the_result(self):
        result = evaluate_run(random_run(FOUR), costs={"soft_ce": {"seconds": [1.0, 2.0]}})
        assert result["models"] == ["weak", "weak:nb", "soft_ce", "ceiling"]
        assert result["strong"] == ["soft_ce"] and result["rows"] == [60, 60] and result["classes"] == 2
        assert set(result["pgr"]["accuracy"]) == {"soft_ce"} and set(result["agreement"]) == {"soft_ce", "ceiling"}
        assert json.loads(json.dumps(result, allow_nan=False)) == result

    def test_values_are_means_over_seeds(self):
        run = random_run(FOUR, seeds=3)
        result = evaluate_run(run)
        per_seed = {name: [scores(run[seed][name]) for seed in run] for name in FOUR}
        for name in FOUR:
            for score, own in result["scores"][name].items():
                assert own["per_seed"] == [values[score] for values in per_seed[name]]
                assert own["value"] == pytest.approx(sum(own["per_seed"]) / 3)
        for score in ("accuracy", "balanced_accuracy"):
            weak, strong, ceiling = (result["scores"][name][score]["value"] for name in ("weak", "soft_ce", "ceiling"))
            assert result["pgr"][score]["soft_ce"]["value"] == pytest.approx((strong - weak) / (ceiling - weak))
            assert result["differences"][score]["soft_ce"]["value"] == pytest.approx(strong - weak)
            assert result["gap"][score]["value"] == pytest.approx(ceiling - weak)

    def test_intervals_enclose_their_value_except_that_of_ece(self):
        for own in evaluate_run(random_run(FOUR, n=200))["scores"].values():
            for score, estimate in own.items():
                if score == "ece":
                    assert estimate["low"] is estimate["high"] is None
                else:
                    assert estimate["low"] < estimate["value"] < estimate["high"]

    def test_the_gap_is_a_ratio_of_means_not_a_mean_of_ratios(self):
        # Seed A: .2, .4, 1.0 (ratio 1/4); seed B: .3, .8, .8 (ratio 1); differences .2 + .5 over .8 + .5 = 7 / 13
        run = {}
        for seed, shares in enumerate(((0.2, 0.4, 1.0), (0.3, 0.8, 0.8)) * 4):
            guesses = [(np.arange(100) >= 100 * share).astype(int) for share in shares]
            run[seed] = dict(
                zip(("weak", "soft_ce", "ceiling"), (predicting(g, [0] * 100) for g in guesses), strict=True)
            )
        gap = evaluate_run(run)["pgr"]["accuracy"]["soft_ce"]
        assert gap["value"] == pytest.approx(7 / 13) and gap["per_seed"] == pytest.approx([0.25, 1.0] * 4)

    def test_agrees_with_the_interval_of_the_rows_right_or_wrong(self):
        from trl_extensions.weak_to_strong.evaluation import pgr_interval

        # A seed repeated says that seeds do not matter, which leaves the rows
        run = random_run(FOUR, n=100, seeds=1)
        right = {name: (run[0][name].predicted == run[0][name].labels).astype(float) for name in FOUR}
        alone = pgr_interval(right["weak"], right["soft_ce"], right["ceiling"])
        own = evaluate_run({0: run[0], 1: run[0]})["pgr"]["accuracy"]["soft_ce"]
        for name in ("value", "low", "high"):
            assert own[name] == pytest.approx(alone[name], abs=1e-9)

    def test_groups_by_id(self):
        labels = np.arange(40) % 2
        guesses = {"weak": 12, "soft_ce": 7, "ceiling": 3}

        def of(times):
            own = {
                name: predicting(
                    np.where(np.arange(40) < wrong, 1 - labels, labels).repeat(times), labels.repeat(times)
                )
                for name, wrong in guesses.items()
            }
            return {0: own, 1: own}

        plain = evaluate_run(of(1))
        grouped = evaluate_run(of(2), groups={f"r{i}": f"q{i // 2}" for i in range(80)})
        assert grouped["groups"] == [40, 40]
        for part in ("pgr", "differences", "gap"):
            for score in ("accuracy", "balanced_accuracy", "auroc"):
                assert flat(grouped[part][score]) == pytest.approx(flat(plain[part][score]), abs=1e-9)
        partly = evaluate_run(of(2), groups={"r0": "q", "r1": "q"})
        assert partly["groups"] == [79, 79]

    def test_the_order_of_rows_does_not_matter(self):
        run = random_run(FOUR)
        ids = run[0]["weak"].ids[::-1]
        turned = {0: run[0], 1: {name: own.in_order(ids) for name, own in run[1].items()}}
        turned[0] = run[0] | {"soft_ce": run[0]["soft_ce"].in_order(ids)}
        assert turned[0]["soft_ce"].labels.tolist() == run[0]["soft_ce"].labels.tolist()[::-1]
        assert evaluate_run(turned) == evaluate_run(run)

    def test_no_gap_is_said(self):
        labels = np.arange(20) % 2
        models = {"weak": 4, "product": 2, "ceiling": 5}
        own = {name: predicting(np.where(np.arange(20) < n, 1 - labels, labels), labels) for name, n in models.items()}
        gap = evaluate_run({0: own})["pgr"]["accuracy"]["product"]
        assert gap["value"] is gap["low"] is None and gap["per_seed"] == [None]
        assert gap["reason"] == "the ceiling (0.750) is not above the weak model (0.800)"

    def test_without_a_ceiling(self):
        result = evaluate_run(random_run({"weak": 0.6, "soft_ce": 0.8}))
        assert result["pgr"]["accuracy"]["soft_ce"]["reason"] == "there is no ceiling model"
        assert result["gap"] == dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"))
        assert result["differences"]["accuracy"]["soft_ce"]["value"] > 0

    def test_what_cannot_be_compared(self):
        labels = [0, 1, 1]
        good = {"weak": predicting([0, 1, 0], labels), "soft_ce": predicting([0, 1, 1], labels)}
        cases = {
            "no predictions": {},
            "seed 0: no model 'weak' among .'soft_ce'.": {0: {"soft_ce": good["soft_ce"]}},
            r"seeds 0 and 1: only one of them has \['soft_ce'\]": {0: good, 1: {"weak": good["weak"]}},
            r"seed 0: 'soft_ce' and 'weak' have other test rows \(2 and 3; only one of them has 'r2'\)": {
                0: good | {"soft_ce": predicting([0, 1], labels[:2])}
            },
            "seed 0: 'soft_ce' has 3 classes, 'weak' 2": {0: good | {"soft_ce": predicting([0, 1, 1], labels, k=3)}},
            "seed 0: 'soft_ce': row 'r1' has another label": {0: good | {"soft_ce": predicting([0, 1, 1], [0, 0, 1])}},
        }
        for message, run in cases.items():
            with pytest.raises(ValueError, match=message):
                evaluate_run(run)
