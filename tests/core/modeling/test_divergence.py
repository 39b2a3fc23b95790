"""Chunked divergences against full distributions, whatever the chunk; TRL's kernel as a second opinion."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trl_extensions._compat import ChunkedDivergenceFunction
from trl_extensions.core.modeling import chunked
from trl_extensions.core.modeling.chunked import chunked_kl, dense_kl
from trl_extensions.core.modeling.head import OutputHead


ROWS, HIDDEN, REF_HIDDEN, VOCABULARY = 7, 5, 3, 11
LATER = torch.tensor([1.0, -2, 0, 0.5, 3, -1, 1])  # what the rows are multiplied by, zero and negative ones among them


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    policy = [normal(ROWS, HIDDEN), normal(VOCABULARY, HIDDEN), normal(VOCABULARY)]
    reference = [normal(ROWS, REF_HIDDEN), normal(VOCABULARY, REF_HIDDEN), normal(VOCABULARY)]
    return [tensor.requires_grad_() for tensor in policy], reference


def logits_of(states, weight, bias, scale, softcap):
    logits = scale * (states.float() @ weight.float().T + bias.float())
    return softcap * (logits / softcap).tanh() if softcap else logits


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (2.0, 3.0)])
def test_values_and_gradients_equal_full_distributions(monkeypatch, rows, scale, softcap, reverse):
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", rows * VOCABULARY)
    policy, reference = problem()
    heads = OutputHead(*policy[1:], scale, softcap), OutputHead(*reference[1:], 0.5, 2.0)
    found = chunked_kl(policy[0], heads[0], reference[0], heads[1], reverse=reverse)
    ours = torch.autograd.grad((found * LATER).sum(), policy)

    logits, ref_logits = logits_of(*policy, scale, softcap), logits_of(*reference, 0.5, 2.0)
    expected = dense_kl(logits, ref_logits, reverse=reverse)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    plain = torch.autograd.grad((expected * LATER).sum(), policy)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_the_divergence_of_trl(reverse):
    policy, reference = problem()
    found = chunked_kl(
        policy[0], OutputHead(*policy[1:], 1.0, None), reference[0], OutputHead(*reference[1:], 1.0, None),
        reverse=reverse,
    )  # fmt: skip
    theirs = ChunkedDivergenceFunction.apply(*policy, *reference, float(reverse), 1.0, 1.0, None, 1.0, None)[0]
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision_is_compared_in_float32(reverse):
    policy, reference = problem(torch.bfloat16)
    heads = OutputHead(*policy[1:], 1.0, None), OutputHead(*reference[1:], 1.0, None)
    found = chunked_kl(policy[0], heads[0], reference[0], heads[1], reverse=reverse)
    expected = dense_kl(logits_of(*policy, 1.0, None), logits_of(*reference, 1.0, None), reverse=reverse)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert {tensor.grad.dtype for tensor in policy} == {torch.bfloat16}


@pytest.mark.parametrize("reverse", [False, True])
def test_equal_models_do_not_differ_and_extreme_logits_stay_finite(reverse):
    states = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    head = OutputHead(torch.tensor([[1.0], [-1.0]]), None, 1.0, None)
    assert chunked_kl(states, head, states.detach(), head, reverse=reverse).tolist() == [0.0, 0.0]
    found = chunked_kl(states, head, -states.detach(), head, reverse=reverse)
    assert found.tolist() == [600.0, 600.0]  # certain of one token, which the other gives e^-600
    found.sum().backward()
    assert states.grad.isfinite().all()


def test_no_rows_and_no_gradient():
    policy, reference = problem()
    heads = OutputHead(*policy[1:], 1.0, None), OutputHead(*reference[1:], 1.0, None)
    empty = chunked_kl(policy[0][:0], heads[0], reference[0][:0], heads[1], reverse=True)
    empty.sum().backward()
    assert empty.shape == (0,) and not policy[1].grad.any()
    with torch.inference_mode():
        assert not chunked_kl(policy[0], heads[0], reference[0], heads[1], reverse=True).requires_grad


@pytest.mark.parametrize("reverse", [False, True])
def test_equal_models_with_large_logits_stay_equal(reverse):
    """Logits of hundreds are rounded to 1e-5 and more; none of that may be taken for a divergence."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(50, 8, generator=generator), torch.randn(1000, 8, generator=generator)
    head = OutputHead(weight, torch.full((1000,), 300.0), 1.0, None)
    assert chunked_kl(states, head, states, head, reverse=reverse).abs().max() < 2e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_that_only_the_reference_has_are_left_out(reverse):
    policy, (states, weight, bias) = problem()
    head = OutputHead(*policy[1:], 1.0, None)
    wider = OutputHead(torch.cat([weight, weight[:2]]), torch.cat([bias, bias[:2]]), 1.0, None)
    found = chunked_kl(policy[0], head, states, wider, reverse=reverse)
    torch.testing.assert_close(
        found, chunked_kl(policy[0], head, states, OutputHead(weight, bias, 1.0, None), reverse=reverse)
    )


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_heads_are_gathered_once_a_pass(monkeypatch, rows):
    """However many chunks a process has: under ZeRO-3 gathering is something that all of them do together."""
    gathered = []

    @contextmanager
    def gather(weight, bias):
        gathered.append(weight)
        yield

    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", rows * VOCABULARY)
    monkeypatch.setattr(chunked, "maybe_gather_lm_head_ctx", gather)
    policy, reference = problem()
    heads = OutputHead(*policy[1:], 1.0, None), OutputHead(*reference[1:], 1.0, None)
    found = chunked_kl(policy[0], heads[0], reference[0], heads[1], reverse=True)
    assert [weight is policy[1] for weight in gathered] == [True, False]
    found.sum().backward()
    assert len(gathered) == 4


def test_a_frozen_head_costs_three_products(monkeypatch):
    """Logits of both models and the gradient in the states; TRL's kernel makes both logits twice."""
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", VOCABULARY)  # a row at a time
    states, weight = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN)
    head = OutputHead(weight, None, 1.0, None)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_product}) as counter:
        chunked_kl(states, head, torch.randn(ROWS, HIDDEN), head, reverse=False).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * ROWS * HIDDEN * VOCABULARY


def _of_product(_into, left, right, **_):
    return 2 * left[0] * left[1] * right[1]
