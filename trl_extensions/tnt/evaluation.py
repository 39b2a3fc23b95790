"""What targeted negative training promises, on held-out prompts and always on both axes (arXiv 2406.13660)."""

import json
import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core.runs.report import write_atomically
from ..core.stats import bootstrap_ratio_interval
from .annotate.rows import completion_text
from .preservation import preservation, unwanted
from .scores import perplexity, score_rows


def evaluate_patch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    original_rows: list[dict[str, Any]],
    patched_rows: list[dict[str, Any]],
    output: Path,
    *,
    original: nn.Module | None = None,
    batch_tokens: int = 4096,
) -> dict[str, Any]:
    """Compare a patched model with its original, and write the result as JSON.

    Args:
        model, tokenizer, original, batch_tokens: See `scores.score_rows`.
        original_rows: Annotated outputs of the original to held-out prompts, greedy (`sample` 0) and random ones.
        patched_rows: Those of the patched model to the same prompts.
        output: JSON file to write.

    Returns:
        What was written. `original` and `patched`: `preservation.unwanted` of `greedy` and of `sampled` outputs, where
        there are any. `preservation`: the result of the function of that name. `divergence`, over the original's
        outputs: `kl_target` (KL(d || p) to the ideal target, nats per token), `kl_clean` (KL(q || p), nats per token
        of outputs without a span), each `{"value", "low", "high"}` with a 95 % interval over outputs, and
        `prob_negative` and `prob_negative_original` (mean probability of an unwanted token where the original wrote
        it; None without one). `perplexity` under the original: `original` and `patched`, of the greedy outputs of
        each.
    """
    settings = {"original": original, "batch_tokens": batch_tokens}
    greedy, patched = _written(original_rows), _written(patched_rows)
    scores = score_rows(model, tokenizer, greedy, **settings)
    result = {
        "original": _by_kind(original_rows),
        "patched": _by_kind(patched_rows),
        "preservation": preservation(original_rows, patched_rows),
        "divergence": _divergence(scores, greedy),
        "perplexity": {
            "original": _perplexity(scores),
            "patched": perplexity(model, tokenizer, patched, **settings),
        },
    }
    write_atomically(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _written(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Greedy outputs that can be scored."""
    written = [row for row in rows if row["sample"] == 0 and completion_text(row["completion"]).strip()]
    if not written:
        raise ValueError(
            f"none of {len(rows)} held-out outputs is a greedy one with text, so there is nothing to score: if the "
            "model has collapsed, train for fewer steps, or with a smaller learning rate or alpha."
        )
    return written


def _by_kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {
        "greedy": [row for row in rows if row["sample"] == 0],
        "sampled": [row for row in rows if row["sample"] != 0],
    }
    return {kind: unwanted(own) for kind, own in kinds.items() if own}


def _divergence(scores: list[dict[str, float]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    clean = [score for score, row in zip(scores, rows, strict=True) if not row["negative_spans"]]
    tokens = [score["kept_tokens"] + score["negative_tokens"] for score in scores]
    negatives = sum(score["negative_tokens"] for score in scores)
    result = {
        "kl_target": _per_token([score["kl_target"] for score in scores], tokens),
        "kl_clean": _per_token([s["kl_kept"] for s in clean], [s["kept_tokens"] for s in clean]),
    }
    for name in ("prob_negative", "prob_negative_original"):
        result[name] = sum(score[name] for score in scores) / negatives if negatives else None
    return result


def _per_token(values: list[float], tokens: list[float]) -> dict[str, float | None]:
    if not sum(tokens):
        return {"value": None, "low": None, "high": None}
    low, high = bootstrap_ratio_interval(values, tokens)
    return {
        "value": sum(values) / sum(tokens),
        "low": None if math.isnan(low) else low,
        "high": None if math.isnan(high) else high,
    }


def _perplexity(scores: list[dict[str, float]]) -> float:
    tokens = sum(score["kept_tokens"] + score["negative_tokens"] for score in scores)
    return math.exp(-sum(score["logp_original"] for score in scores) / tokens)
