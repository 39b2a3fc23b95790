"""Keep the best of what weak models answered: filter by score, rank the answers to each prompt, and count the rest."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.generation.sampling import completion_text


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_REMEDIES = {
    "empty": "let the models write more, or look at how they are prompted",
    "truncated": "raise `max_new_tokens`, or set `drop_truncated` to false, as for text that is to be continued",
    "short": "lower `min_tokens`",
    "unscored": "look at `failures` in the rows, and use another scorer",
    "beyond_threshold": "loosen `threshold`, or check `higher_is_better`",
}


@dataclass(frozen=True)
class KeepReport:
    """What `keep_rows` kept and why it dropped the rest.

    Args:
        scorer (`str`): Whose scores decided.
        rows (`int`): Rows given.
        kept (`int`): Rows kept.
        prompts (`int`): Distinct prompts in the rows given.
        prompts_kept (`int`): Distinct prompts of which a row is kept.
        dropped (`dict[str, int]`): Reason -> rows dropped for it, in the order in which the reasons are looked at; a
            row counts once. `empty`, `truncated`, `short` (fewer than `min_tokens`), `unscored`, `beyond_threshold`,
            `duplicate` (of a kept answer to the same prompt), `outranked` (not among the best of its prompt) and
            `over_budget`.
        models (`dict[str, dict[str, float]]`): Weak model -> its `rows`, how many of them are `kept`, and its `share`
            of all kept rows, in [0, 1]. Empty if rows have no `model`.
        mean_before (`float`): Mean score of all rows with one.
        mean_kept (`float`): Mean score of the kept rows.
    """

    scorer: str
    rows: int
    kept: int
    prompts: int
    prompts_kept: int
    dropped: dict[str, int]
    models: dict[str, dict[str, float]]
    mean_before: float
    mean_kept: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count) or "none"
        parts = [
            f"{self.kept} of {self.rows} answers kept, to {self.prompts_kept} of {self.prompts} prompts",
            f"dropped: {reasons}",
            f"mean {self.scorer} {self.mean_before:.3g} -> {self.mean_kept:.3g}",
        ]
        if len(self.models) > 1:
            parts.append(", ".join(f"{model}: {entry['share']:.0%}" for model, entry in self.models.items()))
        return "; ".join(parts)


def keep_rows(
    rows: Sequence[dict[str, Any]],
    *,
    scorer: str,
    higher_is_better: bool,
    threshold: float | None = None,
    best_of: int | None = None,
    budget: int | None = None,
    min_tokens: int = 0,
    drop_truncated: bool = True,
    drop_duplicates: bool = True,
) -> tuple[list[dict[str, Any]], KeepReport]:
    """Choose the answers to train on.

    The answers of all models to a prompt compete with each other. Rows of equal score are put in an order that
    depends on their ids alone, so that no model and no prompt has the advantage of coming first.

    Args:
        rows: Rows with `id`, `prompt`, `completion` and `scores`, as `scoring.score_rows` writes them; `model`,
            `truncated` and `num_tokens` are used where they exist.
        scorer: Which of the `scores` decides.
        higher_is_better: Whether the best score is the highest; a scorer's attribute of that name.
        threshold: Keep only scores that are at least (or, if lower is better, at most) this.
        best_of: Rank: keep only so many answers a prompt, the best ones.
        budget: Keep only so many answers in all, the best ones.
        min_tokens: Drop answers of fewer tokens.
        drop_truncated: Drop answers that were cut off by the token limit. A continuation of so many tokens is always
            cut off: set it to false there.
        drop_duplicates: Of answers to one prompt that are equal but for white space, keep only one.

    Returns:
        The kept rows, unchanged and in the order given, and the report.

    Raises:
        ValueError: A number out of range, a row without what is asked of it (the message names it), or nothing left
            (the message says what to change).
    """
    _check_numbers(threshold, best_of, budget, min_tokens)
    sign = 1.0 if higher_is_better else -1.0
    scores = [_score(row, scorer) for row in rows]
    rules = (sign, threshold, min_tokens, drop_truncated)
    reasons = [_reason(row, score, *rules) for row, score in zip(rows, scores, strict=True)]
    dropped = Counter({reason: reasons.count(reason) for reason in _REMEDIES})
    order = [place for place, reason in enumerate(reasons) if reason is None]
    if not order:
        raise ValueError(_nothing_left(dropped, scorer, scores))
    order.sort(key=lambda place: (-sign * scores[place], _tie(rows[place]["id"])))
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    if drop_duplicates:
        order = _distinct(order, rows, keys, dropped)
    if best_of is not None:
        order = _best(order, keys, best_of, dropped)
    if budget is not None:
        dropped["over_budget"] = max(len(order) - budget, 0)
        order = order[:budget]
    kept = sorted(order)
    return [rows[place] for place in kept], _report(rows, keys, scorer, scores, kept, dropped)


def to_sft_dataset(
    rows: Iterable[dict[str, Any]],
    *,
    weight_by: str | None = None,
    worst: float = 0.0,
    best: float = 1.0,
) -> Dataset:
    """Turn kept rows into a data set for `WeakToStrongSFTTrainer` or TRL's `SFTTrainer`.

    Args:
        rows: Rows with `prompt` and `completion`, all of them chats or all of them texts; a `weight` is kept.
        weight_by: A scorer, by whose scores the rows are weighted instead.
        worst, best: The scores that weigh 0 and 1; those in between weigh (score - worst) / (best - worst). For a
            probability of something unwanted `worst=1.0, best=0.0`, for a judge `worst=1.0, best=10.0`.

    Returns:
        Columns `prompt` and `completion`, and `weight` where rows have one or with `weight_by` (then in [0, 1]).

    Raises:
        ValueError: No rows, a row without one of the columns, chats mixed with texts, or a score that is missing or
            not between worst and best; the message names the row.
    """
    from datasets import Dataset

    if worst == best:
        raise ValueError(f"`worst` and `best` are both {best}; give two different scores")
    rows = _training_rows(rows)
    weighted = any("weight" in row for row in rows)
    records: list[dict[str, Any]] = []
    for row in rows:
        kinds = {column: isinstance(row[column], str) for column in ("prompt", "completion")}
        kinds["first prompt"] = isinstance(records[0]["prompt"], str) if records else kinds["prompt"]
        if len(set(kinds.values())) > 1:
            named = ", ".join(f"{name}: {'text' if text else 'chat'}" for name, text in kinds.items())
            raise ValueError(f"row {row.get('id')!r} mixes texts and chats ({named}); give rows of one kind")
        record = {"prompt": row["prompt"], "completion": row["completion"]}
        if weight_by is not None:
            record["weight"] = _weight(row, weight_by, worst, best)
        elif weighted:
            record["weight"] = row.get("weight")
        records.append(record)
    if weight_by is not None and not any(record["weight"] for record in records):
        raise ValueError(f"all {len(records)} rows weigh 0: every score of {weight_by!r} is {worst}; exchange them?")
    return Dataset.from_list(records)


def to_continuations(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Turn kept continuations of plain prompts into tokens that teach no ending where the token limit made one.

    TRL ends every plain completion with the end token. A strong model trained on continuations of n tokens would learn
    to stop after n, and short texts are less toxic for no good reason.

    Args:
        rows: Rows with the texts `prompt` and `completion`, and `truncated` where that is known; a `weight` is kept.
        tokenizer: The strong model's.

    Returns:
        Columns `input_ids` and `completion_mask`, as TRL's `SFTTrainer` takes them with `completion_only_loss`, and
        `weight` where rows have one.

    Raises:
        ValueError: No rows, a row without one of the columns, or a chat; the message names the row.
    """
    from datasets import Dataset

    rows = _training_rows(rows)
    weighted = any("weight" in row for row in rows)
    records = []
    for row in rows:
        if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
            raise ValueError(f"row {row.get('id')!r} is a chat; continuations are of plain texts: drop truncated rows")
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if not row.get("truncated", True):
            completion = [*completion, tokenizer.eos_token_id]
        records.append({
            "input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion),
        } | ({"weight": row.get("weight")} if weighted else {}))  # fmt: skip
    return Dataset.from_list(records)


def _training_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to train on; keep more")
    for place, row in enumerate(rows):
        missing = [column for column in ("prompt", "completion") if row.get(column) is None]
        if missing:
            raise ValueError(
                f"row {row.get('id', place)!r} has no `{missing[0]}`, only {sorted(row)}; rows to train on need "
                "`prompt` and `completion`"
            )
    return rows


def _weight(row: dict[str, Any], scorer: str, worst: float, best: float) -> float:
    score = _score(row, scorer)
    if score is None or not min(worst, best) <= score <= max(worst, best):
        raise ValueError(
            f"row {row['id']!r} has the score {score} by {scorer!r}, which is not between `worst` {worst} and `best` "
            f"{best}; set them to the ends of the scorer's range"
        )
    return (score - worst) / (best - worst)


def _check_numbers(threshold: float | None, best_of: int | None, budget: int | None, min_tokens: int) -> None:
    for name, value in (("best_of", best_of), ("budget", budget)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; give at least 1, or none for no limit")
    if min_tokens < 0:
        raise ValueError(f"`min_tokens` is {min_tokens}; give 0 or more")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("`threshold` is nan; give a number")


def _score(row: dict[str, Any], scorer: str) -> float | None:
    scores = row.get("scores") or {}
    if scorer not in scores:
        raise ValueError(
            f"row {row.get('id')!r} has no score by {scorer!r}, only {sorted(scores) or 'none at all'}; score it, or "
            "name another scorer"
        )
    score = scores[scorer]
    if score is not None and not math.isfinite(score):
        raise ValueError(
            f"row {row.get('id')!r} has the score {score} by {scorer!r}; a score is a finite number or None"
        )
    return score


def _reason(
    row: dict[str, Any],
    score: float | None,
    sign: float,
    threshold: float | None,
    min_tokens: int,
    drop_truncated: bool,
) -> str | None:
    """Why a row is dropped whatever the other rows are; the first of the reasons in `_REMEDIES`."""
    missing = [column for column in ("id", "prompt", "completion") if column not in row]
    if missing:
        raise ValueError(f"row {row.get('id')!r} has no `{missing[0]}`, only {sorted(row)}; name the column so")
    try:
        text = completion_text(row["completion"])
    except ValueError as error:
        raise ValueError(f"row {row['id']!r}: {error}") from None
    if not text.strip():
        return "empty"
    if drop_truncated and row.get("truncated"):
        return "truncated"
    if min_tokens and "num_tokens" not in row:
        raise ValueError(f"row {row['id']!r} has no `num_tokens`, which `min_tokens` needs; leave `min_tokens` out")
    if min_tokens and row["num_tokens"] < min_tokens:
        return "short"
    if score is None:
        return "unscored"
    return "beyond_threshold" if threshold is not None and sign * score < sign * threshold else None


def _tie(row_id: Any) -> str:
    return hashlib.sha256(str(row_id).encode()).hexdigest()


def _distinct(order: list[int], rows: Sequence[dict[str, Any]], keys: list[str], dropped: Counter[str]) -> list[int]:
    seen: set[tuple[str, str]] = set()
    kept = []
    for place in order:
        answer = (keys[place], " ".join(completion_text(rows[place]["completion"]).split()))
        if answer not in seen:
            seen.add(answer)
            kept.append(place)
    dropped["duplicate"] = len(order) - len(kept)
    return kept


def _best(order: list[int], keys: list[str], best_of: int, dropped: Counter[str]) -> list[int]:
    taken: Counter[str] = Counter()
    kept = []
    for place in order:
        if taken[keys[place]] < best_of:
            taken[keys[place]] += 1
            kept.append(place)
    dropped["outranked"] = len(order) - len(kept)
    return kept


def _report(
    rows: Sequence[dict[str, Any]],
    keys: list[str],
    scorer: str,
    scores: list[float | None],
    kept: list[int],
    dropped: Counter[str],
) -> KeepReport:
    before = [score for score in scores if score is not None]
    return KeepReport(
        scorer=scorer,
        rows=len(rows),
        kept=len(kept),
        prompts=len(set(keys)),
        prompts_kept=len({keys[place] for place in kept}),
        dropped=dict(dropped),
        models=_by_model(rows, kept),
        mean_before=sum(before) / len(before),
        mean_kept=sum(scores[place] for place in kept) / len(kept),
    )


def _by_model(rows: Sequence[dict[str, Any]], kept: list[int]) -> dict[str, dict[str, float]]:
    numbers: defaultdict[str, dict[str, float]] = defaultdict(lambda: {"rows": 0, "kept": 0, "share": 0.0})
    for row in rows:
        if "model" in row:
            numbers[row["model"]]["rows"] += 1
    for place in kept:
        if "model" in rows[place]:
            numbers[rows[place]["model"]]["kept"] += 1
    for entry in numbers.values():
        entry["share"] = entry["kept"] / len(kept)
    return dict(sorted(numbers.items()))


def _nothing_left(dropped: Counter[str], scorer: str, scores: list[float | None]) -> str:
    if not scores:
        return "no rows to choose from; sample and score answers first"
    given = [score for score in scores if score is not None]
    seen = f" ({scorer!r} gave {min(given):.3g} to {max(given):.3g})" if given else ""
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"none of {len(scores)} answers is left: {counts}{seen}; {_REMEDIES[dropped.most_common(1)[0][0]]}"
