"""Sample C responses a query, one under each of C constitutions (SAMI, arXiv 2404.14313, section 3.1)."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.generation.types import Generation, GenerationEngine, GenerationParams, Prompt
from ..core.inputs import Query
from ..core.modeling.batches import Padding, written_in
from ..core.runs.resumable import map_rows
from ..core.text import SPACELESS
from .checks import count_words, disobeys
from .data import TRAINING_TEMPLATE, check_template, render
from .principles import Constitution, Principle, sample_constitutions


logger = logging.getLogger(__name__)

REASONS = ("empty", "equal", "evasive", "too_long", "echo", "disobedient")
"""Reasons for dropping a row, in the order in which they are tried."""

EVASIVE_OPENINGS = (
    "I'm sorry", "I am sorry", "Sorry", "I apologize", "I apologise", "My apologies", "I cannot", "I can't",
    "I can not", "I could not", "I'm unable", "I am unable", "I'm not able", "I am not able", "I won't", "I will not",
    "I don't feel comfortable", "I do not feel comfortable", "I must decline", "Unfortunately, I", "As an AI",
    "As an artificial intelligence", "As a language model", "As a large language model", "As a chatbot",
    "As a digital assistant", "I'm an AI", "I am an AI", "I'm just an AI", "申し訳ありません", "申し訳ございません",
    "申し訳ないですが", "ごめんなさい", "すみませんが", "お答えできません", "AIとして", "AIアシスタント", "私はAI",
)  # fmt: skip

_ECHO_MIN_WORDS = 4
_NUMBER = re.compile(r"^\d+\.\s+")


@dataclass(frozen=True)
class ResponseFilters:
    """What makes a row unfit for training: a response that starts with one of the `evasive_openings`, is longer than
    `max_tokens`, hit the generation limit, and so never ended (`drop_truncated`), or repeats its constitution
    (`drop_echo`), two equal responses (`drop_equal`), and one that fails the check of a principle that tells its
    constitution from another of the row (`drop_disobedient`)."""

    evasive_openings: tuple[str, ...] = EVASIVE_OPENINGS
    max_tokens: int | None = None
    drop_truncated: bool = True
    drop_echo: bool = True
    drop_equal: bool = True
    drop_disobedient: bool = False

    def __post_init__(self):
        if isinstance(self.evasive_openings, str):
            raise TypeError("`evasive_openings` is one string; give a list of openings")
        object.__setattr__(self, "evasive_openings", tuple(self.evasive_openings))
        if any(not _normalize(opening) for opening in self.evasive_openings):
            raise ValueError("`evasive_openings` holds an empty opening, which every response matches; remove it")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"`max_tokens` is {self.max_tokens}; give at least 1, or none for no limit")


EVERYTHING_BUT_EMPTY = ResponseFilters(evasive_openings=(), drop_truncated=False, drop_echo=False, drop_equal=False)
"""For evaluation, which keeps every row that can be scored."""


def rejection_reason(
    responses: Sequence[Generation], constitutions: Sequence[str], filters: ResponseFilters
) -> str | None:
    """The first of `REASONS` that applies to any response of a row, given the texts they were sampled under; None if
    the row is good."""
    if len(responses) != len(constitutions):
        raise ValueError(f"got {len(responses)} responses for {len(constitutions)} constitutions; one each is needed")
    texts = [response.text for response in responses]
    if not all(any(map(str.isalnum, text)) for text in texts):
        return "empty"
    if filters.drop_equal and len(set(map(_normalize, texts))) < len(texts):
        return "equal"
    if any(is_evasive(text, filters.evasive_openings) for text in texts):
        return "evasive"
    limit = math.inf if filters.max_tokens is None else filters.max_tokens
    if any(one.num_tokens > limit or (filters.drop_truncated and one.finish_reason == "length") for one in responses):
        return "too_long"
    if filters.drop_echo and any(is_echo(text, own) for text, own in zip(texts, constitutions, strict=True)):
        return "echo"
    return None


def is_evasive(response: str, openings: Sequence[str] = EVASIVE_OPENINGS) -> bool:
    """Whether the response starts with one of `openings`, as whole words in scripts that space them; quotes and case
    do not matter."""
    text = _normalize(response).lstrip("\"'*_“”「『 ")

    def ends_a_word(end: int) -> bool:
        return not text[end : end + 1].isalnum() or bool(SPACELESS.search(text[end - 1 : end + 1]))

    return any(text.startswith(own) and ends_a_word(len(own)) for own in map(_normalize, openings))


def is_echo(response: str, constitution: str) -> bool:
    """Whether the response repeats its constitution: contains one of the numbered lines, starts with a line's
    instruction, or contains one of at least four words, see `count_words` (shorter ones may be ordinary speech)."""
    text = _normalize(response)
    for line in filter(None, map(_normalize, constitution.splitlines())):
        instruction = _NUMBER.sub("", line)
        if line in text or text.startswith(instruction):
            return True
        if count_words(instruction) >= _ECHO_MIN_WORDS and instruction.rstrip(".!。！") in text:
            return True
    return False


def _normalize(text: str) -> str:
    """Lower case, single spaces, straight apostrophes: what two texts are compared by."""
    return " ".join(text.replace("’", "'").replace("‘", "'").split()).casefold()


@dataclass(frozen=True)
class SamplingReport:
    """Rows in the file (`sampled`), number `dropped` by reason, rows found at the start (`resumed`), and what this
    call took; `padding_share` where the engine counts it."""

    path: Path
    sampled: int
    kept: int
    dropped: dict[str, int]
    resumed: int
    tokens: int
    seconds: float
    padding_share: float | None = None

    @property
    def summary(self) -> str:
        """One line for a log."""
        earlier = f" ({self.resumed} by an earlier run)" if self.resumed else ""
        rows = f"{self.sampled} rows sampled{earlier}, {self.kept} kept, {_dropped_text(self.dropped)}"
        return f"{self.path}: {rows}; {written_in(self.tokens, self.seconds, self.padding_share)}"


def sample_rows(
    engine: GenerationEngine,
    queries: Sequence[Query],
    principles: Sequence[Principle],
    *,
    num_constitutions: int = 2,
    pairs: str = "random",
    purpose: str = "train",
    sampling_template: str = TRAINING_TEMPLATE,
    training_template: str = TRAINING_TEMPLATE,
    params: GenerationParams,
    output: str | os.PathLike,
    seed: int = 0,
    filters: ResponseFilters,
    needed: int | None = None,
    conversational: bool = True,
    chunk_size: int = 64,
) -> SamplingReport:
    """Sample responses for each query under C constitutions and append one row a query to a JSON-lines file.

    A row holds `id`, `index` (position of the query), `query`, `constitutions` (as sampled under), `choices`,
    `prompts` (to score under: the same choices, their order and wording drawn anew), `sampled_prompts` (as sampled
    under, in the training template), `completions`, `truncated` (hit the generation limit), `num_tokens` (lists of C),
    `kept` and `reason`. Dropped rows are written too, with `kept` false. Running again with the same settings skips
    what is there. The rows sampled are those of the shortest run of queries from the start that gives `needed` kept
    ones, whatever the chunk size, and however often the sampling was interrupted.

    Args:
        queries, chunk_size: Distinct queries, and how many the engine is given at once.
        principles: What the `num_constitutions` (C, at least 2) of each query are built from, by `seed` and its id.
        pairs, purpose: See `sample_constitutions`; `purpose` is that of `prompts`, "train" or "eval".
        sampling_template, training_template: Prompts to sample with, and to put into the rows; fields `{query}` and
            `{constitution}`. They are chats if `conversational`, else plain text.
        needed: Stop as soon as this many rows are kept. Defaults to sampling every query.

    Raises:
        ValueError: A bad template, too few principles, a repeated query, or an `output` made with other settings or
            queries; no row on disk is changed.
    """
    check_template(sampling_template, "sampling_template")
    check_template(training_template, "training_template")

    def draw(key: str, purpose: str) -> list[Constitution]:
        return sample_constitutions(principles, num_constitutions, seed=seed, key=key, purpose=purpose, pairs=pairs)

    draw("", "sample")  # raises before anything is written
    output, padding = Path(output), Padding(engine)
    outcomes: Counter[str | None] = Counter()  # reason, None for rows that are kept -> rows
    tokens = 0

    def tally(row: dict[str, Any]) -> dict[str, int]:
        outcomes[row["reason"]] += 1
        return {"kept": outcomes[None], "dropped": outcomes.total() - outcomes[None]}

    def prompt(template: str, query: str, constitution: Constitution) -> Prompt:
        return render(template, query=query, constitution=constitution.text, conversational=conversational)

    def make(chunk: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal tokens
        drawn = [draw(row["id"], "sample") for row in chunk]
        pairs = [(row["query"], one) for row, own in zip(chunk, drawn, strict=True) for one in own]
        prompts = [prompt(sampling_template, query, one) for query, one in pairs]
        found: list[dict[int, Generation]] = [{} for _ in chunk]
        for position, response in engine.generate(prompts, params):
            place, column = divmod(position, num_constitutions)
            found[place][column] = response
            if len(found[place]) < num_constitutions:
                continue
            own, responses = drawn[place], [found[place][column] for column in range(num_constitutions)]
            result = make_row(chunk[place], own, responses)
            tokens += sum(result["num_tokens"])
            yield place, result

    checks = {principle.name: principle.check for principle in principles}

    def make_row(row: dict[str, Any], own: list[Constitution], responses: list[Generation]) -> dict[str, Any]:
        constitutions, answers = [one.text for one in own], [one.text for one in responses]
        choices, reason = [one.choices for one in own], rejection_reason(responses, constitutions, filters)
        bad = (disobeys(checks, choices, number, text) for number, text in enumerate(answers))
        if reason is None and filters.drop_disobedient and any(bad):
            reason = "disobedient"
        chats = [[{"role": "assistant", "content": text}] for text in answers]
        return row | {
            "constitutions": constitutions,
            "choices": choices,
            "prompts": [prompt(training_template, row["query"], one) for one in draw(row["id"], purpose)],
            "sampled_prompts": [prompt(training_template, row["query"], one) for one in own],
            "completions": chats if conversational else answers,
            "truncated": [one.finish_reason == "length" for one in responses],
            "num_tokens": [one.num_tokens for one in responses],
            "kept": reason is None,
            "reason": reason,
        }

    unchecked = {} if filters.drop_disobedient else {"check": None}  # else they may change
    settings = {
        "engine": engine.name, "num_constitutions": num_constitutions, "seed": seed, "conversational": conversational,
        "params": params.as_dict(), "filters": asdict(filters), "sampling_template": sampling_template,
        "training_template": training_template, "pairs": pairs, "purpose": purpose,
        "principles": [principle.as_dict() | unchecked for principle in principles],
    }  # fmt: skip
    rows = [{"id": query.id, "index": index, "query": query.text} for index, query in enumerate(queries)]
    # Even if all of a chunk is kept, none of it is one too many
    limit = None if needed is None else lambda: needed - outcomes[None]
    report = map_rows(
        rows, make, output, chunk_size=chunk_size, settings=settings, desc="sampling", tally=tally, limit=limit
    )
    kept, dropped = outcomes[None], {reason: count for reason, count in outcomes.items() if reason is not None}
    if needed is not None and kept < needed:
        used = f"all {len(queries)} queries are used up, {_dropped_text(dropped)}"
        logger.warning("%s: only %d of %d needed rows kept: %s; loosen the filters?", output, kept, needed, used)
    counts = report.rows, kept, dropped, report.resumed, tokens
    return SamplingReport(output, *counts, report.seconds, padding.share)


def _dropped_text(dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"{sum(dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
