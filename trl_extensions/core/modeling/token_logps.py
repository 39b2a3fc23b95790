"""Log-probabilities of tokens from hidden states, a few rows of logits at a time."""

import torch

from ..._compat import ChunkedLogProbFunction, maybe_gather_lm_head_ctx, use_triton
from .head import OutputHead
from .per_row import per_row


_VOCAB_CHUNK = 32768  # of TRL's kernel


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
