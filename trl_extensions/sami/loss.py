"""The SAMI objective (arXiv 2404.14313, section 3): pure functions of a matrix of log-probabilities.

`logps` is `(..., C, C)`, in nats, C >= 2; `logps[..., k, j]` is log pi(y_j | x, c_k): the row is the constitution, the
column the response, and the diagonal holds the pairs that belong together (y_j was sampled under c_j). Another shape
raises a `ValueError`.
"""

import math

import torch


def _check_square(logps: torch.Tensor) -> None:
    if logps.dim() < 2 or logps.size(-1) != logps.size(-2):
        raise ValueError(f"`logps` must end in a square (constitutions x responses), got shape {tuple(logps.shape)}.")
    if logps.size(-1) < 2:
        raise ValueError("`logps` holds a single constitution, nothing to contrast: give at least 2 constitutions.")


def _diagonal_cross_entropy(logps: torch.Tensor, dim: int) -> torch.Tensor:
    """Mean over the diagonal of -log softmax along `dim`, in float32 at least. `(..., C, C)` -> `(...)`, nats."""
    if logps.dtype in (torch.float16, torch.bfloat16):
        logps = logps.float()
    return -logps.log_softmax(dim).diagonal(dim1=-2, dim2=-1).mean(-1)


def sami_loss(logps: torch.Tensor, lengths: torch.Tensor | None = None, length_weight: float = 0.0) -> torch.Tensor:
    """Two-sided contrastive loss `(...)`, least when constitutions and responses determine each other.

    The mean of the row-wise cross-entropy (which response belongs to this constitution) and the column-wise one (which
    constitution produced this response), in nats: log C at indifference, 0 at best.

    With `length_weight` w and the `lengths` `(..., C)` of the responses, in tokens, the rows contrast
    `logps[k, j] + w * log(lengths[j])`: a response n times as long has a lead of w log n nats, which training undoes
    by making it less likely under all constitutions. Columns compare a response with itself, where a term cancels.
    """
    _check_square(logps)
    by_row = logps
    if length_weight:
        if lengths is None or lengths.shape != logps.shape[:-1]:
            raise ValueError(f"`length_weight` needs `lengths` of the shape {tuple(logps.shape[:-1])}, in tokens.")
        by_row = logps + length_weight * lengths.to(logps).log().unsqueeze(-2)
    return (_diagonal_cross_entropy(by_row, -1) + _diagonal_cross_entropy(logps, -2)) / 2


def mutual_information_bound(logps: torch.Tensor) -> torch.Tensor:
    """Lower bound (InfoNCE) `(...)`, nats, on the mutual information of constitution and response given the query.

    It is log C minus the column-wise cross-entropy: never above log C, and negative when responses fit the wrong
    constitution better. Any score gives a bound in expectation. Sums over tokens, the log-probabilities of responses,
    give the tight one; means over tokens a loose one, the contrast per token.
    """
    _check_square(logps)
    return math.log(logps.size(-1)) - _diagonal_cross_entropy(logps, -2)
