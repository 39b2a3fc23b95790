"""Functions of single rows of logits, with gradient, for devices where projecting costs more than what follows.

What a row gives does not depend on other rows, nor its gradient on what is made of it later. So the forward pass
leaves the gradient in the hidden states behind, and a frozen head is projected through once, where kernels that
recompute do it twice. The gradient in a trained head's weight needs the rows' gradients again: those of the last chunk
are still there, the others are computed anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..._compat import addmm_fp32, compute_dtype, maybe_gather_lm_head_ctx
from .head import OutputHead, project_logits


_CHUNK_ELEMENTS = 2**24  # rows x vocabulary of one chunk: 64 MB

Score: TypeAlias = Callable[[slice, torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]
"""From some rows' numbers, their logits `(n, V)`, float32, and spare room `(spare, n, V)` to values `(n,)` and, if the
flag is set, their gradient in the logits `(n, V)`, in the place of these."""


def per_row(
    states: torch.Tensor, head: OutputHead, score: Score, *, spare: int = 0, other: OutputHead | None = None
) -> torch.Tensor:
    """Values of rows of logits, a few rows at a time.

    Args:
        states: `(N, H)`, on the head's device.
        head: What they are projected with.
        score: What the values are. It is called anew in the backward pass and must give the same.
        spare: Tensors like the logits that it needs to work with.
        other: Another head that it reads; sharded (ZeRO-3), it is gathered once for all rows.

    Returns:
        `(N,)` float32. Memory is bounded by a chunk of logits and of each spare tensor, besides the states' gradient
        and, for a head in half precision, a float32 copy of it; gradients flow to states and head.
    """
    pass_ = _Pass(head, score, spare, other, compute_dtype(states))
    return _PerRow.apply(states, head.weight, head.bias, pass_, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Pass:
    """What the forward and the backward pass have in common; `dtype` is what meets the head."""

    head: OutputHead
    score: Score
    spare: int
    other: OutputHead | None
    dtype: torch.dtype

    @contextmanager
    def gathered(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
        other = nullcontext()
        if self.other is not None:
            other = maybe_gather_lm_head_ctx(self.other.weight, self.other.bias)
        with maybe_gather_lm_head_ctx(weight, bias), other, torch.autocast(weight.device.type, enabled=False):
            yield


def chunks_of(number: int, vocabulary: int) -> list[slice]:
    """Slices of rows, as few as fit into memory for one chunk, all of nearly one size."""
    parts = -(-number // max(1, _CHUNK_ELEMENTS // max(1, vocabulary)))
    return [slice(number * part // parts, number * (part + 1) // parts) for part in range(parts)]


def buffers_for(chunks: list[slice], weight: torch.Tensor, number: int) -> torch.Tensor:
    """Uninitialised logits of the longest chunk, to be used for all: fresh memory costs as much as a pass over it."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty((number, rows, len(weight)), dtype=torch.float32, device=weight.device)


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, own, with_grad):
        needs = [with_grad and need for need in ctx.needs_input_grad[:3]]
        values = torch.empty(len(states), dtype=torch.float32, device=states.device)
        of_states = torch.empty(states.shape, dtype=torch.float32, device=states.device) if needs[0] else None
        kept = None
        with own.gathered(weight, bias):
            cast, chunks = weight.to(own.dtype), chunks_of(len(states), len(weight))
            (buffer,), spare = (buffers_for(chunks, weight, number) for number in (1, own.spare))
            for rows in chunks:
                values[rows], kept = _score(own, buffer, spare, rows, states, cast, bias, any(needs))
                if of_states is not None:
                    torch.mm(kept, cast.float(), out=of_states[rows])
        needs_head = needs[1] or needs[2]
        ctx.save_for_backward(of_states, *((states, weight, bias, kept) if needs_head else (None,) * 4))
        ctx.dtypes = states.dtype, weight.dtype
        ctx.own = own if needs_head else None  # with what it holds
        return values

    @staticmethod
    def backward(ctx, grad_values):
        of_states, *saved = ctx.saved_tensors
        grad_states = grad_weight = grad_bias = None
        if of_states is not None:
            grad_states = of_states.mul(grad_values[:, None]).to(ctx.dtypes[0])
        if saved[1] is not None:
            grad_weight, grad_bias = _head_gradients(ctx, grad_values, *saved)
        return grad_states, grad_weight, grad_bias, None, None


def _head_gradients(ctx, grad_values, states, weight, bias, kept):
    own = ctx.own
    with own.gathered(weight, bias):
        of_weight, of_bias = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if need else None
            for tensor, need in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        cast, chunks = weight.to(own.dtype), chunks_of(len(states), len(weight))
        (buffer,), spare = (buffers_for(chunks[:-1], weight, number) for number in (1, own.spare))
        for rows in reversed(chunks):
            if kept is None:
                kept = _score(own, buffer, spare, rows, states, cast, bias, True)[1]
            weighted = states[rows].to(own.dtype).float() * grad_values[rows, None]
            if of_weight is not None:
                addmm_fp32(of_weight, kept.t(), weighted)
            if of_bias is not None:
                of_bias += grad_values[rows] @ kept
            kept = None
    return (tensor if tensor is None else tensor.to(ctx.dtypes[1]) for tensor in (of_weight, of_bias))


def _score(own: _Pass, buffer, spare, rows: slice, states, weight, bias, with_grad: bool):
    """Values of some rows, and their gradient in what the head projected."""
    head, number = own.head, rows.stop - rows.start
    logits = project_logits(buffer[:number], states[rows], head, weight, bias, own.dtype)
    slope = None  # of soft-capping
    if with_grad and head.softcap is not None:
        slope = (logits / head.softcap).square_().neg_().add_(1.0)
    values, grad = own.score(rows, logits, spare[:, :number], with_grad)
    if grad is None:
        return values, None
    if slope is not None:
        grad.mul_(slope)
    return values, grad if head.scale == 1.0 else grad.mul_(head.scale)
