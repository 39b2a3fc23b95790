"""The forecast without true labels: from errors that are independent by construction it finds what was gained."""

import numpy as np
import pytest

from trl_extensions.weak_to_strong.forecast import forecast


def classifiers(rates, n, seed=0, k=2):
    """Classes of models that are right at the given rates, independently of each other."""
    random = np.random.default_rng(seed)
    labels = random.choice(k, p=[0.7, 0.3] if k == 2 else None, size=n)
    shift = [random.integers(1, k, size=n) * (random.random(n) >= rate) for rate in rates]
    return [(labels + own) % k for own in shift]


def test_by_hand():
    # Of 4 rows: teacher 0 0 1 1, student 0 0 1 0, checker 0 0 0 1. Agreement beyond chance: teacher and checker agree
    # on 3 of 4, by chance (1/2)(3/4) + (1/2)(1/4) = 1/2: 1/4; student and checker on 2, by chance 9/16 + 1/16: -1/8.
    teacher, student, checker = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]]).repeat(100, axis=1)
    own = forecast([teacher], [student], {"annotator": [checker]})
    assert own["ratio"]["value"] == pytest.approx(-0.5) and own["disagreement"]["value"] == 0.25
    assert own["by_checker"]["annotator"]["value"] == pytest.approx(-0.5)
    assert own["ratio"]["low"] is None  # one seed
    assert own["gain"]["value"] is None and "another one" in own["gain"]["reason"]


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(("weak", "strong"), [(0.65, 0.8), (0.8, 0.7), (0.75, 0.75)])
def test_independent_errors_give_the_truth(weak, strong, k):
    said = classifiers([weak, strong, 0.7, 0.85], 40000, k=k)
    own = forecast([said[0]], [said[1]], {"名前": [said[2]], "b": [said[3]]})
    # Informedness of a model right at rate a, wrong alike: 2 a - 1, and (K a - 1) / (K - 1) for more classes
    informed = [(k * rate - 1) / (k - 1) for rate in (weak, strong)]
    assert own["ratio"]["value"] == pytest.approx(informed[1] / informed[0], abs=0.05)
    if k == 2:
        assert own["gain"]["value"] == pytest.approx(strong - weak, abs=0.015)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rates, rows, hits = [0.7, 0.8, 0.75, 0.7], 1500, []
    for trial in range(200):
        random = np.random.default_rng(trial)
        labels = random.integers(2, size=rows)
        # Of half the rows a model says the same in every seed
        same = [random.random(rows) >= rate for rate in rates]
        seeds = []
        for _ in range(3):
            anew = [random.random(rows) >= rate for rate in rates]
            wrong = [np.where(random.random(rows) < 0.5, *both) for both in zip(same, anew, strict=True)]
            seeds.append([labels ^ own for own in wrong])
        teacher, student, first, second = zip(*seeds, strict=True)
        own = forecast(teacher, student, {"a": first, "b": second})["gain"]
        if own["value"] is not None:  # three seeds may disagree by chance so far that nothing is said
            hits.append(own["low"] <= 0.1 <= own["high"])
    # 95 %, less four standard errors of 1.6
    assert len(hits) > 150 and np.mean(hits) > 0.89


def test_a_checker_that_knows_nothing_is_said():
    said = classifiers([0.7, 0.8, 0.5, 0.5], 500)
    own = forecast([said[0]], [said[1]], {"a": [said[2]], "b": [said[3]]})
    assert own["ratio"]["value"] is None and "by chance" in own["ratio"]["reason"]
    assert own["gain"]["value"] is None


def test_nobody_checks():
    said = classifiers([0.7, 0.8], 500)
    own = forecast([said[0]], [said[1]], {})
    assert own["ratio"]["value"] is own["gain"]["value"] is None and "check_models" in own["ratio"]["reason"]
    assert own["disagreement"]["value"] == np.mean(said[0] != said[1])


def test_groups_widen_what_they_repeat():
    runs = [classifiers([0.7, 0.8, 0.75, 0.7], 300, seed=s) for s in range(3)]
    twice = [[np.repeat(own, 2) for own in run] for run in runs]

    def of(runs, **options):
        checkers = {"a": [run[2] for run in runs], "b": [run[3] for run in runs]}
        return forecast([run[0] for run in runs], [run[1] for run in runs], checkers, **options)["gain"]

    plain, grouped = of(runs), of(twice, groups=[i // 2 for i in range(600)])
    for name in ("value", "low", "high"):
        assert grouped[name] == pytest.approx(plain[name])
