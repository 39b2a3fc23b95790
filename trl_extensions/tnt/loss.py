"""The objectives of targeted negative training (TNT, arXiv 2406.13660, section 3), as pure functions on tensors.

p is the policy, q the frozen original, y the token at a position. The target d of a kept position is q itself; the
target of an unwanted position is q without y, renormalised. A variant says how p is drawn to d: by forward KL(d || p),
reverse KL(p || d), the likelihood -log p_y, the unlikelihood -log(1 - p_y) or the negative likelihood log p_y.
"""

import math

import torch


VARIANTS = {
    "ff": ("forward", "forward"),
    "rr": ("reverse", "reverse"),
    "rf": ("reverse", "forward"),
    "fll": ("forward", "likelihood"),
    "rll": ("reverse", "likelihood"),
    "ul": ("unlikelihood", "likelihood"),
    "nl": ("negative_likelihood", "likelihood"),
}  # variant -> (term of unwanted tokens, term of kept tokens)
SMOOTH_OVER = ("banned", "vocabulary")
LOWEST = -1e4  # for the log-probability -inf (a token a model rules out) where a term would be infinite or undefined


def targeted_negative_loss(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    variant: str,
    alpha: float = 1.0,
    smoothing: float = 1e-6,
    smooth_over: str = "banned",
) -> torch.Tensor:
    """Loss of every token, dense: the definition to read and to test against.

    Args:
        logits: `(B, T, V)` of the policy, aligned: `logits[:, t]` scores `token_ids[:, t]`.
        ref_logits: `(B, T, V)` of the original; no gradient flows into them.
        token_ids: `(B, T)`, the tokens that were written.
        weights: `(B, T)`: +1 keep, -1 unwanted, 0 not scored. Another size multiplies the token's loss: -3.0 is an
            unwanted token of severity 3.
        variant, alpha: One of `VARIANTS`; factor on unwanted tokens.
        smoothing: Mass that keeps a reverse KL finite where the target is zero.
        smooth_over: `"banned"` gives the banned token the mass `smoothing` and scales the others by `1 - smoothing`;
            kept positions are untouched, so policy = original has no gradient there. `"vocabulary"` adds `smoothing`
            to every entry of a reverse KL's target, kept positions included, and renormalises (the published code).

    Returns:
        `(B, T)` in nats, multiplied by `alpha` on unwanted tokens; exactly 0, without gradient, where the weight is 0.
        Divergences are true KLs: 0 at their optimum. Finite for all finite logits, also where the original puts all of
        its mass on the banned token, and where either model rules tokens out with -inf.
    """
    check_objective(variant, alpha, smoothing, smooth_over)
    if logits.shape != ref_logits.shape or logits.shape[:-1] != token_ids.shape or token_ids.shape != weights.shape:
        shapes = [tuple(tensor.shape) for tensor in (logits, ref_logits, token_ids, weights)]
        raise ValueError(f"shapes differ: logits must be (B, T, V), token_ids and weights (B, T), got {shapes}")
    losses = logits.new_zeros(token_ids.shape, dtype=_at_least_float32(logits))
    unwanted_term, kept_term = VARIANTS[variant]
    for sign, term, factor in ((-1, unwanted_term, alpha), (1, kept_term, 1.0)):
        rows = weights * sign > 0
        if rows.any():
            value = _term(term, logits[rows], ref_logits[rows], token_ids[rows], sign < 0, smoothing, smooth_over)
            losses = losses.masked_scatter(rows, factor * value * weights[rows].abs().to(value.dtype))
    return losses


def check_objective(variant: str, alpha: float, smoothing: float, smooth_over: str) -> None:
    """Refuse settings that have no meaning; raises `ValueError` with one line that names the setting."""
    if variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be a number above 0, got {alpha!r}.")
    if not _is_number(smoothing) or not 0 < smoothing < 1:
        raise ValueError(f"`smoothing` must be a number above 0 and below 1, got {smoothing!r}.")
    if smooth_over not in SMOOTH_OVER:
        raise ValueError(f"`smooth_over` must be one of {', '.join(SMOOTH_OVER)}, got {smooth_over!r}.")


def target_logps(ref_logits: torch.Tensor, token_ids: torch.Tensor, banned: bool) -> torch.Tensor:
    """Log-probabilities `(N, V)` of the target d: the original's, with `token_ids` `(N,)` at -inf if `banned`.

    They go before normalising, which is exact if they have all mass; where nothing is left, the others are equal."""
    if not banned:
        return ref_logits.log_softmax(-1)
    rest = ref_logits.scatter(-1, token_ids[:, None], -math.inf)
    nothing_left = rest.isneginf().all(-1, keepdim=True)
    rest = torch.where(nothing_left, torch.zeros_like(rest).scatter(-1, token_ids[:, None], -math.inf), rest)
    return rest.log_softmax(-1)


def smooth_logps(
    logps: torch.Tensor, token_ids: torch.Tensor, banned: bool, smoothing: float, smooth_over: str
) -> torch.Tensor:
    """Make log-probabilities `(N, V)` of a target finite, for a reverse KL; see `targeted_negative_loss`."""
    if smooth_over == "vocabulary":
        return (logps.exp() + smoothing).log() - math.log1p(smoothing * logps.shape[-1])
    if banned:
        logps = logps + math.log1p(-smoothing)
        logps = logps.scatter(-1, token_ids[:, None], math.log(smoothing))
    return finite(logps)


def finite(logps: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with -inf replaced by `LOWEST`, which keeps every term finite."""
    return logps.nan_to_num(nan=math.nan, posinf=math.inf, neginf=LOWEST)


def _term(
    term: str, logits: torch.Tensor, ref_logits: torch.Tensor, token_ids: torch.Tensor,
    banned: bool, smoothing: float, smooth_over: str,
) -> torch.Tensor:  # fmt: skip
    """One term for `(N, V)` rows of one sign, `(N,)` nats."""
    logits = logits.to(_at_least_float32(logits))
    log_p = logits.log_softmax(-1)
    if term in ("likelihood", "negative_likelihood"):
        of_token = finite(log_p.gather(-1, token_ids[:, None])[:, 0])
        return -of_token if term == "likelihood" else of_token
    if term == "unlikelihood":
        return -finite(log_p).scatter(-1, token_ids[:, None], -math.inf).logsumexp(-1)
    with torch.no_grad():
        log_d = target_logps(ref_logits.to(logits.dtype), token_ids, banned)
        if term == "reverse":
            log_d = smooth_logps(log_d, token_ids, banned, smoothing, smooth_over)
    if term == "reverse":
        return (log_p.exp() * (finite(log_p) - log_d)).sum(-1)
    d = log_d.exp()
    return (torch.xlogy(d, d) - d * finite(log_p)).sum(-1)


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
