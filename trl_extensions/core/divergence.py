"""Per-token divergences between a policy p and a frozen reference q: a dense path to read, a chunked one to run."""

import torch

from .._compat import ChunkedDivergenceFunction
from .head import OutputHead


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
    """`dense_kl` from hidden states, projecting one tile of the vocabulary at a time (TRL's kernel).

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
    return ChunkedDivergenceFunction.apply(
        states.to(device),
        head.weight,
        head.bias,
        ref_states.to(device),
        ref_head.weight.to(device),
        ref_head.bias.to(device) if ref_head.bias is not None else None,
        1.0 if reverse else 0.0,
        1.0,
        head.scale,
        head.softcap,
        ref_head.scale,
        ref_head.softcap,
    )[0]
