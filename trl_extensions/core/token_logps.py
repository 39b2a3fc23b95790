"""Log-probabilities of tokens from hidden states, a few rows of logits at a time."""

import torch

from .._compat import (
    ChunkedLogProbFunction,
    addmm_fp32,
    compute_dtype,
    maybe_gather_lm_head_ctx,
    use_triton,
)
from .head import OutputHead, project_logits


_VOCAB_CHUNK = 32768  # of TRL's kernel
_CHUNK_ELEMENTS = 2**24  # rows x vocabulary of one chunk of ours: 64 MB


def token_logps(states: torch.Tensor, head: OutputHead, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token given its state.

    Args:
        states: `(N, H)`.
        head: The model's output head.
        token_ids: `(N,)`.

    Returns:
        `(N,)` float32, nats. Memory is bounded by one chunk of logits; gradients flow to states and head.
    """
    device = head.weight.device
    states, token_ids = states.to(device), token_ids.to(device)
    if not use_triton(device):
        return _TokenLogps.apply(states, head.weight, head.bias, head, token_ids, torch.is_grad_enabled())
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # its forward, unlike its backward, does not gather
        return ChunkedLogProbFunction.apply(
            states, head.weight, head.bias, token_ids, 1.0, _VOCAB_CHUNK, head.softcap, head.scale, ("log_probs",)
        )[0]


class _TokenLogps(torch.autograd.Function):
    """TRL's kernel for devices without Triton, where a projection costs more than what is done with it.

    The gradient of a log-probability in its state does not depend on what is made of it later, so the forward leaves
    it behind, and a frozen head is projected through once. The gradient in the head's weight needs the probabilities
    again: those of the last chunk are still there, the others are projected a second time.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, head, token_ids, with_grad):
        needs = [with_grad and need for need in ctx.needs_input_grad[:3]]
        logps = torch.empty(len(states), dtype=torch.float32, device=states.device)
        of_states = torch.empty(states.shape, dtype=torch.float32, device=states.device) if needs[0] else None
        dtype, kept = compute_dtype(states), None
        with maybe_gather_lm_head_ctx(weight, bias), torch.autocast(states.device.type, enabled=False):
            cast, chunks = weight.to(dtype), _chunks(len(states), len(weight))
            buffer = _buffer(chunks, weight)
            for rows in chunks:
                logits = project_logits(buffer[: rows.stop - rows.start], states[rows], head, cast, bias, dtype)
                logps[rows], kept = _score(logits, token_ids[rows], head, any(needs))
                if of_states is not None:
                    torch.mm(kept, cast.float(), out=of_states[rows])
        needs_head = needs[1] or needs[2]
        ctx.save_for_backward(of_states, *((states, weight, bias, token_ids, kept) if needs_head else (None,) * 5))
        ctx.head, ctx.dtype, ctx.dtypes = head, dtype, (states.dtype, weight.dtype)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        of_states, *saved = ctx.saved_tensors
        grad_states = grad_weight = grad_bias = None
        if of_states is not None:
            grad_states = of_states.mul(grad_logps[:, None]).to(ctx.dtypes[0])
        if saved[1] is not None:
            grad_weight, grad_bias = _head_gradients(ctx, grad_logps, *saved)
        return grad_states, grad_weight, grad_bias, None, None, None


def _head_gradients(ctx, grad_logps, states, weight, bias, token_ids, kept):
    with maybe_gather_lm_head_ctx(weight, bias), torch.autocast(states.device.type, enabled=False):
        of_weight, of_bias = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if need else None
            for tensor, need in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        cast, chunks = weight.to(ctx.dtype), _chunks(len(states), len(weight))
        buffer = _buffer(chunks[:-1], weight)
        for rows in reversed(chunks):
            if kept is None:
                logits = buffer[: rows.stop - rows.start]
                project_logits(logits, states[rows], ctx.head, cast, bias, ctx.dtype)
                kept = _score(logits, token_ids[rows], ctx.head, True)[1]
            weighted = states[rows].to(ctx.dtype).float() * grad_logps[rows, None]
            if of_weight is not None:
                addmm_fp32(of_weight, kept.t(), weighted)
            if of_bias is not None:
                of_bias += grad_logps[rows] @ kept
            kept = None
    return (tensor if tensor is None else tensor.to(ctx.dtypes[1]) for tensor in (of_weight, of_bias))


def _chunks(number: int, vocabulary: int) -> list[slice]:
    """Slices of rows, as few as fit, all of nearly one size."""
    parts = -(-number // max(1, _CHUNK_ELEMENTS // max(1, vocabulary)))
    return [slice(number * part // parts, number * (part + 1) // parts) for part in range(parts)]


def _buffer(chunks: list[slice], weight: torch.Tensor) -> torch.Tensor:
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty((rows, len(weight)), dtype=torch.float32, device=weight.device)


def _score(logits: torch.Tensor, token_ids: torch.Tensor, head: OutputHead, with_grad: bool):
    """Log-probabilities `(n,)`, and their gradient in what the head projected, `(n, V)`, in the place of `logits`."""
    index = token_ids[:, None]
    slope = None  # of scale and soft-capping
    if with_grad and head.softcap is not None:
        slope = (logits / head.softcap).square_().neg_().add_(1.0)
    top, own = logits.amax(-1, keepdim=True), logits.gather(-1, index)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    logps = (own - top - total.log())[:, 0]
    if not with_grad:
        return logps, None
    grad = logits.mul_(-1.0 / total).scatter_add_(-1, index, torch.ones_like(own))
    if slope is not None:
        grad.mul_(slope)
    return logps, grad if head.scale == 1.0 else grad.mul_(head.scale)
