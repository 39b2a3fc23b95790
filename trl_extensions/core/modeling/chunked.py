"""Numbers per token from hidden states, a few rows of logits at a time: log-probabilities, divergences, any function.

What a row gives does not depend on other rows, nor its gradient on what is made of it later. So the forward pass
leaves the gradient in the hidden states behind, and a frozen head is projected through once. The gradient in a trained
head's weight needs the rows' gradients again: those of the last chunk are still there, the others are computed anew.
On a GPU, where projecting is cheap, TRL's kernels run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..._compat import (
    ChunkedDivergenceFunction,
    ChunkedLogProbFunction,
    addmm_fp32,
    compute_dtype,
    maybe_gather_lm_head_ctx,
    use_triton,
)
from .head import OutputHead, head_products, project_logits


_VOCAB_CHUNK = 32768  # of TRL's kernel
_CHUNK_ELEMENTS = 2**24  # rows x vocabulary of one chunk: 64 MB

Score: TypeAlias = Callable[[slice, torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]
"""From some rows' numbers, their logits `(n, V)`, float32, and spare room `(spare, n, V)` to values `(n,)` and, if the
flag is set, their gradient in the logits `(n, V)`, in the place of these."""


def token_logps(states: torch.Tensor, head: OutputHead, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(N,)`, float32, nats, of tokens `(N,)` given the states `(N, H)` that predict them."""
    device = head.weight.device
    states, token_ids = states.to(device), token_ids.to(device)
    if use_triton(device):
        with maybe_gather_lm_head_ctx(head.weight, head.bias):  # its forward, unlike its backward, does not gather
            return ChunkedLogProbFunction.apply(
                states, head.weight, head.bias, token_ids, 1.0, _VOCAB_CHUNK, head.softcap, head.scale, ("log_probs",)
            )[0]

    def score(rows: slice, logits: torch.Tensor, _spare: torch.Tensor, with_grad: bool):
        index = token_ids[rows, None]
        top, own = logits.amax(-1, keepdim=True), logits.gather(-1, index)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        logps = (own - top - total.log())[:, 0]
        if not with_grad:
            return logps, None
        return logps, logits.mul_(-1.0 / total).scatter_add_(-1, index, torch.ones_like(own))

    return per_row(states, head, score)


def dense_kl(logits: torch.Tensor, ref_logits: torch.Tensor, *, reverse: bool) -> torch.Tensor:
    """KL(q || p) `(...)`, nats, of a policy p and a reference q given as logits `(..., V)`; KL(p || q) if `reverse`.
    The definition to read."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if not reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def chunked_kl(
    states: torch.Tensor, head: OutputHead, ref_states: torch.Tensor, ref_head: OutputHead, *, reverse: bool
) -> torch.Tensor:
    """`dense_kl` `(N,)`, float32, from hidden states `(N, H)` and `(N, H')`; both heads have one vocabulary."""
    device = head.weight.device
    states, ref_states, ref_head = states.to(device), ref_states.to(device), ref_head.to(device)
    if use_triton(device):
        policy, reference = (states, head.weight, head.bias), (ref_states, ref_head.weight, ref_head.bias)
        scales = head.scale, head.softcap, ref_head.scale, ref_head.softcap
        return ChunkedDivergenceFunction.apply(*policy, *reference, 1.0 if reverse else 0.0, 1.0, *scales)[0]
    dtype = compute_dtype(ref_states)

    def score(rows: slice, logits: torch.Tensor, spare: torch.Tensor, with_grad: bool):
        vocabulary = logits.size(1)  # the reference's head may have rows more, which the policy has no token for
        weight = ref_head.weight[:vocabulary].to(dtype)
        bias = None if ref_head.bias is None else ref_head.bias[:vocabulary]
        ref_logits = project_logits(spare[0], ref_states[rows], ref_head, weight, bias, dtype)
        log_p, log_q = _normalise(logits, spare[1]), _normalise(ref_logits, spare[2])
        p, q = logits, ref_logits
        gap = log_p.sub_(log_q)
        if not reverse:
            return gap.mul_(q).sum(-1).neg_(), p.sub_(q) if with_grad else None
        values = torch.mul(p, gap, out=q).sum(-1)
        return values, p.mul_(gap.sub_(values[:, None])) if with_grad else None

    return per_row(states, head, score, spare=3, other=ref_head)


def _normalise(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in `out`, and probabilities in the place of the logits."""
    # In one way for both models: what a sum over the vocabulary rounds off (2e-5 in `log_softmax` on a CPU) is a
    # divergence where only one of them has it
    logps = torch.sub(logits, logits.amax(-1, keepdim=True), out=out)
    total = torch.exp(logps, out=logits).sum(-1, keepdim=True)
    logits.div_(total)
    return logps.sub_(total.log())


def per_row(
    states: torch.Tensor, head: OutputHead, score: Score, *, spare: int = 0, other: OutputHead | None = None
) -> torch.Tensor:
    """Values `(N,)`, float32, of rows of logits, a few rows at a time; gradients flow to states and head.

    Memory is bounded by a chunk of logits and of each of the `spare` tensors like it that `score` works with, besides
    the states' gradient and, for a head in half precision, a float32 copy of it. `score` may be called again in the
    backward pass. `other`, a head that it reads, is gathered once for all rows (ZeRO-3).
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
        with maybe_gather_lm_head_ctx(weight, bias), other, head_products(weight.device, self.dtype):
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
