"""Scores of one batch: the objective at its scored tokens, and what is reported of them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._compat import use_adapter
from ..core.modeling.batches import eval_mode, in_batches
from ..core.modeling.chunked import token_logps
from ..core.modeling.head import ReferenceStates, output_head
from ..core.modeling.shared_prefix import last_states, states_before
from .collator import DataCollatorForTNT
from .data import prepare_rows
from .fused_loss import Objective, TokenScores, fused_negative_loss


def scored_states(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(N, H)` states that predict the N scored tokens of a batch of `DataCollatorForTNT`, sequence by sequence."""
    rows = inputs.get("row_ids")
    hidden = last_states(model, inputs, rows)
    if rows is not None:
        return states_before(hidden, rows, inputs["attention_mask"], inputs["token_weights"] != 0)
    return hidden[:, :-1][_scored(inputs).to(hidden.device)]


def reference_states(model: nn.Module, inputs: dict[str, torch.Tensor]) -> ReferenceStates:
    """`scored_states` with the head they meet, for a reference that no trainer has wrapped."""
    states = scored_states(model, inputs)
    return ReferenceStates(states, output_head(model, states))


def score_tokens(
    model: nn.Module, inputs: dict[str, torch.Tensor], reference: ReferenceStates, objective: Objective
) -> TokenScores:
    """The objective at every scored token of a batch of `DataCollatorForTNT`, with one forward of the policy."""
    states, scored = scored_states(model, inputs), _scored(inputs)
    token_ids, weights = inputs["input_ids"][:, 1:][scored], inputs["token_weights"][:, 1:][scored]
    head = output_head(model, states)
    return fused_negative_loss(states, head, reference.states, reference.head, token_ids, weights, objective)


def _scored(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["token_weights"][:, 1:] != 0


def sums_of_rows(scores: TokenScores, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a trainer logs: name -> `(B,)` sums over the tokens of each row, and `(B,)` numbers of these."""
    row_of_token, weights = (tensor.to(scores.losses.device) for tensor in _rows_and_weights(inputs))
    negative, kept, every = (weights < 0).float(), (weights > 0).float(), torch.ones_like(scores.losses)
    values = {
        "loss": (scores.losses, every),
        "prob/negative": (scores.logps.exp(), negative),
        "prob/negative_ref": (scores.ref_logps.exp(), negative),
        "kl/negative": (scores.divergence, negative),
        "kl/kept": (scores.divergence, kept),
        "entropy": (scores.entropy, every),
        "tokens/negative": (negative, every),
    }

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(number_of_rows(inputs)).index_add(0, row_of_token, values)

    return {name: (by_row(value * counted), by_row(counted)) for name, (value, counted) in values.items()}


def _rows_and_weights(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    scored = _scored(inputs)
    rows = inputs["row_ids"][:, 1:][scored] if "row_ids" in inputs else scored.nonzero()[:, 0]
    return rows, inputs["token_weights"][:, 1:][scored]


def number_of_rows(inputs: dict[str, torch.Tensor]) -> int:  # which may be more than its sequences
    return len(inputs["num_tokens"] if "num_tokens" in inputs else inputs["input_ids"])


def score_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], *,
    original: nn.Module | None = None, batch_tokens: int = 4096,
) -> list[dict[str, float]]:  # fmt: skip
    """Score annotated outputs under a model and its original (`original`, or a PEFT model's base), `batch_tokens`
    padded tokens at a time.

    Returns:
        For each row, in order, sums over its tokens: `kept_tokens`, `negative_tokens`; `kl_target`, KL(d || p) to the
        ideal target over all of them, and `kl_kept`, KL(q || p) over kept ones (nats); `logp` and `logp_original` of
        the completion (nats); `prob_negative` and `prob_negative_original` of the unwanted tokens.
    """
    if original is None and not hasattr(model, "peft_config"):
        raise ValueError("there is no original to compare with: pass `original`, or a PEFT model on top of it")
    results: list[dict[str, float]] = [{} for _ in rows]
    for indices, inputs in _batches_of(rows, model, tokenizer, batch_tokens):
        with eval_mode(model), torch.inference_mode():
            reference = _original_states(model, original, inputs)
            scores = score_tokens(model, inputs, reference, Objective())
        for i, result in zip(indices, _row_sums(scores, inputs), strict=True):
            results[i] = result
    return results


def perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], *,
    original: nn.Module | None = None, batch_tokens: int = 4096,
) -> float:  # fmt: skip
    """Perplexity of all completions together under the original of a model; arguments as in `score_rows`."""
    logp = tokens = 0.0
    for _, inputs in _batches_of(rows, model, tokenizer, batch_tokens):
        with eval_mode(model), torch.inference_mode():
            reference = _original_states(model, original, inputs)
            logps = token_logps(reference.states, reference.head, inputs["input_ids"][:, 1:][_scored(inputs)])
        logp, tokens = logp + logps.sum().item(), tokens + len(logps)
    return math.exp(-logp / tokens)


def _batches_of(
    rows: list[dict[str, Any]], model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Numbers of some rows and the batch they make on the model's device, the longest first."""
    names = ("prompt", "completion", "negative_spans", "truncated")
    dataset = Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    dataset = prepare_rows(dataset, tokenizer, max_length=None, name="evaluation")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = DataCollatorForTNT(pad_id)
    for indices in in_batches([len(ids) for ids in dataset["input_ids"]], batch_tokens, "scoring"):
        inputs = collate([dataset[i] for i in indices])
        yield indices, {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _original_states(model: nn.Module, original: nn.Module | None, inputs: dict[str, torch.Tensor]) -> ReferenceStates:
    if original is not None:
        return reference_states(original, inputs)
    with use_adapter(model, None):
        return reference_states(model, inputs)


def _row_sums(scores: TokenScores, inputs: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    row_of_token, weights = (tensor.to(scores.losses.device) for tensor in _rows_and_weights(inputs))
    negative, kept = (weights < 0).float(), (weights > 0).float()
    columns = {
        "kept_tokens": kept,
        "negative_tokens": negative,
        "kl_target": scores.divergence,
        "kl_kept": scores.divergence * kept,
        "logp": scores.logps,
        "logp_original": scores.ref_logps,
        "prob_negative": scores.logps.exp() * negative,
        "prob_negative_original": scores.ref_logps.exp() * negative,
    }
    table = torch.stack(list(columns.values()), dim=1)
    sums = table.new_zeros(number_of_rows(inputs), len(columns)).index_add(0, row_of_token, table)
    return [dict(zip(columns, row, strict=True)) for row in sums.tolist()]
