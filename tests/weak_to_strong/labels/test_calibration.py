"""Temperature scaling against hand-derived optima, a known temperature and a brute-force search."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from trl_extensions.weak_to_strong.labels.calibrate import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_temperature,
    expected_calibration_error,
    fit_temperature,
)


def test_optimum_by_hand_of_two_classes():
    # Always 90 % sure, right 3 times of 4: the optimum says 3/4, so log 9 / T = log 3 and T = 2
    probs, labels = np.tile([0.9, 0.1], (40, 1)), np.array([0, 0, 0, 1] * 10)
    temperature, note = fit_temperature(probs, labels)
    assert temperature == pytest.approx(2.0, rel=1e-9) and note == ""
    assert apply_temperature(probs, temperature)[0] == pytest.approx([0.75, 0.25])


def test_optimum_by_hand_of_three_classes_and_an_unsure_model():
    # p = (1/2, 1/4, 1/4): odds 2^(1/T) : 1 : 1; right 8 of 10 times, so 2^(1/T) = 8 and T = 1/3
    probs, labels = np.tile([0.5, 0.25, 0.25], (40, 1)), np.array([0] * 32 + [1] * 3 + [2] * 5)
    assert fit_temperature(probs, labels)[0] == pytest.approx(1 / 3, rel=1e-9)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.5])
def test_a_known_temperature_is_recovered(true):
    random = np.random.default_rng(0)
    honest = softmax(random.normal(size=(40_000, 4)) * 2, axis=1)
    labels = (honest.cumsum(axis=1) < random.random((len(honest), 1))).sum(axis=1)
    said = softmax(np.log(honest) * true, axis=1)
    temperature, _ = fit_temperature(said, labels)
    assert temperature == pytest.approx(true, rel=0.03)
    assert apply_temperature(said, temperature) == pytest.approx(honest, abs=0.02)


def test_no_other_temperature_is_better():
    random = np.random.default_rng(1)
    probs, labels = softmax(random.normal(size=(60, 3)) * 3, axis=1), random.integers(3, size=60)
    temperature, _ = fit_temperature(probs, labels)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 2000)
    best, *losses = [-np.log(apply_temperature(probs, t)[np.arange(60), labels]).mean() for t in (temperature, *grid)]
    assert best <= min(losses) + 1e-12
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=0.005)


def test_guard_rails_are_said():
    sure = np.tile([0.9, 0.1], (40, 1))
    for rows, labels, temperature, said in (
        (sure, np.zeros(40, int), MIN_TEMPERATURE, "cut at 0.1"),
        (sure, np.ones(40, int), MAX_TEMPERATURE, "no better than guessing"),
        (sure[:19], np.zeros(19, int), 1.0, "19 rows are too few"),
        (sure[:0], np.zeros(0, int), 1.0, "0 rows are too few"),
    ):
        fitted, note = fit_temperature(rows, labels)
        assert fitted == temperature and said in note


def test_probability_zero():
    # An absent class stays absent, rows of it count for nothing, and the others decide
    probs, labels = np.tile([0.9, 0.1, 0.0], (44, 1)), np.array([0, 0, 0, 1] * 10 + [2] * 4)
    temperature, note = fit_temperature(probs, labels)
    assert temperature == pytest.approx(2.0) and "4 rows with probability 0" in note
    applied = apply_temperature(probs, temperature)
    assert applied[0] == pytest.approx([0.75, 0.25, 0.0]) and applied[0, 2] == 0


def test_extreme_probabilities_do_not_overflow():
    probs = np.tile([1.0, 1e-300], (40, 1))
    temperature, _ = fit_temperature(probs, np.array([0, 1] * 20))
    assert temperature == MAX_TEMPERATURE
    applied = apply_temperature(probs, temperature)
    assert np.isfinite(applied).all() and applied.sum(axis=1) == pytest.approx(1)


def test_the_order_of_classes_survives():
    probs = softmax(np.random.default_rng(0).normal(size=(30, 5)), axis=1)
    for temperature in (0.2, 1.0, 7.0):
        assert (apply_temperature(probs, temperature).argsort(axis=1) == probs.argsort(axis=1)).all()
    assert apply_temperature(probs, 1.0) == pytest.approx(probs)


def test_calibration_error_by_hand():
    # Ten bins keep these apart: 0.9 sure and half right (4 rows, gap 0.4), 0.6 sure and right (1 row, gap 0.4)
    probs = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    assert expected_calibration_error(probs, np.array([0, 0, 1, 1, 1]), bins=10) == pytest.approx(0.4)
    # In one bin: accuracy 3/5, confidence 4.2/5
    assert expected_calibration_error(probs, np.array([0, 0, 1, 1, 1]), bins=1) == pytest.approx(0.24)
    assert expected_calibration_error(np.eye(2), np.array([0, 1])) == 0
    assert math.isnan(expected_calibration_error(np.empty((0, 2)), np.empty(0)))


def test_bad_input():
    for call, message in (
        (lambda: fit_temperature(np.ones((3, 2)), np.zeros(2, int)), "labels of shape"),
        (lambda: fit_temperature(np.ones(3), np.zeros(3, int)), "must have the shape"),
        (lambda: fit_temperature(np.full((3, 2), -1.0), np.zeros(3, int)), "not logarithms"),
        (lambda: apply_temperature(np.ones((1, 2)), 0.0), "above 0"),
        (lambda: apply_temperature(np.ones((1, 2)), math.nan), "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
