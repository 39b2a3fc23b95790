"""Votes, disagreement and confidence by hand."""

import math

import numpy as np
import pytest

from trl_extensions.weak_to_strong.labels.calibrate import combine, confidence, disagreement, vote_weights


# Two rows, three models, three classes
PROBS = np.array(
    [
        [[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]],
        [[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]],
        [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]],
    ]
)


def test_votes_by_hand():
    assert combine(PROBS, "soft") == pytest.approx(np.array([[1.4, 1.3, 0.3], [0.8, 1.1, 1.1]]) / 3)
    # Row 2: the first model is undecided between 0 and 1 and splits its vote
    assert combine(PROBS, "hard") == pytest.approx(np.array([[2, 1, 0], [0.5, 1.5, 1]]) / 3)


def test_a_tie_between_models_stays_a_tie():
    assert combine(PROBS[:2, :1], "hard").tolist() == [[0.5, 0.5, 0.0]]


def test_weights_by_hand():
    # Log-odds of 3/4 and 9/10 in two classes: log 3 and log 9 = 2 log 3; one at chance has none
    assert vote_weights([0.75, 0.9, 0.5, 0.2, 0.0], 2) == pytest.approx([1 / 3, 2 / 3, 0, 0, 0])
    # Three classes: 1/3 is chance; 1/2 has odds 2 * 1
    assert vote_weights([1 / 3, 0.5, 2 / 3], 3) == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-12)
    # Perfect counts as 0.999
    assert vote_weights([1.0, 0.75], 2) == pytest.approx(np.array([math.log(999), math.log(3)]) / math.log(2997))


def test_accuracy_weighted_vote_by_hand():
    expected = PROBS[0] / 3 + 2 * PROBS[1] / 3
    odds3, odds9 = 0.6, 9 / 11  # K = 3: 2 a / (1 - a) is 3 and 9
    assert combine(PROBS, "accuracy", [odds3, odds9, 0.1]) == pytest.approx(expected)


def test_nobody_better_than_chance(caplog):
    assert combine(PROBS, "accuracy", [0.1, 0.2, 0.3]) == pytest.approx(combine(PROBS, "soft"))
    assert "no weak model is better than chance" in caplog.text


@pytest.mark.parametrize("method", ["soft", "accuracy"])
def test_one_model_is_itself(method):
    assert combine(PROBS[:1], method, [0.8]) == pytest.approx(PROBS[0])
    assert disagreement(PROBS[:1]).tolist() == [0, 0]


@pytest.mark.parametrize("method", ["soft", "hard", "accuracy"])
def test_soft_labels_sum_to_one(method):
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=(5, 50))
    assert combine(probs, method, [0.5, 0.6, 0.7, 0.8, 0.9]).sum(axis=1) == pytest.approx(1)


def test_disagreement_by_hand():
    # Two models, each 0.3 from the mean (0.6, 0.4) ... (0.9, 0.1) and (0.3, 0.7)
    assert disagreement(np.array([[[0.9, 0.1]], [[0.3, 0.7]]])) == pytest.approx([0.3])
    # M models certain of different classes: 1 - 1/M, the most there is
    assert disagreement(np.eye(3)[:, None, :]) == pytest.approx([2 / 3])


def test_disagreement_is_zero_only_for_equal_models():
    one = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    assert (disagreement(np.stack([one] * 7)) == 0).all()
    other = one.copy()
    other[4] = other[4, ::-1]
    assert np.flatnonzero(disagreement(np.stack([one] * 6 + [other]))).tolist() == [4]


def test_disagreement_against_the_definition():
    probs = np.random.default_rng(1).dirichlet(np.ones(4), size=(5, 30))
    mean = probs.mean(axis=0)
    # Total variation the other way round: the largest difference over all events
    events = [[bool(bits >> k & 1) for k in range(4)] for bits in range(16)]
    by_event = np.max([np.abs((probs - mean)[:, :, event].sum(axis=2)) for event in events], axis=0)
    assert disagreement(probs) == pytest.approx(by_event.mean(axis=0))


def test_confidence_by_hand():
    soft = np.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.1, 0.7, 0.1, 0.1]])
    assert confidence(soft) == pytest.approx([0, 1, 0.6])
    assert confidence(np.array([[0.5, 0.5], [0.2, 0.8]])) == pytest.approx([0, 0.6])


def test_bad_input():
    for call, message in (
        (lambda: combine(PROBS, "mean"), "`ensemble` is 'mean'; give one of soft, hard, accuracy"),
        (lambda: combine(PROBS, "accuracy"), "needs as many accuracies"),
        (lambda: combine(PROBS, "accuracy", [0.5]), "needs as many accuracies"),
        (lambda: combine(PROBS, "accuracy", [0.5, 1.2, 0.5]), "between 0 and 1"),
        (lambda: combine(PROBS[0]), "must have the shape"),
        (lambda: disagreement(PROBS[:, :, :1]), "must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
