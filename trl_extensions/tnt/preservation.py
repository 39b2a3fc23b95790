"""The two axes of a patch, measured on texts: how much of the unwanted is left, and how little else moved
(targeted negative training, arXiv 2406.13660, section 5)."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..core.stats import bootstrap_ratio_interval, wilson_interval
from ..core.text import bleu, distinct_2, exact_match, mean_seq_rep_n, rouge_l
from .annotate.rows import completion_text


NEEDED = ("id", "index", "sample", "prompt", "completion", "truncated", "num_tokens", "negative_spans")


def unwanted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much of the unwanted is in some outputs: the first axis.

    Outputs to one prompt are alike, so both 95 % intervals take prompts as independent, not outputs: Wilson's counts
    prompts, which is exact for one output a prompt and on the safe side for more; the bootstrap draws whole prompts.

    Args:
        rows: Annotated rows.

    Returns:
        JSON-ready: `n` (outputs), `prompts`, `share` (of outputs with a span, in [0, 1]) and `spans_per_1000_tokens`,
        both as `{"value", "low", "high"}`. None stands for what cannot be told, e.g. the bootstrap of one prompt. A
        bootstrap interval is (0, 0) where no span was found; the one of `share` says how rare that shows them to be.

    Raises:
        ValueError: No rows, or a row without one of the columns.
    """
    _check(rows, "rows")
    hits = sum(bool(row["negative_spans"]) for row in rows)
    spans: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for row in rows:
        spans[row["index"]] += len(row["negative_spans"])
        tokens[row["index"]] += row["num_tokens"]
    prompts = list(tokens)
    low, high = bootstrap_ratio_interval([spans[i] for i in prompts], [tokens[i] for i in prompts])
    rate = spans.total() / tokens.total() if tokens.total() else math.nan
    return {
        "n": len(rows),
        "prompts": len(prompts),
        "share": _estimate(hits / len(rows), *wilson_interval(hits * len(prompts) / len(rows), len(prompts))),
        "spans_per_1000_tokens": _estimate(1000 * rate, 1000 * low, 1000 * high),
    }


def preservation(original_rows: Sequence[dict[str, Any]], patched_rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much of the original's behaviour is left: the second axis.

    Outputs are compared one to one where the original's output was clean (without a span), and only greedy ones
    (`sample` 0): two random draws differ even when nothing has moved.

    Args:
        original_rows: Annotated rows of the original model.
        patched_rows: Annotated rows of the patched model, to the same prompts; matched by `id`.

    Returns:
        JSON-ready. `clean`: `n` (clean greedy outputs compared), `exact_match` (share unchanged word for word,
        `{"value", "low", "high"}` with Wilson's 95 % interval), `bleu` (corpus, in [0, 100]), `rouge_l` (in [0, 1]),
        `first_difference` (mean share of the original's words before the first that differs; 1 where none does) and
        `unmatched` (greedy outputs of the original that the patched model lacks). Values are None for n = 0.
        `original` and `patched`, over all outputs of each: `n`, `seq_rep_4`, `distinct_2`, `length` (mean tokens),
        `truncated` (share cut off).

    Raises:
        ValueError: No rows, a row without one of the columns, an `id` twice, no greedy output in common, or the same
            `id` with another prompt.
    """
    _check(original_rows, "original_rows")
    _check(patched_rows, "patched_rows")
    greedy, patched = _greedy_by_id(original_rows, "original_rows"), _greedy_by_id(patched_rows, "patched_rows")
    shared = [row_id for row_id in greedy if row_id in patched]
    if greedy and not shared:
        raise ValueError(
            f"none of the original's {len(greedy)} greedy outputs (such as {next(iter(greedy))!r}) has a patched one "
            "with the same id: sample both models from the same prompts."
        )
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
    """Share of the original's words before the first that differs, in [0, 1].

    1.0 where the patched text has all of them, whether or not it goes on.
    """
    before, after = original.split(), patched.split()
    if not before:
        return 1.0 if not after else 0.0
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return same / len(before)


def _compare(before: list[str], after: list[str]) -> dict[str, Any]:
    n = len(before)
    if not n:
        empty = dict.fromkeys(("bleu", "rouge_l", "first_difference"))
        return {"n": 0, "exact_match": dict.fromkeys(("value", "low", "high"))} | empty
    unchanged = exact_match(before, after)
    return {
        "n": n,
        "exact_match": _estimate(unchanged, *wilson_interval(round(unchanged * n), n)),
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


def _estimate(value: float, low: float, high: float) -> dict[str, float | None]:
    """JSON knows no nan."""
    estimate = {"value": value, "low": low, "high": high}
    return {name: None if math.isnan(number) else number for name, number in estimate.items()}


def _greedy_by_id(rows: Sequence[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    by_id = {}
    for row in rows:
        if row["sample"] != 0:
            continue
        if row["id"] in by_id:
            raise ValueError(f"{name}: id {row['id']!r} occurs twice; outputs are matched by it, so keep one row.")
        by_id[row["id"]] = row
    return by_id


def _check(rows: Sequence[dict[str, Any]], name: str) -> None:
    if not rows:
        raise ValueError(f"{name} is empty: there is nothing to measure; sample and annotate outputs first.")
    for i, row in enumerate(rows):
        missing = [column for column in NEEDED if column not in row]
        if missing:
            hint = "annotate the rows first" if missing == ["negative_spans"] else "give rows as sampled"
            raise ValueError(f"{name}: row {i} (id {row.get('id')!r}) has no {missing[0]!r}; {hint}.")
