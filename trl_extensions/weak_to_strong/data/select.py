"""Choose what the strong model learns from: confident weak labels, or the best of what weak models answered."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.generation.sampling import completion_text
from ..labels.calibrate import confidence


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def keep_confident(
    soft_labels: np.ndarray, share: float, *, class_names: Sequence[str] | None = None, seed: int = 0
) -> tuple[np.ndarray, str]:
    """Keep the most confident share of rows with soft labels `(N, K)`, see `calibrate.confidence`; `seed` decides
    between equal ones. Returns their positions, ascending, and one line for a log.

    Raises:
        ValueError: A share out of range, or a class that is predicted somewhere but in no row that would be kept.
    """
    soft_labels = np.asarray(soft_labels, dtype=np.float64)
    if soft_labels.ndim != 2 or not len(soft_labels):
        raise ValueError(f"soft labels must have the shape (rows >= 1, classes), got {soft_labels.shape}")
    if not 0 < share <= 1:
        raise ValueError(f"`share` is {share!r}; give a share of the rows above 0 and up to 1")
    rows, num_classes = soft_labels.shape
    sure, predicted = confidence(soft_labels), soft_labels.argmax(axis=1)
    order = np.lexsort((np.random.default_rng(seed).permutation(rows), -sure))
    kept = np.sort(order[: max(round(share * rows), 1)])
    names = [str(label) for label in range(num_classes)] if class_names is None else list(class_names)
    if len(lost := np.setdiff1d(predicted, predicted[kept])):
        raise ValueError(
            f"class {names[lost[0]]!r}, predicted for {int((predicted == lost[0]).sum())} of {rows} rows, would not "
            "be kept at all; keep a larger share"
        )
    counts = np.bincount(predicted[kept], minlength=num_classes)
    classes = ", ".join(f"{count} {name!r}" for name, count in zip(names, counts, strict=True))
    return kept, (
        f"kept {len(kept)} of {rows} rows ({classes}), each of confidence {sure[kept].min():.2f} or more; dropped "
        f"{rows - len(kept)}; how many of the kept labels are right is not known"
    )


_REMEDIES = {
    "empty": "let the models write more, or look at how they are prompted",
    "truncated": "raise `max_new_tokens`, or set `keep_truncated`, as for text that is to be continued",
    "short": "lower `min_tokens`",
    "unscored": "look at `failures` in the rows, and use another scorer",
    "beyond_threshold": "loosen `threshold`, or check `higher_is_better`",
}


@dataclass(frozen=True)
class KeepReport:
    """What `keep_rows` kept, and reason -> answers dropped for it, each counted once, in the order in which the
    reasons are looked at; weak model -> its `rows`, those `kept`, and its `share` of all kept; mean score of all and
    of the kept.
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
    keep_truncated: bool = False,
) -> tuple[list[dict[str, Any]], KeepReport]:
    """Choose the answers to train on.

    The answers of all models to a prompt compete with each other; of answers to one prompt that are equal but for
    white space only one is kept. Rows of equal score are put in an order that depends on their ids alone, so that no
    model and no prompt has the advantage of coming first.

    Args:
        rows: Rows with `id`, `prompt`, `completion` and `scores`, as `score.score_rows` writes them; `model`,
            `truncated` and `num_tokens` are used where they exist.
        scorer, higher_is_better: Which of the `scores` decides, and which way.
        threshold: Keep only scores that are at least (or, if lower is better, at most) this.
        best_of: Keep only so many answers a prompt, the best ones.
        budget: Keep only so many answers in all, the best ones.
        min_tokens: Drop answers of fewer tokens.
        keep_truncated: Keep answers that were cut off by the token limit, as continuations of so many tokens always
        are.

    Returns:
        The kept rows, unchanged and in the order given, and the report.

    Raises:
        ValueError: A number out of range, a row without what is asked of it, or nothing left.
    """
    for name, value in (("best_of", best_of), ("budget", budget)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; give at least 1, or none for no limit")
    if min_tokens < 0:
        raise ValueError(f"`min_tokens` is {min_tokens}; give 0 or more")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("`threshold` is nan; give a number")
    sign = 1.0 if higher_is_better else -1.0
    scores = [_score(row, scorer) for row in rows]
    dropped = Counter(dict.fromkeys(_REMEDIES, 0))
    order = []
    for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
        if reason := _reason(row, score, sign, threshold, min_tokens, keep_truncated):
            dropped[reason] += 1
        else:
            order.append(place)
    if not order:
        raise ValueError(_nothing_left(dropped, scorer, scores))
    order.sort(key=lambda place: (-sign * scores[place], hashlib.sha256(str(rows[place]["id"]).encode()).hexdigest()))
    prompts = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    answers = [(prompts[place], " ".join(completion_text(rows[place]["completion"]).split())) for place in order]
    order = _first_of_each(order, answers, 1, "duplicate", dropped)
    if best_of is not None:
        order = _first_of_each(order, [prompts[place] for place in order], best_of, "outranked", dropped)
    if budget is not None:
        dropped["over_budget"] = max(len(order) - budget, 0)
        order = order[:budget]
    kept, before = sorted(order), [score for score in scores if score is not None]
    report = KeepReport(
        scorer=scorer,
        rows=len(rows),
        kept=len(kept),
        prompts=len(set(prompts)),
        prompts_kept=len({prompts[place] for place in kept}),
        dropped=dict(dropped),
        models=_by_model(rows, kept),
        mean_before=sum(before) / len(before),
        mean_kept=sum(scores[place] for place in kept) / len(kept),
    )
    return [rows[place] for place in kept], report


def to_sft_dataset(rows: Iterable[dict[str, Any]]) -> Dataset:
    """Rows with `prompt` and `completion`, all of them chats or all of them texts, as a data set for SFT; with
    `weight` where rows have one."""
    from datasets import Dataset

    rows = _training_rows(rows)
    columns = ("prompt", "completion", *(["weight"] if any("weight" in row for row in rows) else []))
    for row in rows:
        kinds = {column: isinstance(row[column], str) for column in ("prompt", "completion")}
        kinds["first prompt"] = isinstance(rows[0]["prompt"], str)
        if len(set(kinds.values())) > 1:
            named = ", ".join(f"{name}: {'text' if text else 'chat'}" for name, text in kinds.items())
            raise ValueError(f"row {row.get('id')!r} mixes texts and chats ({named}); give rows of one kind")
    return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])


def to_continuations(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Kept continuations of plain texts as tokens that teach no ending where the token limit made one.

    TRL ends every plain completion with the end token. A strong model trained on continuations of n tokens would learn
    to stop after n, and short texts are less toxic for no good reason. Returns `input_ids` and `completion_mask`, as
    TRL's `SFTTrainer` takes them with `completion_only_loss`, and `weight` where rows have one.
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
        record = {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
        records.append(record | ({"weight": row.get("weight")} if weighted else {}))
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
    keep_truncated: bool,
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
    if row.get("truncated") and not keep_truncated:
        return "truncated"
    if min_tokens and "num_tokens" not in row:
        raise ValueError(f"row {row['id']!r} has no `num_tokens`, which `min_tokens` needs; leave `min_tokens` out")
    if min_tokens and row["num_tokens"] < min_tokens:
        return "short"
    if score is None:
        return "unscored"
    return "beyond_threshold" if threshold is not None and sign * score < sign * threshold else None


def _first_of_each(order: list[int], keys: list[Any], most: int, reason: str, dropped: Counter[str]) -> list[int]:
    """The first `most` places of each key; the others are counted."""
    taken: Counter[Any] = Counter()
    kept = []
    for place, key in zip(order, keys, strict=True):
        taken[key] += 1
        if taken[key] <= most:
            kept.append(place)
    dropped[reason] = len(order) - len(kept)
    return kept


def _by_model(rows: Sequence[dict[str, Any]], kept: list[int]) -> dict[str, dict[str, float]]:
    given = Counter(row["model"] for row in rows if "model" in row)
    chosen = Counter(rows[place]["model"] for place in kept if "model" in rows[place])
    return {
        model: {"rows": given[model], "kept": chosen[model], "share": chosen[model] / len(kept)}
        for model in sorted(given)
    }


def _nothing_left(dropped: Counter[str], scorer: str, scores: list[float | None]) -> str:
    if not scores:
        return "no rows to choose from; sample and score answers first"
    given = [score for score in scores if score is not None]
    seen = f" ({scorer!r} gave {min(given):.3g} to {max(given):.3g})" if given else ""
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"none of {len(scores)} answers is left: {counts}{seen}; {_REMEDIES[dropped.most_common(1)[0][0]]}"
