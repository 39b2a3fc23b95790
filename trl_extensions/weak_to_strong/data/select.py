"""Choose what the strong model learns from: confident weak labels, or the best of what weak models answered."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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
        said = f"class {names[lost[0]]!r}, predicted for {int((predicted == lost[0]).sum())} of {rows} rows"
        raise ValueError(f"{said}, would not be kept at all; keep a larger share")
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
        parts = [
            f"{self.kept} of {self.rows} answers kept, to {self.prompts_kept} of {self.prompts} prompts",
            f"dropped: {_listed(self.dropped) or 'none'}",
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

    Without `threshold`, `best_of` and `budget` no score decides anything, and all answers with text are kept. The
    answers of all models to a prompt compete with each other; of answers to one prompt that are equal but for
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
    for name, limit, least in (("best_of", best_of, 1), ("budget", budget, 1), ("min_tokens", min_tokens, 0)):
        if limit is not None and limit < least:
            raise ValueError(f"`{name}` is {limit}; give at least {least}, or leave it out for no limit")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("`threshold` is nan; give a number")
    if not rows:
        raise ValueError("no rows to choose from; sample and score answers first")
    sign = 1.0 if higher_is_better else -1.0
    chooses = any(limit is not None for limit in (threshold, best_of, budget))
    dropped = Counter(dict.fromkeys(_REMEDIES, 0))
    given: list[float] = []
    ranked: list[tuple[float, str, int]] = []  # the best first, equal ones by their ids
    for place, row in enumerate(rows):
        text, score = _text_and_score(row, scorer, min_tokens)
        if score is not None:
            given.append(score)
        if not text.strip():
            dropped["empty"] += 1
        elif row.get("truncated") and not keep_truncated:
            dropped["truncated"] += 1
        elif min_tokens and row["num_tokens"] < min_tokens:
            dropped["short"] += 1
        elif score is None and chooses:
            dropped["unscored"] += 1
        elif threshold is not None and score is not None and sign * score < sign * threshold:
            dropped["beyond_threshold"] += 1
        else:
            ranked.append((-sign * (score or 0.0), hashlib.sha256(str(row["id"]).encode()).hexdigest(), place))
    if not ranked:
        seen = f" ({scorer!r} gave {min(given):.3g} to {max(given):.3g})" if given else ""
        counts, remedy = _listed(dropped), _REMEDIES[dropped.most_common(1)[0][0]]
        raise ValueError(f"none of {len(rows)} answers is left: {counts}{seen}; {remedy}")
    order = [place for _, _, place in sorted(ranked)]
    prompts = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    answers = {place: " ".join(completion_text(rows[place]["completion"]).split()) for place in order}
    distinct = _first_of_each(order, lambda place: (prompts[place], answers[place]), 1)
    dropped["duplicate"], order = len(order) - len(distinct), distinct
    if best_of is not None:
        best = _first_of_each(order, prompts.__getitem__, best_of)
        dropped["outranked"], order = len(order) - len(best), best
    if budget is not None:
        dropped["over_budget"], order = max(len(order) - budget, 0), order[:budget]
    kept = [rows[place] for place in sorted(order)]
    by_model, chosen = (Counter(row["model"] for row in own if "model" in row) for own in (rows, kept))
    report = KeepReport(
        scorer=scorer,
        rows=len(rows),
        kept=len(kept),
        prompts=len(set(prompts)),
        prompts_kept=len({prompts[place] for place in order}),
        dropped=dict(dropped),
        models={
            model: {"rows": by_model[model], "kept": chosen[model], "share": chosen[model] / len(kept)}
            for model in sorted(by_model)
        },
        mean_before=_mean(given),
        mean_kept=_mean([score for row in kept if (score := row["scores"][scorer]) is not None]),
    )
    return kept, report


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _text_and_score(row: dict[str, Any], scorer: str, min_tokens: int) -> tuple[str, float | None]:
    """What a row is chosen by; a `ValueError` names one that lacks something."""
    name, scores = row.get("id"), row.get("scores") or {}
    if scorer not in scores:
        known = f"only {sorted(scores)}" if scores else "none at all"
        raise ValueError(f"row {name!r} has no score by {scorer!r}, {known}; score it, or name another scorer")
    score = scores[scorer]
    if score is not None and not math.isfinite(score):
        raise ValueError(f"row {name!r} has the score {score} by {scorer!r}; a score is a finite number or None")
    for column in ("id", "prompt", "completion", *(["num_tokens"] if min_tokens else [])):
        if column not in row:
            needed = ", which `min_tokens` needs" if column == "num_tokens" else ""
            raise ValueError(f"row {name!r} has no `{column}`{needed}, only {sorted(row)}")
    try:
        return completion_text(row["completion"]), score
    except ValueError as error:
        raise ValueError(f"row {name!r}: {error}") from None


def _first_of_each(order: list[int], key: Callable[[int], Hashable], most: int) -> list[int]:
    """The first `most` places of each key."""
    taken: Counter[Hashable] = Counter()
    kept = []
    for place in order:
        taken[key(place)] += 1
        if taken[key(place)] <= most:
            kept.append(place)
    return kept


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


def to_sft_dataset(rows: Iterable[dict[str, Any]]) -> Dataset:
    """Rows with `prompt` and `completion`, all of them chats or all of them texts, as a data set for SFT; with
    `weight` where rows have one."""
    from datasets import Dataset

    rows = _training_rows(rows)
    columns = ["prompt", "completion"] + ["weight"] * any("weight" in row for row in rows)
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

    from ...core.training.encoding import encode_prompt
    from .prepare import end_token

    rows = _training_rows(rows)
    weighted = any("weight" in row for row in rows)
    records = []
    for row in rows:
        if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
            raise ValueError(f"row {row.get('id')!r} is a chat; continuations are of plain texts: drop truncated rows")
        prompt = encode_prompt(tokenizer, row["prompt"], f"prompt of row {row.get('id')!r}")
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if not row.get("truncated", True):
            completion = [*completion, tokenizer.convert_tokens_to_ids(end_token(tokenizer))]
        record = {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
        records.append(record | ({"weight": row.get("weight")} if weighted else {}))
    return Dataset.from_list(records)


def _training_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to train on; keep more")
    for place, row in enumerate(rows):
        for column in ("prompt", "completion"):
            if row.get(column) is None:
                lacks = f"row {row.get('id', place)!r} has no `{column}`, only {sorted(row)}"
                raise ValueError(f"{lacks}; rows to train on need `prompt` and `completion`")
    return rows
