"""Per-token divergences between a policy p and a frozen reference q: a dense path to read, a chunked one to run."""

import torch

from ..._compat import ChunkedDivergenceFunction, compute_dtype, use_triton
from .head import OutputHead, project_logits
from .per_row import per_row


def dense_kl(logits: torch.Tensor, ref_logits: torch.Tensor, *, reverse: bool) -> torch.Tensor:
    """KL divergence of two distributions given as logits; the definition, kept as the reference path.

    Args:
        logits: `(..., V)` of the policy p.
        ref_logits: `(..., V)` of the reference q.
        reverse: True for KL(p || q), False for KL(q || p).

    Returns:
        `(...)`, nats, at least 0.
    """
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if not reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def chunked_kl(
    states: torch.Tensor, head: OutputHead, ref_states: torch.Tensor, ref_head: OutputHead, *, reverse: bool
) -> torch.Tensor:
    """`dense_kl` from hidden states, a few rows at a time; on a GPU it is TRL's kernel.

    Args:
        states: `(N, H)` of the policy; receives gradients, as does its head.
        head: The policy's output head.
        ref_states: `(N, H')` of the reference.
        ref_head: The reference's output head; same vocabulary.
        reverse: True for KL(p || q), False for KL(q || p).

    Returns:
        `(N,)` float32, nats.
    """
    device = head.weight.device
    states, ref_states = states.to(device), ref_states.to(device)
    ref_bias = None if ref_head.bias is None else ref_head.bias.to(device)
    ref_head = OutputHead(ref_head.weight.to(device), ref_bias, ref_head.scale, ref_head.softcap)
    if use_triton(device):
        return ChunkedDivergenceFunction.apply(
            states,
            head.weight,
            head.bias,
            ref_states,
            ref_head.weight,
            ref_head.bias,
            1.0 if reverse else 0.0,
            1.0,
            head.scale,
            head.softcap,
            ref_head.scale,
            ref_head.softcap,
        )[0]
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
    """Log-probabilities in `out`, and probabilities in the place of the logits.

    In one way for both models: what a sum over the vocabulary rounds off (2e-5 in `log_softmax` on a CPU) is a
    divergence where only one of them has it.
    """
    logps = torch.sub(logits, logits.amax(-1, keepdim=True), out=out)
    total = torch.exp(logps, out=logits).sum(-1, keepdim=True)
    logits.div_(total)
    return logps.sub_(total.log())
