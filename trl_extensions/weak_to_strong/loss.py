"""The objectives of weak-to-strong training as pure functions on tensors, for K >= 2 classes.

A strong model with predictions p learns from the soft labels q of weaker ones. Plain imitation copies their mistakes;
the other objectives let the strong model disagree (arXiv 2312.09390, section 4.3 and appendix A; used for safety,
toxicity and law in arXiv 2410.12621). They take logits `(B, K)` and soft labels `(B, K)`, rows on the simplex, and
compute in float32, or float64 for float64 logits; shapes that differ and settings out of range raise a `ValueError`.

| loss | target of the cross-entropy |
| --- | --- |
| `soft_cross_entropy` | q |
| `confidence_loss` | (1 - coef) q + coef * onehot(class the strong model predicts, once its prior matches q's) |
| `product_loss` | p^beta * q^alpha, renormalised |
| `reverse_kl_loss` | none: KL(p \\|\\| q), which seeks one of the modes of q |
"""

import torch


SMALLEST_SOFT_LABEL = 1e-6
"""A reverse KL takes soft labels below this for this (and renormalises), so that it stays finite."""

_SWEEPS = 20
_LOWEST = torch.finfo(torch.float32).tiny  # a probability that underflowed to 0 still has a logarithm


def soft_cross_entropy(logits: torch.Tensor, soft_labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy `(B,)`, nats, of the model under the soft labels."""
    logits, soft_labels = _checked(logits, soft_labels)
    return _cross_entropy(torch.log_softmax(logits, dim=-1), soft_labels)


def confidence_loss(
    logits: torch.Tensor,
    soft_labels: torch.Tensor,
    coef: float,
    prior: torch.Tensor | None = None,
    threshold: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Cross-entropy `(B,)`, nats, under soft labels mixed with the class the strong model predicts itself, detached.

    The class is predicted after the model's thresholds were moved so that its predictions follow `prior`. For
    K = 2 and the defaults this is the published rule: class 0 if p_0 >= the linear quantile of p_0 over the batch at
    the mean soft label of class 1. See `threshold_for` for more classes.

    Args:
        coef: Weight of the predicted class, from 0 (soft cross-entropy) to 1.
        prior: `(K,)`, class shares to match; a class to which it gives exactly 0 is never predicted. None: the batch
            mean of the soft labels (the published rule, in which the top row has class 0 even at a prior of 0).
        threshold: As `predicted_class` takes it, in place of one computed from the batch.
    """
    if not 0 <= coef <= 1:
        raise ValueError(f"coef must be in [0, 1], got {coef}")
    logits, soft_labels = _checked(logits, soft_labels)
    number = logits.shape[1]
    if prior is not None and prior.shape != (number,):
        raise ValueError(f"prior must have {number} entries, one per class, got shape {tuple(prior.shape)}")
    probs = torch.softmax(logits.detach(), dim=-1)
    if threshold is None and len(probs):
        matched = soft_labels.mean(dim=0) if prior is None else prior
        threshold = threshold_for(probs, matched)
        prior = matched if number > 2 else prior
    strong = torch.nn.functional.one_hot(predicted_class(probs, threshold, prior), number)
    target = (1 - coef) * soft_labels + coef * strong
    return _cross_entropy(torch.log_softmax(logits, dim=-1), target)


def product_loss(
    logits: torch.Tensor, soft_labels: torch.Tensor, alpha: float = 1.0, beta: float = 1.0
) -> torch.Tensor:
    """Cross-entropy `(B,)`, nats, under the product of both models' predictions, `p^beta * q^alpha`, renormalised.

    Both exponents are at least 0; beta 0 with alpha 1 is soft cross-entropy. The target is detached, and computed from
    logarithms: finite for all finite logits, whatever zeros the soft labels have. Where the product is 0 for every
    class (logits of -inf), the soft labels are the target.
    """
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha and beta must be at least 0, got {alpha} and {beta}")
    logits, soft_labels = _checked(logits, soft_labels)
    logps = torch.log_softmax(logits, dim=-1)
    product = torch.zeros_like(logps)
    for weight, factor in ((beta, logps.detach()), (alpha, soft_labels.log())):
        if weight:  # 0 * -inf is undefined, 0^0 is 1
            product = product + weight * factor
    everywhere_zero = (product == -torch.inf).all(dim=-1, keepdim=True)
    target = torch.softmax(product.masked_fill(everywhere_zero, 0.0), dim=-1)
    return _cross_entropy(logps, torch.where(everywhere_zero, soft_labels, target))


def reverse_kl_loss(logits: torch.Tensor, soft_labels: torch.Tensor) -> torch.Tensor:
    """KL(strong || weak) `(B,)`, nats, from the model's predictions to the soft labels.

    Of these, entries below 1e-6 count as 1e-6 and rows are renormalised: it stays finite, and is 0 where both agree.
    """
    logits, soft_labels = _checked(logits, soft_labels)
    logps = torch.log_softmax(logits, dim=-1)
    weak = soft_labels.clamp(min=SMALLEST_SOFT_LABEL)
    weak_logps = (weak / weak.sum(dim=-1, keepdim=True)).log()
    # A class the strong model rules out adds nothing; 0 * -inf would be undefined
    differences = (logps - weak_logps).masked_fill(logps == -torch.inf, 0.0)
    return (logps.exp() * differences).sum(dim=-1)


def threshold_for(probs: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Thresholds under which the classes predicted for these rows are distributed like `prior`.

    Two classes: the published rule, `t` = the linear quantile of the first class's probability at the second class's
    prior, returned as `(t, 1 - t)`. More classes: each class in turn gets the threshold at which as many rows are
    predicted as it is due (the prior times N, rounded so that the sum is N), given the thresholds of the others, until
    all counts agree, to one row in a thousand. Deterministic.

    Of probabilities `(N, K)`, N >= 1, on any device, and the classes' shares `(K,)`; `(K,)` float64 on the CPU, on the
    simplex. A threshold cannot forbid a class for all rows to come: give `predicted_class` a prior with zeros as well.
    """
    probs = probs.detach().cpu()
    prior = prior.detach().to("cpu", probs.dtype)
    if probs.ndim != 2 or not len(probs) or prior.shape != probs.shape[1:] or probs.shape[1] < 2:
        raise ValueError(f"probs must be (N, K) and prior (K,), got {tuple(probs.shape)} and {tuple(prior.shape)}")
    if probs.shape[1] == 2:
        first = torch.quantile(probs[:, 0], prior[1].clamp(0, 1)).double()
        return torch.stack([first, 1 - first])
    return torch.softmax(_matching_offsets(probs.double().clamp(min=_LOWEST).log(), prior.double()), dim=0)


def predicted_class(
    probs: torch.Tensor, threshold: torch.Tensor | float | None = None, prior: torch.Tensor | None = None
) -> torch.Tensor:
    """The class `(N,)`, int64, whose probability, of `(N, K)`, is highest in proportion to its threshold.

    Args:
        threshold: `(K,)` on the simplex: argmax of `probs / threshold`, the lower class on ties. A scalar t stands for
            `(t, 1 - t)` and needs K = 2: the first class wherever its probability is at least t. None: plain argmax.
        prior: `(K,)`; a class to which it gives exactly 0 is never predicted. None: every class may be.
    """
    number = probs.shape[1]
    threshold = _as_vector(threshold, number)
    allowed = None if prior is None else prior.detach().to(probs.device) > 0
    if number == 2:
        first = probs[:, 0] >= (threshold[0] / threshold.sum()).to(probs)
        if allowed is not None:  # of two, the other one is what is left
            first = (first & allowed[0]) | ~allowed[1]
        return (~first).long()
    scores = probs.clamp(min=_LOWEST).log() - threshold.log().to(probs)
    if allowed is not None and allowed.any():
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.argmax(dim=1)


def _as_vector(threshold: torch.Tensor | float | None, number: int) -> torch.Tensor:
    if threshold is None:
        return torch.full((number,), 1 / number, dtype=torch.float64)
    vector = torch.as_tensor(threshold, dtype=torch.float64, device="cpu")
    if vector.ndim == 0 and number == 2:
        vector = torch.stack([vector, 1 - vector])
    if vector.shape != (number,):
        raise ValueError(f"threshold must have {number} entries, one per class, got shape {tuple(vector.shape)}")
    if not (vector >= 0).all() or not vector.any():
        raise ValueError(f"threshold must be on the simplex (not negative, sum 1), got {vector.tolist()}")
    return vector


def _matching_offsets(logps: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Log-thresholds `(K,)` under which classes are predicted as often as they are due."""
    due = _due_counts(len(logps), prior)
    wanted = torch.tensor(due)
    offsets = torch.zeros(logps.shape[1], dtype=logps.dtype)
    best, fewest = offsets.clone(), len(logps) + 1
    for _ in range(_SWEEPS):
        for k, count in enumerate(due):
            offsets[k] = _offset_of_class(logps, offsets, k, count)
        offsets -= offsets.mean()
        counts = torch.bincount((logps - offsets).argmax(dim=1), minlength=len(offsets))
        misplaced = int((counts - wanted).abs().sum()) // 2
        if misplaced < fewest:
            best, fewest = offsets.clone(), misplaced
        if fewest <= len(logps) // 1000:
            break
    return best


def _offset_of_class(logps: torch.Tensor, offsets: torch.Tensor, k: int, count: int) -> torch.Tensor:
    """What to subtract from class k so that it wins `count` rows: half way between the last it wins and the next."""
    others = logps - offsets
    others[:, k] = -torch.inf
    margins = (logps[:, k] - others.amax(dim=1)).sort(descending=True).values
    if count == 0:
        return margins[0] + 1
    if count == len(margins):
        return margins[-1] - 1
    return (margins[count - 1] + margins[count]) / 2


def _due_counts(rows: int, prior: torch.Tensor) -> list[int]:
    """Whole numbers that sum to `rows`, in the ratio of the prior; the largest remainders are rounded up."""
    exact = rows * prior.clamp(min=0) / prior.clamp(min=0).sum()
    counts = exact.floor().long()
    left = rows - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:left]] += 1
    return counts.tolist()


def _checked(logits: torch.Tensor, soft_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in at least float32; the soft labels without gradient."""
    if logits.ndim != 2 or logits.shape != soft_labels.shape or logits.shape[1] < 2:
        shapes = f"{tuple(logits.shape)} and {tuple(soft_labels.shape)}"
        raise ValueError(f"logits and soft_labels must both be (B, K) with K >= 2, got {shapes}")
    logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return logits, soft_labels.detach().to(logits)


def _cross_entropy(logps: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    target = target.detach()
    return -(target * logps.masked_fill(target == 0, 0.0)).sum(dim=-1)
