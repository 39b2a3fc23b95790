"""Chunked log-probabilities against a full softmax, whatever the chunk; and what a frozen head does not cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trl_extensions.core.modeling import chunked as module
from trl_extensions.core.modeling.chunked import token_logps
from trl_extensions.core.modeling.head import OutputHead


ROWS, HIDDEN, VOCABULARY = 7, 5, 11


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_()
    # later weights of the tokens, zero and negative ones among them
    return states, weight, bias, torch.tensor([0, 3, 10, 3, 7, 1, 0]), torch.tensor([1.0, -2, 0, 0.5, 3, -1, 1])


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (2.0, 3.0)])
def test_values_and_gradients_equal_a_full_softmax(monkeypatch, rows, scale, softcap):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", rows * VOCABULARY)
    states, weight, bias, token_ids, later = problem()
    logps = token_logps(states, OutputHead(weight, bias, scale, softcap), token_ids)
    ours = torch.autograd.grad((logps * later).sum(), (states, weight, bias))

    logits = scale * (states @ weight.T + bias)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    expected = logits.log_softmax(-1)[range(ROWS), token_ids]
    torch.testing.assert_close(logps, expected)
    plain = torch.autograd.grad((expected * later).sum(), (states, weight, bias))
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_extreme_logits_stay_finite():
    states = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    logps = token_logps(states, OutputHead(torch.tensor([[1.0], [-1.0]]), None, 1.0, None), torch.tensor([0, 0]))
    assert logps.tolist() == [0.0, -600.0]
    logps.sum().backward()
    # d log p_0 / dx = (1 - p_0) - (-1) p_1 = 2 p_1: none where the token is certain, 2 where the other one is
    assert states.grad.flatten().tolist() == [0.0, 2.0]


def test_half_precision_is_scored_in_float32():
    states, weight, bias, token_ids, _ = problem(torch.bfloat16)
    logps = token_logps(states, OutputHead(weight, bias, 1.0, None), token_ids)
    exact = (states.float() @ weight.float().T + bias.float()).log_softmax(-1)[range(ROWS), token_ids]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, exact)
    logps.sum().backward()
    assert states.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.bfloat16


def test_no_rows_and_no_gradient():
    states, weight, bias, token_ids, _ = problem()
    head = OutputHead(weight, bias, 1.0, None)
    empty = token_logps(states[:0], head, token_ids[:0])
    assert empty.shape == (0,)
    empty.sum().backward()
    assert not weight.grad.any()
    with torch.inference_mode():
        assert not token_logps(states, head, token_ids).requires_grad


@pytest.mark.parametrize(("trained", "products"), [(True, 4), (False, 2)])
def test_a_frozen_head_costs_two_products(monkeypatch, trained, products):
    """Logits and the gradient in the states; trained: the logits of all but the last chunk again, its own gradient."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", VOCABULARY)  # a row at a time
    states, weight, _, token_ids, _ = problem()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_product}) as counter:
        token_logps(states, OutputHead(weight.requires_grad_(trained), None, 1.0, None), token_ids).sum().backward()
    repeated = 2 * HIDDEN * VOCABULARY if trained else 0  # the chunk that is not projected again
    assert counter.get_total_flops() == products * 2 * ROWS * HIDDEN * VOCABULARY - repeated


def _of_product(_into, left, right, **_):
    return 2 * left[0] * left[1] * right[1]
