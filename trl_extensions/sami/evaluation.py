"""What SAMI promises, measured on held-out queries: does a response tell which constitution it was written under?"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._compat import use_adapter
from ..core.modeling.batches import plan_batches
from ..core.modeling.head import ReferenceStates
from ..core.modeling.modes import evaluating
from ..core.modeling.shared_prefix import why_not_exact
from ..core.modeling.throughput import Throughput
from ..core.runs.report import mean_and_error, write_atomically
from ..core.text import corpus_distinct_2, distinct_2
from .collator import DataCollatorForSAMI
from .data import prepare_rows
from .principles import constitution_label
from .sampling import to_dataset
from .scores import pair_lengths, rows_of, score_matched, score_pairs


def score_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    *,
    original: nn.Module | None = None,
    measure_kl: bool = True,
    batch_tokens: int = 8192,
) -> list[dict[str, float]]:
    """Score sampled rows, longest first, batched by tokens.

    Args:
        model: The model under test; a PEFT model's base is its original.
        tokenizer: Its tokenizer.
        rows: Rows of `sample_rows`.
        original: The original of a fully fine-tuned model. None: the PEFT base; without PEFT there is no `kl`.
        measure_kl: Run the original too; False leaves `kl` out.
        batch_tokens: Padded tokens per batch, C x C sequences a row.

    Returns:
        For each row, in order: `mi_bound` and `mi_bound_sum` (nats; per-token means and sums of log-probabilities),
        `accuracy_columns`, `accuracy_rows`, `kl` (nats per response token).
    """
    dataset = prepare_rows(to_dataset(rows), tokenizer, max_length=None, overflow="error", name="evaluation")
    shared = why_not_exact(model, longest=max(map(_longest, dataset))) is None
    collate = DataCollatorForSAMI(_pad_id(tokenizer), share_prefix=shared)
    results: list[dict[str, float]] = [{} for _ in rows]
    with evaluating(model), torch.inference_mode(), tqdm(total=len(rows), desc="scoring", unit="row") as bar:
        count = Throughput(bar)
        for indices in _batches(dataset, batch_tokens, shared):
            device = next(model.parameters()).device
            inputs = {k: v.to(device) for k, v in collate([dataset[i] for i in indices]).items()}
            reference = _reference_states(model, inputs, original) if measure_kl else None
            for i, result in zip(indices, _score_batch(model, inputs, reference), strict=True):
                results[i] = result
            count.add(inputs["attention_mask"].sum(1).tolist())
            bar.update(len(indices))
    return results


def _score_batch(
    model: nn.Module, inputs: dict[str, torch.Tensor], reference: ReferenceStates | None
) -> list[dict[str, float]]:
    sums, kl = score_pairs(model, inputs, "sum", reference)
    _, by_sum = rows_of(sums, kl, inputs, beta=0.0)
    _, by_mean = rows_of(sums / pair_lengths(inputs), kl, inputs, beta=0.0)
    columns = {
        "mi_bound": by_mean["mi/bound"],
        "mi_bound_sum": by_sum["mi/bound"],
        "accuracy_columns": by_mean["mi/accuracy_columns"],
        "accuracy_rows": by_mean["mi/accuracy_rows"],
    } | ({"kl": by_mean["kl"]} if kl is not None else {})
    lists = {name: values.tolist() for name, values in columns.items()}
    return [{name: values[i] for name, values in lists.items()} for i in range(len(inputs["num_constitutions"]))]


def _reference_states(
    model: nn.Module, inputs: dict[str, torch.Tensor], original: nn.Module | None
) -> ReferenceStates | None:
    """The original's states; None where there is no original to compare with."""
    if original is not None:
        return score_matched(original, inputs)
    if hasattr(model, "peft_config"):
        with use_adapter(model, None):
            return score_matched(model, inputs)
    return None


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _longest(row: dict[str, Any]) -> int:
    return max(map(len, row["prompt_input_ids"])) + max(map(len, row["completion_input_ids"]))


def _batches(dataset: Dataset, batch_tokens: int, shared: bool) -> list[list[int]]:
    """Rows of similar length, as many to a batch as fit into its tokens, padding included."""
    numbers, lengths = [], []  # sequences of each row, and the tokens of the longest
    for row in dataset:
        responses = list(map(len, row["completion_input_ids"]))
        numbers.append(len(responses) if shared else len(responses) ** 2)
        lengths.append(_longest(row) + (sum(responses) - max(responses) if shared else 0))
    return plan_batches(lengths, 0, batch_tokens, numbers)


def summarise(rows: list[dict[str, Any]], scores: list[dict[str, float]]) -> dict[str, Any]:
    """Means with standard errors over queries, and what the responses look like.

    Args:
        rows: Sampled rows.
        scores: Of `score_rows`, in the same order.

    Returns:
        JSON-ready: for each score `{"mean", "se"}` (standard error over queries), `num_queries`,
        `max_bound` (log C of the first row, nats), `length` (mean response tokens), `length_by_constitution`,
        `truncated` (share of responses cut off), `distinct_2` and `corpus_distinct_2`.
    """
    texts = [_text(completion) for row in rows for completion in row["completions"]]
    lengths = [tokens for row in rows for tokens in row["num_tokens"]]
    by_label = defaultdict(list)
    for row in rows:
        for choices, tokens in zip(row["choices"], row["num_tokens"], strict=True):
            by_label[constitution_label(choices)].append(tokens)
    summary: dict[str, Any] = {
        name: dict(zip(("mean", "se"), mean_and_error([score[name] for score in scores]), strict=True))
        for name in scores[0]
    }
    return summary | {
        "num_queries": len(rows),
        "max_bound": math.log(len(rows[0]["prompts"])),
        "length": sum(lengths) / len(lengths),
        "length_by_constitution": {
            label: {"mean": sum(values) / len(values), "responses": len(values)}
            for label, values in sorted(by_label.items())
        },
        "truncated": sum(sum(row["truncated"]) for row in rows) / len(texts),
        "distinct_2": distinct_2(texts),
        "corpus_distinct_2": corpus_distinct_2(texts),
    }


def _text(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def evaluate_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    output: Path,
    *,
    original: nn.Module | None = None,
    is_original: bool = False,
    fixed_rows: list[dict[str, Any]] | None = None,
    batch_tokens: int = 8192,
) -> dict[str, Any]:
    """Score a model on its own held-out responses, and on fixed ones, and write the result as JSON.

    Args:
        model, tokenizer, original, batch_tokens: See `score_rows`.
        rows: Responses the model itself gave; those with an empty response (`kept` false) are counted, not scored.
        output: JSON file to write.
        is_original: The model is the original, so that KL is 0 by definition.
        fixed_rows: Responses of another model, the untrained one usually: the same texts in every round.

    Returns:
        What was written: `summarise` of `rows`, and under `fixed_responses` that of `fixed_rows`.
    """
    scored = [row for row in rows if row["kept"]]
    if not scored:
        raise ValueError(
            f"{output}: every one of {len(rows)} held-out queries got an empty response, so there is nothing to "
            "score: the model has collapsed; train for fewer steps or with a smaller learning rate."
        )
    scores = score_rows(model, tokenizer, scored, original=original, batch_tokens=batch_tokens)
    result = summarise(scored, scores) | {"num_empty": len(rows) - len(scored)}
    if is_original:
        result["kl"] = {"mean": 0.0, "se": 0.0}
    if fixed_rows:
        scores = score_rows(model, tokenizer, fixed_rows, measure_kl=False, batch_tokens=batch_tokens)
        kept = ("mi_bound", "mi_bound_sum", "accuracy_columns", "accuracy_rows")
        result["fixed_responses"] = {name: summarise(fixed_rows, scores)[name] for name in kept}
    write_atomically(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result
