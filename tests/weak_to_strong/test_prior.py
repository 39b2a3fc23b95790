"""Thresholds that bring predictions to a prior."""

import itertools

import numpy as np
import pytest
import torch

from trl_extensions.weak_to_strong.loss import predicted_class, threshold_for


def counts(probs, prior):
    return torch.bincount(predicted_class(probs, threshold_for(probs, prior)), minlength=len(prior)).tolist()


def test_two_classes_are_the_linear_quantile():
    first = torch.tensor([0.1, 0.4, 0.6, 0.9])
    threshold = threshold_for(torch.stack([first, 1 - first], dim=1), torch.tensor([0.4, 0.6]))
    expected = np.quantile(first.numpy(), 0.6)  # 0.4 + 0.8 * 0.2
    assert threshold.tolist() == pytest.approx([expected, 1 - expected], abs=1e-6)


def test_a_threshold_met_exactly_is_the_first_class():
    torch.manual_seed(0)
    first = torch.rand(1000)
    probs = torch.stack([first, 1 - first], dim=1)
    for row in range(0, 1000, 50):
        threshold = torch.stack([first[row].double(), 1 - first[row].double()])
        assert torch.equal(predicted_class(probs, threshold) == 0, first >= first[row])


@pytest.mark.parametrize(("rows", "number"), [(12, 3), (60, 3), (500, 10), (300, 40)])
def test_counts_follow_the_prior(rows, number):
    torch.manual_seed(rows)
    probs = torch.softmax(2 * torch.randn(rows, number) + torch.randn(number), dim=1)
    due = torch.multinomial(torch.rand(number) + 0.1, rows, replacement=True).bincount(minlength=number)
    found = torch.tensor(counts(probs, due / rows))
    # The rows could be dealt out exactly; sweeps over many classes may leave one in a hundred at a neighbour
    assert (found - due).abs().sum() // 2 <= (0 if number <= 10 else rows // 100)


def test_the_most_likely_assignment_with_these_counts():
    # Thresholds are the dual of it: of all ways to deal 6 rows out as 2, 2, 2 theirs has the highest likelihood
    torch.manual_seed(3)
    probs = torch.softmax(3 * torch.randn(6, 3) + torch.tensor([2.0, 0.0, 0.0]), dim=1)
    ways = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    best = max(ways, key=lambda way: sum(probs[row, k].log().item() for row, k in enumerate(way)))
    assert predicted_class(probs, threshold_for(probs, torch.full((3,), 1 / 3))).tolist() == list(best)


def test_a_balanced_model_is_left_alone():
    # A margin of 8/9 on either side of every decision: the thresholds stay equal by symmetry
    probs = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3)
    threshold = threshold_for(probs, torch.full((3,), 1 / 3))
    assert predicted_class(probs, threshold).tolist() == [0, 1, 2]


@pytest.mark.parametrize("number", [2, 3, 7])
def test_odd_inputs_are_survived(number):
    certain = torch.eye(number)[torch.arange(20) % number]  # zeros whose logarithms would be infinite
    same = torch.full((20, number), 1 / number)
    prior = torch.softmax(torch.arange(number).float(), dim=0)
    for probs in (certain, same, certain[:1], same[:1]):
        threshold = threshold_for(probs, prior)
        assert threshold.isfinite().all() and threshold.sum().item() == pytest.approx(1)
        assert torch.equal(threshold, threshold_for(probs, prior))
        assert predicted_class(probs, threshold).shape == (len(probs),)


def test_classes_that_are_not_due_get_no_rows():
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(50, 3), dim=1)
    assert counts(probs, torch.tensor([0.5, 0.0, 0.5])) == [25, 0, 25]
    uniform = torch.full((3,), 1 / 3)
    assert 1 not in predicted_class(probs, uniform, prior=torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("number", [2, 3])
def test_ties_go_to_the_lower_class(number):
    assert predicted_class(torch.full((1, number), 1 / number)).item() == 0


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"probs must be \(N, K\)"):
        threshold_for(torch.rand(4, 3), torch.rand(2))
    with pytest.raises(ValueError, match=r"probs must be \(N, K\)"):
        threshold_for(torch.rand(0, 3), torch.rand(3))
