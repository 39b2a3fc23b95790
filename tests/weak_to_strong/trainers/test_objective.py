"""Coefficients that warm up, and losses chosen by name."""

import pytest
import torch

from trl_extensions.weak_to_strong.loss import (
    confidence_loss,
    predicted_class,
    product_loss,
    reverse_kl_loss,
    soft_cross_entropy,
)
from trl_extensions.weak_to_strong.trainers.configs import WeakToStrongConfig
from trl_extensions.weak_to_strong.trainers.objective import LOSSES, Objective, WeakSupervision


LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.2, 0.1, 0.0], [-2.0, 0.5, 0.7]])
SOFT = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])


def test_the_coefficient_rises_linearly():
    objective = Objective("confidence", confidence_coef=0.8, warmup_ratio=0.2)
    coefficients = [objective.coefficient(progress) for progress in (0.0, 0.05, 0.1, 0.2, 1.0)]
    assert coefficients == pytest.approx([0.0, 0.2, 0.4, 0.8, 0.8])
    assert Objective("confidence", confidence_coef=0.8, warmup_ratio=0.0).coefficient(0.0) == 0.8
    assert Objective("product", product_beta=2.0, warmup_ratio=1.0).coefficient(0.25) == 0.5
    assert Objective("soft_ce").coefficient(1.0) == Objective("reverse_kl").coefficient(1.0) == 0.0


def test_losses_by_name():
    def of(objective, progress):
        return WeakSupervision(objective, [0.3, 0.3, 0.4]).losses(LOGITS, SOFT, progress)

    torch.testing.assert_close(of(Objective("soft_ce"), 0.0), soft_cross_entropy(LOGITS, SOFT))
    torch.testing.assert_close(of(Objective("reverse_kl"), 0.0), reverse_kl_loss(LOGITS, SOFT))
    product = Objective("product", product_alpha=0.5, product_beta=2.0, warmup_ratio=0.5)
    torch.testing.assert_close(of(product, 0.25), product_loss(LOGITS, SOFT, 0.5, 1.0))
    for name in ("confidence", "product"):  # nothing of the model's own view yet
        torch.testing.assert_close(of(Objective(name), 0.0), soft_cross_entropy(LOGITS, SOFT))


def test_the_threshold_is_that_of_the_whole_step():
    supervision = WeakSupervision(Objective("confidence", confidence_coef=1.0, warmup_ratio=0.0), [0.2, 0.2, 0.6])
    argmax = supervision.losses(LOGITS, SOFT)
    torch.testing.assert_close(argmax, -torch.log_softmax(LOGITS, dim=1).amax(dim=1))
    torch.manual_seed(0)
    step = torch.cat([LOGITS, torch.randn(37, 3) + torch.tensor([1.5, 0.0, 0.0])])
    supervision.match_prior(step)
    moved = supervision.losses(LOGITS, SOFT)
    torch.testing.assert_close(moved, confidence_loss(LOGITS, SOFT, 1.0, threshold=supervision.threshold))
    assert not torch.allclose(moved, argmax)
    # A micro-batch does not matter for the threshold: rows one by one have the same losses
    torch.testing.assert_close(torch.cat([supervision.losses(LOGITS[[i]], SOFT[[i]]) for i in range(3)]), moved)
    shares = torch.bincount(predicted_class(step.softmax(dim=1), supervision.threshold), minlength=3) / 40
    assert shares.tolist() == pytest.approx([0.2, 0.2, 0.6])


def test_a_drift_of_all_predictions_changes_no_label():
    # With thresholds of earlier steps it would: what fell below them fed on itself until one class was left
    supervision = WeakSupervision(Objective("confidence", confidence_coef=1.0, warmup_ratio=0.0), [0.5, 0.5])
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    for drift in (0.0, 3.0, -5.0):
        drifted = logits + torch.tensor([drift, 0.0])
        supervision.match_prior(drifted)
        assert predicted_class(drifted.softmax(dim=1), supervision.threshold).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_are_valid_for_every_loss(name, tmp_path):
    config = WeakToStrongConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type=name)
    assert config.objective() == Objective(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "mse"}, "`loss_type` must be one of soft_ce, confidence"),
        ({"confidence_coef": 1.5}, "`confidence_coef` must be a number from 0 to 1"),
        ({"confidence_coef": "half"}, "`confidence_coef` must be"),
        ({"product_alpha": -1.0}, "`product_alpha` must be a number from 0"),
        ({"product_alpha": 0.0, "loss_type": "product"}, "`product_alpha` is 0"),
        ({"product_beta": float("nan")}, "`product_beta` must be"),
        ({"loss_warmup_ratio": 2}, "`loss_warmup_ratio` must be"),
        ({"weight_by_confidence": "yes"}, "`weight_by_confidence` must be"),
        ({"overlong_policy": "cut"}, "`overlong_policy` must be one of truncate"),
        ({"linear_probe": "no"}, "`linear_probe` must be"),
        ({"probe_batch_tokens": 0}, "`probe_batch_tokens` must be"),
        ({"num_labels": 1}, "`num_labels` must be"),
        ({"class_names": ["a"]}, "`class_names` must be"),
        ({"class_names": ["a", "a"]}, "list of at least 2 different texts"),
        ({"class_names": ["a", "b"], "num_labels": 3}, "`num_labels` is 3, `class_names` has 2"),
        ({"center_rewards_coefficient": 0.1}, "`center_rewards_coefficient` belongs to reward models"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        WeakToStrongConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert "\n" not in str(caught.value)
