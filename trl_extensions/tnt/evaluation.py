"""Two axes, always both, on held-out prompts: how much of the unwanted is left, and how little else moved
(arXiv 2406.13660, section 5)."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core.generation.sampling import completion_text
from ..core.runs.report import write_atomically
from ..core.stats import bootstrap_ratio, wilson
from ..core.text import bleu, distinct_2, exact_match, mean_seq_rep_n, rouge_l
from .scores import perplexity, score_rows


NEEDED = ("id", "index", "sample", "prompt", "completion", "truncated", "num_tokens", "negative_spans")


def evaluate_patch(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, original_rows: list[dict[str, Any]],
    patched_rows: list[dict[str, Any]], output: Path, *, original: nn.Module | None = None, batch_tokens: int = 4096,
) -> dict[str, Any]:  # fmt: skip
    """Compare a patched model with its original (see `scores.score_rows`) on annotated outputs of both to the same
    held-out prompts, greedy (`sample` 0) and random ones, and write the result as JSON to `output`.

    Returns:
        What was written. `original` and `patched`: `unwanted` of `greedy` and of `sampled` outputs, where there are
        any. `preservation`: see there. `divergence`, over the original's outputs: `kl_target` (KL(d || p) to the ideal
        target) and `kl_clean` (KL(q || p), of outputs without a span), nats per token, 95 % intervals over outputs;
        `prob_negative`, `prob_negative_original`: mean probability of the unwanted tokens that the original wrote,
        None without one. `perplexity` under the original of the greedy outputs: `original` and `patched`.
        `candidates`: see `residual`.
    """
    settings: dict[str, Any] = {"original": original, "batch_tokens": batch_tokens}
    all_greedy = ([row for row in rows if row["sample"] == 0] for rows in (original_rows, patched_rows))
    greedy, patched = _written(original_rows), _written(patched_rows)
    scores = score_rows(model, tokenizer, greedy, **settings)
    clean = [score for score, row in zip(scores, greedy, strict=True) if not row["negative_spans"]]
    tokens = [score["kept_tokens"] + score["negative_tokens"] for score in scores]
    total = {name: sum(score[name] for score in scores) for name in scores[0]}
    negative = total["negative_tokens"] or math.nan
    result = {
        "original": _by_kind(original_rows),
        "patched": _by_kind(patched_rows),
        "candidates": residual(*all_greedy),
        "preservation": preservation(original_rows, patched_rows),
        "divergence": {
            "kl_target": _ratio([score["kl_target"] for score in scores], tokens),
            "kl_clean": _ratio([score["kl_kept"] for score in clean], [score["kept_tokens"] for score in clean]),
            "prob_negative": _or_none(total["prob_negative"] / negative),
            "prob_negative_original": _or_none(total["prob_negative_original"] / negative),
        },
        "perplexity": {
            "original": math.exp(-total["logp_original"] / sum(tokens)),
            "patched": perplexity(model, tokenizer, patched, **settings),
        },
    }
    write_atomically(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _written(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    written = [row for row in rows if row["sample"] == 0 and completion_text(row["completion"]).strip()]
    if not written:
        remedy = "if the model has collapsed, train for fewer steps, or with a smaller learning rate or alpha"
        raise ValueError(f"none of {len(rows)} held-out outputs is a greedy one with text: {remedy}.")
    return written


def _by_kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {"greedy": [row for row in rows if row["sample"] == 0], "sampled": [row for row in rows if row["sample"]]}
    return {kind: unwanted(own) for kind, own in kinds.items() if own}


def unwanted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much of the unwanted is in some outputs, the first axis: `n` (outputs), `prompts`, `share` (of outputs with
    a span, in [0, 1]), `severity` (of what is worst in an output, 1 where nobody said and 0 in a clean one; mean) and
    `spans_per_1000_tokens`, each as `{"value", "low", "high"}`, None where it cannot be told.

    Outputs to one prompt are alike, so both 95 % intervals take prompts as independent, not outputs: Wilson's counts
    prompts, which is exact for one output a prompt and on the safe side for more; the bootstrap draws whole prompts.
    Its interval is (0, 0) where no span was found; the one of `share` says how rare that shows them to be.
    """
    _check(rows, "rows")
    share = sum(bool(row["negative_spans"]) for row in rows) / len(rows)
    spans, tokens, outputs = Counter[int](), Counter[int](), Counter[int]()
    severity: defaultdict[int, float] = defaultdict(float)
    for row in rows:
        outputs[row["index"]] += 1
        severity[row["index"]] += _worst(row)
        spans[row["index"]] += len(row["negative_spans"])
        tokens[row["index"]] += row["num_tokens"]
    prompts = list(tokens)
    return {
        "n": len(rows),
        "prompts": len(prompts),
        "share": _estimate(share, *wilson(share * len(prompts), len(prompts))),
        "severity": _ratio([severity[i] for i in prompts], [outputs[i] for i in prompts]),
        "spans_per_1000_tokens": _ratio([1000 * spans[i] for i in prompts], [tokens[i] for i in prompts]),
    }


def _worst(row: dict[str, Any]) -> float:
    severities = [mark.get("severity") or 1.0 for mark in row.get("annotations") or ()]
    return max(severities, default=1.0) if row["negative_spans"] else 0.0


def residual(original_rows: Sequence[dict[str, Any]], patched_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is left of everything unwanted, by label (a phrase, a candidate, a class, as in `annotations`): `label`,
    `severity`, and the share of outputs with it, `original` and `patched`, as `{"value", "low", "high"}`. First what
    was worst, by severity times outputs."""
    found: dict[str, list[int]] = {}
    severities: dict[str, float] = {}
    for side, rows in enumerate((original_rows, patched_rows)):
        for row in rows:
            marks = {mark["label"]: mark.get("severity") or 1.0 for mark in row.get("annotations") or ()}
            severities |= marks
            for label in marks:
                found.setdefault(label, [0, 0])[side] += 1
    sizes = len(original_rows), len(patched_rows)
    shares = {
        label: [_estimate(k / n, *wilson(k, n)) for k, n in zip(counts, sizes, strict=True)]
        for label, counts in found.items()
    }
    order = sorted(found, key=lambda label: -severities[label] * found[label][0])
    named = [dict(zip(("original", "patched"), shares[label], strict=True)) for label in order]
    return [{"label": label, "severity": severities[label], **own} for label, own in zip(order, named, strict=True)]


def preservation(original_rows: Sequence[dict[str, Any]], patched_rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much of the original's behaviour is left: the second axis.

    Outputs, matched by `id`, are compared one to one where the original's output was clean (without a span), and only
    greedy ones (`sample` 0): two random draws differ even when nothing has moved.

    Returns:
        `clean`: `n` (clean greedy outputs compared), `exact_match` (share unchanged word for word, with Wilson's 95 %
        interval), `bleu` (corpus, in [0, 100]), `rouge_l` (in [0, 1]), `first_difference` (see there, mean) and
        `unmatched` (greedy outputs of the original that the patched model lacks). Values are None for n = 0.
        `original` and `patched`, over all outputs of each: `n`, `seq_rep_4`, `distinct_2`, `length` (mean tokens),
        `truncated` (share cut off).
    """
    greedy, patched = _greedy_by_id(original_rows, "original_rows"), _greedy_by_id(patched_rows, "patched_rows")
    shared = [row_id for row_id in greedy if row_id in patched]
    if greedy and not shared:
        alone = f"none of the original's {len(greedy)} greedy outputs (such as {next(iter(greedy))!r})"
        raise ValueError(f"{alone} has a patched one of its id: sample both models from the same prompts.")
    for row_id in shared:
        if greedy[row_id]["prompt"] != patched[row_id]["prompt"]:
            raise ValueError(f"row {row_id!r}: the prompt differs between the two models; sample both from the same.")
    clean = [row_id for row_id in shared if not greedy[row_id]["negative_spans"]]
    before = [completion_text(greedy[row_id]["completion"]) for row_id in clean]
    after = [completion_text(patched[row_id]["completion"]) for row_id in clean]
    return {
        "clean": _compare(before, after) | {"unmatched": len(greedy) - len(shared)},
        "original": _describe(original_rows),
        "patched": _describe(patched_rows),
    }


def first_difference(original: str, patched: str) -> float:
    """Share of the original's words before the first that differs, in [0, 1]; 1 where it has them all."""
    before, after = original.split(), patched.split()
    if not before:
        return float(not after)
    words = enumerate(zip(before, after, strict=False))
    same = next((i for i, (a, b) in words if a != b), min(len(before), len(after)))
    return same / len(before)


def _compare(before: list[str], after: list[str]) -> dict[str, Any]:
    n = len(before)
    if not n:
        empty = dict.fromkeys(("bleu", "rouge_l", "first_difference"))
        return {"n": 0, "exact_match": dict.fromkeys(("value", "low", "high"))} | empty
    unchanged = exact_match(before, after)
    return {
        "n": n,
        "exact_match": _estimate(unchanged, *wilson(round(unchanged * n), n)),
        "bleu": bleu(after, before),
        "rouge_l": rouge_l(after, before),
        "first_difference": sum(map(first_difference, before, after)) / n,
    }


def _describe(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    texts = [completion_text(row["completion"]) for row in rows]
    return {
        "n": len(rows),
        "seq_rep_4": mean_seq_rep_n(texts, 4),
        "distinct_2": distinct_2(texts),
        "length": sum(row["num_tokens"] for row in rows) / len(rows),
        "truncated": sum(bool(row["truncated"]) for row in rows) / len(rows),
    }


def _ratio(numerators: list[float], denominators: list[float]) -> dict[str, float | None]:
    """Sum over sum with its bootstrap interval over entries."""
    total = sum(denominators)
    return _estimate(sum(numerators) / total if total else math.nan, *bootstrap_ratio(numerators, denominators))


def _estimate(value: float, low: float, high: float) -> dict[str, float | None]:
    return {"value": _or_none(value), "low": _or_none(low), "high": _or_none(high)}


def _or_none(number: float) -> float | None:
    """JSON knows no nan."""
    return None if math.isnan(number) else number


def _greedy_by_id(rows: Sequence[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    _check(rows, name)
    by_id: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["sample"] == 0 and by_id.setdefault(row["id"], row) is not row:
            raise ValueError(f"{name}: id {row['id']!r} occurs twice; outputs are matched by it, so keep one row.")
    return by_id


def _check(rows: Sequence[dict[str, Any]], name: str) -> None:
    if not rows:
        raise ValueError(f"{name} is empty: there is nothing to measure; sample and annotate outputs first.")
    for i, row in enumerate(rows):
        if missing := [column for column in NEEDED if column not in row]:
            raise ValueError(f"{name}: row {i} (id {row.get('id')!r}) has no {missing[0]!r}; annotate outputs.")
