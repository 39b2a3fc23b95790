"""The objectives against numbers worked out by hand, and against the published rule written a second time."""

import math

import numpy as np
import pytest
import torch

from trl_extensions.weak_to_strong.loss import confidence_loss, product_loss, reverse_kl_loss, soft_cross_entropy


LN2, LN3 = math.log(2), math.log(3)
LOGITS = torch.tensor([[LN3, 0.0], [0.0, 0.0]], dtype=torch.float64)  # probabilities (3/4, 1/4) and (1/2, 1/2)
SOFT = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)


def losses(logits, soft):
    return {
        "soft_ce": soft_cross_entropy(logits, soft),
        "confidence": confidence_loss(logits, soft, 0.5),
        "product": product_loss(logits, soft),
        "reverse_kl": reverse_kl_loss(logits, soft),
    }


def published_targets(logits, soft, coef):
    """The published rule in numpy: class 0 from the linear quantile of its probability upwards."""
    first = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    strong = (first >= np.quantile(first, soft[:, 1].mean())).astype(float)
    return (1 - coef) * soft + coef * np.stack([strong, 1 - strong], axis=1)


class TestSoftCrossEntropy:
    def test_by_hand(self):
        # -(1/4) ln(3/4) - (3/4) ln(1/4) = ln 4 - (1/4) ln 3, and -ln(1/2)
        expected = torch.tensor([2 * LN2 - LN3 / 4, LN2], dtype=torch.float64)
        torch.testing.assert_close(soft_cross_entropy(LOGITS, SOFT), expected)

    @pytest.mark.parametrize("number", [2, 5])
    def test_one_hot_is_cross_entropy(self, number):
        logits, labels = torch.randn(7, number), torch.arange(7) % number
        ours = soft_cross_entropy(logits, torch.nn.functional.one_hot(labels, number))
        torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


class TestConfidence:
    def test_by_hand(self):
        # Mean soft label of class 1: 3/8; the quantile of {1/2, 3/4} there is 1/2 + 3/32: only row 0 is class 0
        first = -0.625 * math.log(0.75) - 0.375 * math.log(0.25)  # target (1/8 + 1/2, 3/8)
        expected = torch.tensor([first, LN2], dtype=torch.float64)
        torch.testing.assert_close(confidence_loss(LOGITS, SOFT, 0.5), expected)

    @pytest.mark.parametrize("rows", [1, 2, 9, 64])
    def test_is_the_published_rule(self, rows):
        torch.manual_seed(rows)
        logits = torch.randn(rows, 2, dtype=torch.float64)
        soft = torch.softmax(3 * torch.randn(rows, 2, dtype=torch.float64) + torch.tensor([1.0, 0.0]), dim=1)
        target = torch.from_numpy(published_targets(logits.numpy(), soft.numpy(), 0.7))
        expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(confidence_loss(logits, soft, 0.7), expected)

    def test_gradient_does_not_flow_through_the_target(self):
        logits = LOGITS.clone().requires_grad_(True)
        confidence_loss(logits, SOFT, 0.5).sum().backward()
        target = torch.tensor([[0.625, 0.375], [0.5, 0.5]], dtype=torch.float64)  # as in `test_by_hand`
        torch.testing.assert_close(logits.grad, torch.softmax(LOGITS, dim=1) - target)

    def test_a_threshold_replaces_the_batch(self):
        # class 0 iff p0 >= 3/4: exactly met by row 0
        loss = confidence_loss(LOGITS, SOFT, 1.0, threshold=0.75)
        torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), LN2], dtype=torch.float64))
        higher = confidence_loss(LOGITS, SOFT, 1.0, threshold=torch.tensor([0.76, 0.24]))
        assert higher[0].item() == pytest.approx(2 * LN2)

    def test_three_classes_by_hand(self):
        # p = (.5, .3, .2): in proportion to (.6, .2, .2) class 1 is highest, 1.5 to .83 and 1
        logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
        soft = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
        loss = confidence_loss(logits, soft, 1.0, threshold=torch.tensor([0.6, 0.2, 0.2]))
        assert loss.item() == pytest.approx(-math.log(0.3))

    def test_a_class_of_prior_zero_is_never_predicted(self):
        for number in (2, 3):
            logits, soft = torch.randn(20, number), torch.full((20, number), 1 / number)
            prior = torch.tensor([0.0, *[1 / (number - 1)] * (number - 1)])
            loss = confidence_loss(logits, soft, 1.0, prior=prior, threshold=torch.full((number,), 1 / number))
            best = -torch.log_softmax(logits, dim=1)[:, 1:].amax(dim=1)  # of the classes that are left
            torch.testing.assert_close(loss, best)

    def test_coefficient_zero_is_imitation(self):
        torch.testing.assert_close(confidence_loss(LOGITS, SOFT, 0.0), soft_cross_entropy(LOGITS, SOFT))


class TestProduct:
    def test_by_hand(self):
        # (3/4 * 1/4, 1/4 * 3/4) is uniform; a zero in the soft label stays one
        expected = -(math.log(0.75) + math.log(0.25)) / 2
        torch.testing.assert_close(product_loss(LOGITS, SOFT), torch.tensor([expected, LN2], dtype=torch.float64))

    def test_weights_by_hand(self):
        # p^2 q^1 ~ (9 * 1, 1 * 3) -> (3/4, 1/4)
        loss = product_loss(LOGITS[:1], SOFT[:1], alpha=1.0, beta=2.0)
        assert loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))

    def test_beta_zero_is_imitation_and_alpha_zero_is_entropy(self):
        torch.testing.assert_close(product_loss(LOGITS, SOFT, beta=0.0), soft_cross_entropy(LOGITS, SOFT))
        entropy = torch.distributions.Categorical(logits=LOGITS).entropy()
        torch.testing.assert_close(product_loss(LOGITS, SOFT, alpha=0.0), entropy)

    def test_a_product_of_zero_everywhere_takes_the_soft_labels(self):
        logits, soft = torch.tensor([[-math.inf, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        assert product_loss(logits, soft).item() == math.inf  # what imitation costs there, not nan

    def test_far_apart_predictions(self):
        # log p = (0, -20000): the product belongs to class 1 all the same, for q gives class 0 nothing
        loss = product_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]]))
        assert loss.item() == pytest.approx(2e4)


class TestReverseKL:
    def test_by_hand(self):
        # 3/4 ln 3 + 1/4 ln(1/3)
        assert reverse_kl_loss(LOGITS, SOFT)[0].item() == pytest.approx(LN3 / 2)

    def test_zero_at_agreement_and_finite_at_zeros(self):
        assert reverse_kl_loss(SOFT[:1].log(), SOFT[:1]).item() == pytest.approx(0.0, abs=1e-12)
        # 1/2 ln(1/2) - 1/2 ln(1e-6) + 1/2 ln(1/2), to the millionth that renormalising moves
        assert reverse_kl_loss(LOGITS, SOFT)[1].item() == pytest.approx(-LN2 + 3 * math.log(10), abs=1e-5)


class TestAll:
    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("number", [2, 4])
    @pytest.mark.parametrize("size", [0.0, 1e4])
    def test_finite_with_gradients(self, rows, number, size):
        one = torch.linspace(-size, size, number)
        logits = one.repeat(rows, 1).requires_grad_(True)  # all rows identical
        soft = torch.nn.functional.one_hot(torch.zeros(rows, dtype=torch.long), number).float()
        for name, loss in losses(logits, soft).items():
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert loss.shape == (rows,) and loss.isfinite().all(), name
            assert gradient.isfinite().all(), name
            assert (loss >= 0).all(), name

    def test_types(self):
        for dtype, expected in (
            (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ):  # fmt: skip
            for loss in losses(LOGITS.to(dtype), SOFT).values():
                assert loss.dtype == expected

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: soft_cross_entropy(LOGITS, SOFT[:1]), "must both be"),
            (lambda: reverse_kl_loss(LOGITS[:, :1], SOFT[:, :1]), "K >= 2"),
            (lambda: confidence_loss(LOGITS, SOFT, 1.5), "coef must be"),
            (lambda: confidence_loss(LOGITS, SOFT, 0.5, prior=torch.ones(3)), "prior must have 2"),
            (lambda: confidence_loss(LOGITS, SOFT, 0.5, threshold=torch.ones(3)), "threshold must have 2"),
            (lambda: confidence_loss(LOGITS, SOFT, 0.5, threshold=-0.1), "simplex"),
            (lambda: product_loss(LOGITS, SOFT, alpha=-1.0), "at least 0"),
        ],
    )
    def test_misuse_is_one_line(self, call, message):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
