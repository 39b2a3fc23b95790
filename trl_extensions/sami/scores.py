"""Scores of one batch: C x C response log-probabilities per query, KL to the reference, and what is logged of them."""

import torch
from torch import nn

from ..core.modeling.chunked import chunked_kl, token_logps
from ..core.modeling.head import ReferenceStates, output_head
from ..core.modeling.shared_prefix import last_states, states_before
from .loss import mutual_information_bound, sami_loss


def matched_states(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(N, H)` states of the reference before the response tokens of the matching pairs only: responses under the
    constitution they were sampled with."""
    pair_ids = inputs["pair_ids"]
    own = (pair_ids >= 0) & inputs["matched"][pair_ids]
    kept = (own | (pair_ids < 0)) & inputs["attention_mask"].bool()
    # Bring each prompt and its own response together, on the left
    order = (~kept).long().argsort(dim=1, stable=True)[:, : kept.sum(1).max()]
    rows = own.any(1)
    wide = {"input_ids": inputs["input_ids"], "attention_mask": kept.long(), "pair_ids": pair_ids.where(own, -1)}
    plain = {name: tensor.gather(1, order)[rows] for name, tensor in wide.items()}
    return states_before_responses(model, plain)


def score_matched(model: nn.Module, inputs: dict[str, torch.Tensor]) -> ReferenceStates:
    """`matched_states` with the head they meet, for a model that no trainer has wrapped."""
    states = matched_states(model, inputs)
    return ReferenceStates(states, output_head(model, states))


def score_pairs(
    model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str, reference: ReferenceStates | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Score every response under every prompt with one forward of the unwrapped policy.

    Gives, for a batch of P pairs, `(P,)` log-probabilities in nats (`reduction` is `"mean"` or `"sum"`, over tokens),
    and `(M,)` mean KL(policy || reference) in nats per response token of the M matching pairs, if the states of the
    reference are given.
    """
    states = states_before_responses(model, inputs)
    head = output_head(model, states)
    device = head.weight.device  # the last one, of a model split over several
    scored = inputs["pair_ids"] >= 0
    pair_of_token = inputs["pair_ids"][scored].to(device)
    matched, lengths = inputs["matched"].to(device), pair_lengths(inputs).to(device)
    logps = _sum_by(pair_of_token, token_logps(states, head, inputs["input_ids"][scored]), len(matched))
    if reduction == "mean":
        logps = logps / lengths
    if reference is None:
        return logps, None
    own = matched[pair_of_token]
    kl = chunked_kl(states.to(device)[own], head, reference.states, reference.head, reverse=True)
    number = matched.cumsum(0) - 1  # position of each pair among the matching ones
    return logps, _sum_by(number[pair_of_token[own]], kl, int(matched.sum())) / lengths[matched]


def plain_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a batch has of its responses behind the query without a constitution, for `states_before_responses`."""
    return {name.removeprefix("plain_"): own for name, own in inputs.items() if name.startswith("plain_")}


def plain_kl(
    model: nn.Module, inputs: dict[str, torch.Tensor], sizes: torch.Tensor, reference: ReferenceStates
) -> torch.Tensor:
    """KL(reference || policy) `(B,)` of `plain_inputs`, nats: a mean over the tokens of each query's responses, whose
    numbers are `sizes` `(B,)`."""
    states, pair_ids = states_before_responses(model, inputs), inputs["pair_ids"]
    kl = chunked_kl(states, output_head(model, states), reference.states, reference.head, reverse=False)
    query_of_pair = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    query = query_of_pair[pair_ids[pair_ids >= 0]].to(kl.device)
    return _sum_by(query, kl, len(sizes)) / torch.bincount(query, minlength=len(sizes))


def pair_lengths(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Response tokens of each of the P pairs, `(P,)`."""
    pair_ids = inputs["pair_ids"]
    return torch.bincount(pair_ids[pair_ids >= 0], minlength=len(inputs["matched"]))


def states_before_responses(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(N, H)` states that predict the response tokens, sequence by sequence."""
    pair_ids = inputs["pair_ids"]
    hidden = last_states(model, inputs, pair_ids)
    return states_before(hidden, pair_ids, inputs["attention_mask"], pair_ids >= 0)


def _sum_by(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    return values.new_zeros(size).index_add(0, index, values)


def rows_of(
    logps: torch.Tensor,
    kl: torch.Tensor | None,
    inputs: dict[str, torch.Tensor],
    beta: float,
    *,
    reduction: str | None = None,
    length_weight: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`(B,)` losses of queries, with gradient, and detached `(B,)` statistics by name, of what `score_pairs` gives.

    A query's KL, which the loss has `beta` times, is a mean over the tokens of its matching responses. Told the
    `reduction` of `logps`, it gives the bound of sums as `mi/bound` and that of means as `mi/contrast_per_token`,
    else the bound of `logps` as they are.
    """
    sizes = inputs["num_constitutions"].tolist()
    lengths = pair_lengths(inputs)[inputs["matched"]].to(logps.device).split(sizes)
    kls = kl.split(sizes) if kl is not None else [None] * len(sizes)
    losses, rows = [], []
    for c, block, row_lengths, row_kl in zip(sizes, logps.split([c * c for c in sizes]), lengths, kls, strict=True):
        matrix = block.view(c, c)
        loss = sami_loss(matrix, row_lengths, length_weight)
        row = _statistics(matrix.detach(), row_lengths)
        if reduction is not None:
            sums, means = matrix.detach() * row_lengths, matrix.detach() / row_lengths
            row["mi/bound"] = mutual_information_bound(matrix.detach() if reduction == "sum" else sums)
            row["mi/contrast_per_token"] = mutual_information_bound(matrix.detach() if reduction == "mean" else means)
        if row_kl is not None:
            row_kl = (row_kl * row_lengths).sum() / row_lengths.sum()
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
