"""Scores of one batch: C x C response log-probabilities per query, KL to the original, and what is logged of them."""

from dataclasses import dataclass

import torch
from torch import nn

from ..core.divergence import chunked_kl
from ..core.head import OutputHead, output_head, states_before, token_logps
from .loss import mutual_information_bound, sami_loss


@dataclass(frozen=True)
class ReferenceStates:
    """The original's view of the matching pairs: `states` `(N, H)` before their response tokens, and its head."""

    states: torch.Tensor
    head: OutputHead


def score_matched(model: nn.Module, inputs: dict[str, torch.Tensor]) -> ReferenceStates:
    """Run the original over the matching pairs only: responses under the constitution they were sampled with."""
    matched = inputs["matched"]
    states = states_before(
        model,
        inputs["input_ids"][matched],
        inputs["attention_mask"][matched],
        inputs["completion_mask"][matched].bool(),
    )
    return ReferenceStates(states, output_head(model, states))


def score_pairs(
    model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str, reference: ReferenceStates | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Score every response under every prompt with one forward of the policy.

    Args:
        model: The unwrapped policy.
        inputs: A batch of `DataCollatorForSAMI`, P sequences for B queries.
        reduction: `"mean"` or `"sum"` over response tokens.
        reference: The original's states of the matching pairs, or None to leave KL out.

    Returns:
        `(P,)` log-probabilities in nats, and `(M,)` mean KL(policy || original) in nats per response token of each of
        the M matching pairs (None without `reference`).
    """
    scored = inputs["completion_mask"].bool()
    states = states_before(model, inputs["input_ids"], inputs["attention_mask"], scored)
    head = output_head(model, states)
    pair_of_token, _ = scored.nonzero(as_tuple=True)
    lengths = scored.sum(1)
    logps = _sum_by(pair_of_token, token_logps(states, head, inputs["input_ids"][scored]), len(scored))
    if reduction == "mean":
        logps = logps / lengths
    if reference is None:
        return logps, None
    matched = inputs["matched"]
    kl = chunked_kl(states[matched[pair_of_token]], head, reference.states, reference.head, reverse=True)
    number = matched.cumsum(0) - 1  # position of each pair among the matching ones
    matched_tokens = pair_of_token[matched[pair_of_token]]
    return logps, _sum_by(number[matched_tokens], kl, int(matched.sum())) / lengths[matched]


def _sum_by(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    return values.new_zeros(size).index_add(0, index.to(values.device), values)


def rows_of(
    logps: torch.Tensor,
    kl: torch.Tensor | None,
    inputs: dict[str, torch.Tensor],
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and statistics of each query.

    Args:
        logps: `(P,)` of `score_pairs`.
        kl: `(M,)` of `score_pairs`, or None.
        inputs: The batch.
        beta: Weight of the KL term.

    Returns:
        `(B,)` losses with gradient, and detached `(B,)` statistics by metric name. A query's KL is weighted by the
        lengths of its responses, so that it is a mean over response tokens whatever the batch looks like.
    """
    sizes = inputs["num_constitutions"].tolist()
    lengths = inputs["completion_mask"].sum(1)[inputs["matched"]].split(sizes)
    kls = kl.split(sizes) if kl is not None else [None] * len(sizes)
    losses, rows = [], []
    for c, block, row_lengths, row_kl in zip(sizes, logps.split([c * c for c in sizes]), lengths, kls, strict=True):
        matrix = block.view(c, c)
        loss = sami_loss(matrix)
        row = _statistics(matrix.detach(), row_lengths.to(matrix.device))
        if row_kl is not None:
            weights = row_lengths.to(row_kl.device)
            row_kl = (row_kl * weights).sum() / weights.sum()
            row["kl"] = row_kl.detach()
            if beta:
                loss = loss + beta * row_kl
        losses.append(loss)
        rows.append(row)
    return torch.stack(losses), {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _statistics(matrix: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    c = len(matrix)
    diagonal = torch.arange(c, device=matrix.device)
    matched = matrix.diagonal()
    lengths = lengths.float()
    return {
        "mi/bound": mutual_information_bound(matrix),
        "mi/accuracy_rows": (matrix.argmax(1) == diagonal).float().mean(),
        "mi/accuracy_columns": (matrix.argmax(0) == diagonal).float().mean(),
        "logps/matched": matched.mean(),
        "logps/mismatched": (matrix.sum() - matched.sum()) / (c * c - c),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
    }
