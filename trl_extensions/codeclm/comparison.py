"""The target against the strong model before and after training: capacity recovery (arXiv 2404.05875, section 5.1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.generation.replies import without_thoughts
from ..core.generation.sampling import as_prompt
from ..core.generation.types import GenerationEngine, GenerationParams
from ..core.inputs import Query
from ..core.judge.pairwise import Judgment, Pair, PairwiseJudge, summarise
from ..core.judge.win_rate import LOSS, TIE, WIN, check_outcomes, win_rate
from ..core.modeling.batches import free_memory
from ..core.runs.jsonl import read_jsonl, write_jsonl
from ..core.runs.report import write_atomically
from ..core.runs.resumable import map_rows
from ..core.stats import bootstrap_ratio, wilson


PLAYERS = ("strong", "before", "after")  # the last two: the target, before and after training
_MATCHES = {"before": ("before", "strong"), "after": ("after", "strong"), "after_vs_before": ("after", "before")}
_COUNTED = ("ties", "unread", "equal", "contradictions", "contradiction_share", "first_place_share")
_OUTCOMES = {"first": WIN, "tie": TIE, "second": LOSS}


def compare(
    folder: Path,
    queries: Sequence[Query],
    engines: Mapping[str, Callable[[], GenerationEngine]],
    judge: Callable[[], PairwiseJudge],
    params: GenerationParams,
) -> dict[str, Any]:
    """Let three models answer distinct queries, judge the answers in pairs, and write what came of it to `folder`.

    Files: `answers_<player>.jsonl`, `judgments.jsonl`, and `comparison.json`, which is returned (see `summary`). The
    same call again goes on where it stopped; of `engines`, which load the players, one is in memory at a time, and
    none whose answers are all there. Raises a `ValueError` without queries, without an engine for each player, or for
    answers that were made with other settings.
    """
    if not queries:
        raise ValueError("there are no benchmark prompts, so nothing can be compared: give some.")
    if missing := [name for name in PLAYERS if name not in engines]:
        raise ValueError(f"no engine answers for {missing[0]!r}: give one for each of {', '.join(PLAYERS)}.")
    prompts = [{"id": query.id, "prompt": as_prompt(query, None, True)} for query in queries]
    answers = {name: answer(folder / f"answers_{name}.jsonl", prompts, engines[name], params) for name in PLAYERS}
    pairs = [
        Pair(f"{match}/{query.id}", row["prompt"], *(answers[player][query.id]["text"] for player in players))
        for match, players in _MATCHES.items()
        for query, row in zip(queries, prompts, strict=True)
    ]
    own_judge = judge()
    judgments = own_judge.judge(pairs)
    write_jsonl(folder / "judgments.jsonl", map(asdict, judgments))
    result = summary(judgments, answers)
    result["judge"] = {"engine": own_judge.engine.name, "mode": own_judge.mode, "counts": dict(own_judge.counts)}
    write_atomically(folder / "comparison.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def answer(
    path: Path, prompts: list[dict[str, Any]], engine: Callable[[], GenerationEngine], params: GenerationParams
) -> dict[str, dict[str, Any]]:
    """By id of each of the rows of `prompts` one answer: `text`, without thoughts, and `truncated`. Those in the file
    stay, and `engine` is only loaded for others."""

    def make(rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, own in engine().generate([row["prompt"] for row in rows], params):
            text, truncated = without_thoughts(own.text).strip(), own.finish_reason != "stop"
            yield place, {"prompt": rows[place]["prompt"], "text": text, "truncated": truncated}

    map_rows(prompts, make, path, settings={"params": params.as_dict()}, desc=path.stem, same=["prompt"])
    free_memory()
    return {row["id"]: row for row in read_jsonl(path)}


def summary(judgments: Iterable[Judgment], answers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The numbers of `comparison.json`, JSON-ready, of judgments with ids `<match>/<id of the query>`.

    `before` and `after`: the target against the strong model: `crr`, the share of judged prompts it wins or ties, with
    Wilson's `interval`, `wins`, `ties`, `losses`, `unread` (no part of the share; a win is one in both orders), and
    how far the judge contradicts itself. `after_vs_before`: the same with `win_rate`, in which a tie is half a win. In
    each of them `margin`: the mean of the first model's score less the other's, both averaged over the two orders, in
    points of 1 to 10 (mode "scores") or in probability (mode "logprobs"), with a bootstrap interval, and how many are
    `positive`. `change`: what training added to `crr` on prompts that both judgments could be read of, with a paired
    bootstrap interval. `answers`: mean words and how many were cut off, by player. Shares of nothing are None.
    """
    by_match: dict[str, dict[str, Judgment]] = {name: {} for name in _MATCHES}
    for judgment in judgments:
        match, _, id_ = judgment.id.partition("/")
        by_match[match][id_] = judgment
    result: dict[str, Any] = {"prompts": len(answers["after"])}
    for match, own in by_match.items():
        result[match] = _outcome(list(own.values()), "win_rate" if match == "after_vs_before" else "crr")
    result["change"] = _change(by_match["before"], by_match["after"])
    result["answers"] = {
        name: {
            "mean_words": sum(len(one["text"].split()) for one in own.values()) / len(own),
            "empty": sum(not one["text"].strip() for one in own.values()),
            "truncated": sum(bool(one["truncated"]) for one in own.values()),
        }
        for name, own in answers.items()
    }
    return result


def capacity_recovery(outcomes: Sequence[float], *, confidence: float = 0.95) -> dict[str, Any]:
    """Capacity recovery ratio of a target model against a strong one, (wins + ties) / all, with Wilson's interval
    (arXiv 2404.05875, section 5.1).

    Args:
        outcomes: Of the target model: 1 win, 0.5 tie, 0 loss; another one, or none, raises a `ValueError`.
        confidence: Coverage, in (0, 1).

    Returns:
        JSON-ready: `crr`, `low`, `high`, `n`, `wins`, `ties`, `losses`.
    """
    values = check_outcomes(outcomes)
    recovered, wins = int((values > LOSS).sum()), int((values == WIN).sum())
    low, high = wilson(recovered, len(values), confidence)
    counts = {"wins": wins, "ties": recovered - wins, "losses": len(values) - recovered}
    return {"crr": recovered / len(values), "low": low, "high": high, "n": len(values)} | counts


def _outcome(judgments: list[Judgment], share: str) -> dict[str, Any]:
    counts = summarise(judgments)
    outcomes = [_OUTCOMES[own.winner] for own in judgments if own.winner]
    result: dict[str, Any] = {share: None, "interval": None, "judged": len(outcomes)}
    if outcomes:
        rate = capacity_recovery(outcomes) if share == "crr" else win_rate(outcomes)
        result |= {share: rate["crr" if share == "crr" else "value"], "interval": [rate["low"], rate["high"]]}
    result |= {"wins": counts["first"], "losses": counts["second"]} | {name: counts[name] for name in _COUNTED}
    return result | {"margin": _margin(judgments)}


def _margin(judgments: list[Judgment]) -> dict[str, Any] | None:
    """How much better the first answers are by the scores, averaged over both orders; None without scores."""
    margins = [own.scores[0] - own.scores[1] for own in judgments if own.scores]
    if not margins:
        return None
    interval = list(bootstrap_ratio(margins, [1.0] * len(margins))) if len(margins) > 1 else None
    return {"mean": sum(margins) / len(margins), "interval": interval, "positive": sum(own > 0 for own in margins)}


def _change(before: Mapping[str, Judgment], after: Mapping[str, Judgment]) -> dict[str, Any]:
    read = [id_ for id_ in before if before[id_].winner and after[id_].winner]
    differences = [(after[id_].winner != "second") - (before[id_].winner != "second") for id_ in read]
    if len(read) < 2:
        return {"crr": float(differences[0]) if read else None, "interval": None, "judged": len(read)}
    interval = bootstrap_ratio(differences, [1.0] * len(read))
    return {"crr": sum(differences) / len(read), "interval": list(interval), "judged": len(read)}
