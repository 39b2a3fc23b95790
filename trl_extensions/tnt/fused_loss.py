"""The objectives of `tnt.loss` from hidden states: the same numbers, and no vocabulary-sized tensor outlives a chunk.

Both models are projected for a few rows at a time, which give their losses, statistics and, in closed form, their
gradient at once: nothing is projected again for the backward pass, and every row is exact.
"""

from dataclasses import dataclass

import torch

from .._compat import addmm_fp32, compute_dtype, maybe_gather_lm_head_ctx
from ..core.modeling.head import OutputHead, head_products, project_logits
from .loss import LOWEST, VARIANTS, check_objective, smooth_logps, target_logps


_CHUNK_ELEMENTS = 2**24  # rows x vocabulary of one chunk: 64 MB for each of four float32 buffers
_CUDA_CHUNK_ELEMENTS = 2**26  # takes half to three quarters of the time there (docs/speed.md)


@dataclass(frozen=True)
class Objective:
    """What `targeted_negative_loss` takes beside tensors; see there."""

    variant: str = "ff"
    alpha: float = 1.0
    smoothing: float = 1e-6
    smooth_over: str = "banned"

    def __post_init__(self):
        check_objective(self.variant, self.alpha, self.smoothing, self.smooth_over)


@dataclass(frozen=True)
class TokenScores:
    """Of N scored tokens, `(N,)`, nats; everything but `total` is detached."""

    total: torch.Tensor  # the sum of `losses`; carries the gradient
    losses: torch.Tensor  # multiplied by `alpha` on unwanted tokens, and by the size of their weights
    divergence: torch.Tensor  # KL(d || p) to the ideal target, whatever the variant
    entropy: torch.Tensor  # of the policy
    logps: torch.Tensor  # log p_y of the policy
    ref_logps: torch.Tensor  # log q_y of the reference


def fused_negative_loss(
    states: torch.Tensor, head: OutputHead, ref_states: torch.Tensor, ref_head: OutputHead,
    token_ids: torch.Tensor, weights: torch.Tensor, objective: Objective,
) -> TokenScores:  # fmt: skip
    """`targeted_negative_loss` of N scored tokens, whose weights are not 0, from the states that predict them.

    Gradients flow to `states` `(N, H)` and their head. Raises `ValueError` where the heads' vocabularies differ.
    """
    if len(head.weight) != len(ref_head.weight) and len(ref_head.weight) and len(head.weight):
        sizes = f"{len(head.weight)} tokens, the reference one of {len(ref_head.weight)}"
        raise ValueError(f"the model has a vocabulary of {sizes}: they must agree")
    states, *tensors = (tensor.to(head.weight.device) for tensor in (states, ref_states, token_ids, weights))
    settings = ref_head.to(head.weight.device), objective, torch.is_grad_enabled()
    return TokenScores(*_FusedLoss.apply(states, head.weight, head.bias, head, *tensors, *settings))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, head, ref_states, token_ids, weights, ref_head, objective, with_grad):
        needs = [with_grad and need for need in ctx.needs_input_grad[:3]]
        statistics = torch.zeros((5, len(states)), dtype=torch.float32, device=states.device)
        dtypes = compute_dtype(states), compute_dtype(ref_states)
        with (
            maybe_gather_lm_head_ctx(weight, bias),
            maybe_gather_lm_head_ctx(ref_head.weight, ref_head.bias),
            head_products(states.device, *dtypes),
        ):
            grads = [
                torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if need else None
                for need, tensor in zip(needs, (states, weight, bias), strict=True)
            ]
            cast, ref_cast = weight.to(dtypes[0]), ref_head.weight.to(dtypes[1])
            chunks = list(_chunks(weights, len(weight)))
            widest = max((len(rows) for rows, _ in chunks), default=0)
            buffers = torch.empty((4, widest, len(weight)), dtype=torch.float32, device=states.device)
            for rows, sign in chunks:
                logits, ref_logits, *spare = buffers[:, : len(rows)]
                project_logits(logits, states[rows], head, cast, bias, dtypes[0])
                project_logits(ref_logits, ref_states[rows], ref_head, ref_cast, ref_head.bias, dtypes[1])
                statistics[:, rows], grad = _score_rows(
                    logits, ref_logits, spare, token_ids[rows], sign, objective, head if any(needs) else None
                )
                if weights.is_floating_point():  # severities: other sizes than 1
                    sizes = weights[rows].abs()
                    statistics[0, rows] *= sizes
                    grad = grad if grad is None else grad.mul_(sizes[:, None])
                _accumulate(grads, grad, rows, states, cast, dtypes[0])
        # Not saved for another backward: scaled in place, a gradient as large as the head exists once
        ctx.grads, ctx.dtypes = grads, (states.dtype, weight.dtype, weight.dtype)
        ctx.mark_non_differentiable(*(outputs := list(statistics)))
        return statistics[0].sum(), *outputs

    @staticmethod
    def backward(ctx, grad_total, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradient of this loss was taken before: compute the loss again")
        grads, ctx.grads = ctx.grads, None
        scaled = [grad if grad is None else grad.mul_(grad_total) for grad in grads]
        return *(g if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), *(None,) * 7


def _chunks(weights: torch.Tensor, vocabulary: int):
    """Row numbers of one sign each, a few at a time."""
    size = max(1, _chunk_elements(weights.device) // max(1, vocabulary))
    for sign in (-1, 1):
        for rows in (weights * sign > 0).nonzero(as_tuple=True)[0].split(size):
            if len(rows):
                yield rows, sign


def _chunk_elements(device: torch.device) -> int:
    if device.type != "cuda":
        return _CHUNK_ELEMENTS
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    return max(_CHUNK_ELEMENTS, min(_CUDA_CHUNK_ELEMENTS, free // 64))  # a quarter of it for the buffers


def _accumulate(grads, grad, rows, states, weight, dtype) -> None:
    """Carry the gradient of some rows' logits to the states, the head's weight and its bias."""
    if grad is None:
        return
    of_states, of_weight, of_bias = grads
    if of_bias is not None:
        of_bias += grad.sum(0)
    if dtype == torch.float16:  # too narrow for a gradient that has not met the loss scale yet
        dtype = torch.float32
    grad = grad.to(dtype)
    if of_states is not None:
        own = torch.zeros((len(rows), states.shape[1]), dtype=torch.float32, device=states.device)
        addmm_fp32(own, grad, weight.to(dtype))
        of_states[rows] = own
    if of_weight is not None:
        addmm_fp32(of_weight, grad.t(), states[rows].to(dtype))


def _score_rows(logits, ref_logits, spare, token_ids, sign: int, objective: Objective, head: OutputHead | None):
    """Losses, KL(d || p), entropies, log p_y, log q_y, stacked `(5, n)`, and the gradient in what `head` projected, if
    that is not None. Logits `(n, V)` and two spare tensors like them are overwritten; `sign` decides on the term.
    """
    banned, index = sign < 0, token_ids[:, None]
    term = VARIANTS[objective.variant][0 if banned else 1]
    slope = None  # of scale and soft-capping
    if head is not None and head.softcap is not None:
        slope = (logits / head.softcap).square_().neg_().add_(1.0)
    log_p = _finite(torch.log_softmax(logits, -1, out=spare[0]))
    p = torch.exp(log_p, out=logits)
    log_d, ref_logp = _target(ref_logits, spare[1], token_ids, banned)
    logp = log_p.gather(-1, index)[:, 0]
    smooth = None
    if term == "reverse":
        smooth = smooth_logps(log_d, token_ids, banned, objective.smoothing, objective.smooth_over)
    d = torch.exp(log_d, out=ref_logits)
    rest = log_d.sub_(log_p)  # from here on that buffer is free for products
    divergence = rest.mul_(d).sum(-1)
    entropy = -torch.mul(p, log_p, out=rest).sum(-1)
    if term == "forward":
        losses, grad = divergence, p.sub_(d)
    elif smooth is not None:  # the term is "reverse"
        gap = torch.sub(log_p, smooth, out=smooth)
        losses = torch.mul(p, gap, out=rest).sum(-1)
        grad = gap.sub_(losses[:, None]).mul_(p)
    elif term == "unlikelihood":
        log_rest = log_p.scatter_(-1, index, -torch.inf)
        of_rest = log_rest.logsumexp(-1)
        losses = -of_rest
        # p_y at the token, -p_y times its share of the rest elsewhere
        grad = p.sub_(log_rest.sub_(of_rest[:, None]).exp_())
    else:
        direction = 1.0 if term == "likelihood" else -1.0
        losses = -direction * logp
        grad = p.scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=p.dtype)).mul_(direction)
    factor = objective.alpha if banned else 1.0
    statistics = torch.stack([factor * losses, divergence, entropy, logp, ref_logp])
    if head is None:
        return statistics, None
    if slope is not None:
        grad.mul_(slope)
    factor *= head.scale
    return statistics, grad if factor == 1.0 else grad.mul_(factor)


def _target(ref_logits, out, token_ids, banned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the target `(n, V)`, in `out` unless tokens are removed, and log q_y `(n,)`, all finite."""
    index = token_ids[:, None]
    if not banned:
        log_d = _finite(torch.log_softmax(ref_logits, -1, out=out))
        return log_d, log_d.gather(-1, index)[:, 0]
    ref_logp = ref_logits.gather(-1, index)[:, 0] - ref_logits.logsumexp(-1)
    return _finite(target_logps(ref_logits, token_ids, True)), _finite(ref_logp)


def _finite(logps: torch.Tensor) -> torch.Tensor:
    """`loss.finite`, in place."""
    return logps.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=LOWEST)
