"""Moving a model's decision so that its predicted classes are as frequent as the weak labels say.

Without it, a strong model that trusts its own predictions would drift to one class (confidence loss of arXiv
2312.09390, appendix A.4, there for two classes; here for any number).
"""

import torch


_SWEEPS = 20
_LOWEST = torch.finfo(torch.float32).tiny  # a probability that underflowed to 0 still has a logarithm


def threshold_for(probs: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Thresholds under which the classes predicted for these rows are distributed like `prior`.

    Two classes: the published rule, `t` = the linear quantile of the first class's probability at the second class's
    prior, returned as `(t, 1 - t)`. More classes: each class in turn gets the threshold at which as many rows are
    predicted as it is due (the prior times N, rounded so that the sum is N), given the thresholds of the others, until
    all counts agree, to one row in a thousand. Deterministic.

    Args:
        probs: `(N, K)` probabilities, N >= 1, on any device.
        prior: `(K,)`, each class's share.

    Returns:
        `(K,)` float64 on the CPU, on the simplex: what `predicted_class` takes. A threshold cannot forbid a class for
        all rows to come: give `predicted_class` the prior as well where it has zeros.

    Raises:
        ValueError: Shapes that do not fit.
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
    """The class whose probability is highest in proportion to its threshold.

    Args:
        probs: `(N, K)`.
        threshold: `(K,)` on the simplex: argmax of `probs / threshold`, the lower class on ties. A scalar t stands for
            `(t, 1 - t)` and needs K = 2: the first class wherever its probability is at least t. None: plain argmax.
        prior: `(K,)`; a class to which it gives exactly 0 is never predicted. None: every class may be.

    Returns:
        `(N,)` int64.

    Raises:
        ValueError: A threshold or prior that does not fit K.
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
