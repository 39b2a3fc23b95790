"""Every expected number here is worked out from the definition of softmax, by hand or with logarithms of fractions."""

import math

import pytest
import torch

from trl_extensions.sami.loss import mutual_information_bound, sami_loss


def log(matrix):
    return torch.tensor(matrix, dtype=torch.float64).log()


class TestSamiLoss:
    @pytest.mark.parametrize("c", [2, 3, 5])
    def test_indifference_costs_log_c(self, c):
        assert sami_loss(torch.full((c, c), -7.0)).item() == pytest.approx(math.log(c), abs=1e-6)
        assert mutual_information_bound(torch.full((c, c), -7.0)).item() == pytest.approx(0.0, abs=1e-6)

    def test_two_constitutions_by_hand(self):
        # rows: 3/4 and 4/5 on the diagonal; columns: 3/(3+1) and 4/(1+4)
        logps = log([[3.0, 1.0], [1.0, 4.0]])
        expected = -(math.log(3 / 4) + math.log(4 / 5)) / 2  # rows and columns agree: the matrix is symmetric
        assert sami_loss(logps).item() == pytest.approx(expected, abs=1e-12)
        assert mutual_information_bound(logps).item() == pytest.approx(math.log(2) - expected, abs=1e-12)

    def test_rows_and_columns_differ(self):
        # rows: 1/(1+3) and 2/(6+2) -> both 1/4; columns: 1/(1+6) = 1/7 and 2/(3+2) = 2/5
        logps = log([[1.0, 3.0], [6.0, 2.0]])
        rows = math.log(4)
        columns = (math.log(7) + math.log(5 / 2)) / 2
        assert sami_loss(logps).item() == pytest.approx((rows + columns) / 2, abs=1e-12)
        assert mutual_information_bound(logps).item() == pytest.approx(math.log(2) - columns, abs=1e-12)
        # the bound contrasts constitutions, so it changes when rows and columns trade places
        assert mutual_information_bound(logps.T).item() == pytest.approx(math.log(2) - rows, abs=1e-12)

    def test_three_constitutions_by_hand(self):
        # rows: 2/4, 5/8, 1/2; columns: 2/4, 5/7, 1/3
        logps = log([[2.0, 1.0, 1.0], [2.0, 5.0, 1.0], [0.0 + 1e-300, 1.0, 1.0]])
        rows = -(math.log(2 / 4) + math.log(5 / 8) + math.log(1 / 2)) / 3
        columns = -(math.log(2 / 4) + math.log(5 / 7) + math.log(1 / 3)) / 3
        assert sami_loss(logps).item() == pytest.approx((rows + columns) / 2, abs=1e-9)

    def test_five_constitutions_diagonal_nine_others_one(self):
        logps = torch.ones(5, 5, dtype=torch.float64) + 8 * torch.eye(5, dtype=torch.float64)
        assert sami_loss(logps.log()).item() == pytest.approx(math.log(13 / 9), abs=1e-12)
        assert mutual_information_bound(logps.log()).item() == pytest.approx(math.log(45 / 13), abs=1e-12)

    @pytest.mark.parametrize("offset", [1e3, -1e3])
    def test_adding_a_constant_changes_nothing(self, offset):
        logps = log([[3.0, 1.0], [1.0, 4.0]])
        assert sami_loss(logps + offset).item() == pytest.approx(sami_loss(logps).item(), abs=1e-9)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_large_contrast_stays_finite(self, sign):
        logps = sign * 1e3 * torch.eye(2)
        assert sami_loss(logps).item() == pytest.approx(0.0 if sign > 0 else 1e3, abs=1e-3)
        bound = mutual_information_bound(logps).item()
        assert bound == pytest.approx(math.log(2) if sign > 0 else math.log(2) - 1e3, abs=1e-3)

    def test_bound_never_exceeds_log_c(self):
        generator = torch.Generator().manual_seed(0)
        logps = 50 * torch.randn(200, 4, 4, generator=generator)
        assert (mutual_information_bound(logps) <= math.log(4) + 1e-6).all()

    def test_leading_dimensions_are_kept(self):
        generator = torch.Generator().manual_seed(0)
        logps = torch.randn(2, 3, 4, 4, generator=generator)
        assert sami_loss(logps).shape == (2, 3)
        assert sami_loss(logps)[1, 2].item() == pytest.approx(sami_loss(logps[1, 2]).item(), abs=1e-6)

    def test_gradient_by_hand(self):
        # d/dL of -log softmax is (softmax - identity); each of the C diagonal terms counts 1/C, each direction 1/2
        logps = log([[1.0, 3.0], [6.0, 2.0]]).requires_grad_()
        sami_loss(logps).backward()
        rows = torch.tensor([[1 / 4, 3 / 4], [6 / 8, 2 / 8]])
        columns = torch.tensor([[1 / 7, 3 / 5], [6 / 7, 2 / 5]])
        expected = (rows + columns - 2 * torch.eye(2)) / 4
        torch.testing.assert_close(logps.grad, expected.double())

    def test_length_term_by_hand(self):
        # Rows with weight 2 and lengths 1 and 3: the second column counts 3 ** 2 = 9 times as much,
        # 1/(1+27) and 18/(6+18) = 3/4; columns as they were, 1/7 and 2/5
        logps, lengths = log([[1.0, 3.0], [6.0, 2.0]]).requires_grad_(), torch.tensor([1, 3])
        loss = sami_loss(logps, lengths, 2.0)
        rows, columns = -(math.log(1 / 28) + math.log(3 / 4)) / 2, -(math.log(1 / 7) + math.log(2 / 5)) / 2
        assert loss.item() == pytest.approx((rows + columns) / 2, abs=1e-12)
        loss.backward()
        by_row = torch.tensor([[1 / 28, 27 / 28], [1 / 4, 3 / 4]], dtype=torch.float64)
        by_column = torch.tensor([[1 / 7, 3 / 5], [6 / 7, 2 / 5]], dtype=torch.float64)
        torch.testing.assert_close(logps.grad, (by_row + by_column - 2 * torch.eye(2)) / 4)
        # Under all constitutions alike, only rows push: (sum of the column - 1) / 4, up for the short response (a
        # negative gradient), down for the long one
        push = (by_row.sum(0) - 1) / 4
        torch.testing.assert_close(logps.grad.sum(0), push)
        assert push[0] < 0 < push[1]

    def test_length_term_of_equal_lengths_or_weight_0_is_none(self):
        logps = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(sami_loss(logps, torch.full((2, 3), 7), 1.5), sami_loss(logps))
        assert torch.equal(sami_loss(logps, torch.tensor([[1, 2, 3]] * 2), 0.0), sami_loss(logps))
        with pytest.raises(ValueError, match=r"`lengths` of the shape \(2, 3\)"):
            sami_loss(logps, None, 1.0)

    def test_half_precision_is_computed_in_float32(self):
        logps = torch.tensor([[-20.0, -20.125], [-20.125, -20.0]], dtype=torch.bfloat16)
        assert sami_loss(logps).item() == pytest.approx(math.log(1 + math.exp(-0.125)), abs=1e-6)

    @pytest.mark.parametrize("function", [sami_loss, mutual_information_bound])
    @pytest.mark.parametrize(
        ("shape", "message"), [((1, 1), "at least 2 constitutions"), ((2, 3), "square"), ((4,), "square")]
    )
    def test_wrong_shapes_are_refused(self, function, shape, message):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape))
