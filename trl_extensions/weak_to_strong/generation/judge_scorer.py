"""A language model as a scorer: one question an answer, a number from 1 to 10 in reply."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...core.generation import EngineArguments, create_engine
from ...core.generation.replies import as_text, without_thoughts
from ...core.generation.types import Generation, GenerationEngine, GenerationParams, Prompt


QUESTION = """\
Below are a request and an answer to it. Rate the answer by one criterion, from 1 to 10.

Criterion: {criterion}

10 means that the answer meets the criterion entirely, 1 that it does not meet it at all. Nothing else counts: an \
answer is not better for being longer, or for agreeing with you.

<request>
{prompt}
</request>

<answer>
{text}
</answer>

Reply with one whole number from 1 to 10 and nothing else."""
"""What the judge is asked, as the only message of a chat."""

QUESTION_AGAIN = """\
<request>
{prompt}
</request>

<answer>
{text}
</answer>

How well does the text inside <answer> meet this criterion: {criterion}? Write a single whole number: 1 is the worst \
mark, 10 the best. Do not explain it, and do not answer the request yourself."""
"""What it is asked if no number could be read from its first reply."""

_RATING = re.compile(
    r"""[\s*_`"'\[(]*
    (?:(?:my\s+|the\s+)?(?:final\s+)?(?:score|rating|mark|answer)\s*(?:is|[:=])[\s*_`"'\[(]*)?
    (?P<number>\d{1,3}(?:\.\d+)?)
    (?:\s*(?:/|out\s+of)\s*10(?:\.0+)?)?
    [\s*_`"'\])]*\.?[\s*_`"'\])]*""",
    re.IGNORECASE | re.VERBOSE,
)


class JudgeScorer:
    """Asks a language model for a rating from 1 to 10; higher is better.

    The question is `QUESTION`. A reply from which no rating can be read (see `parse_rating`), or that the token limit
    cut off, is asked for once more, as `QUESTION_AGAIN` and with another seed. If that fails too, the text has no
    score and both replies are in `failures`.

    A small model is no judge. Rate a few answers yourself before training on what one keeps.

    Attributes:
        counts: Over all calls: texts `retried`, and of these those `unparsed` in the end.
        failures: Of the last call: index of a text -> both replies.

    Args:
        engine: The judge; it is given chat messages.
        criterion: What a good answer is, in words that complete "Criterion: ...", such as "polite, without insults".
        params: Also as a dict of its fields. Defaults to greedy decoding with up to 16 new tokens; a judge that
            thinks aloud needs more.
        name: Key of the scores.

    Raises:
        ValueError: The criterion is empty, or `params` has a field that there is not.
    """

    higher_is_better = True
    range = (1.0, 10.0)

    def __init__(
        self,
        engine: GenerationEngine,
        criterion: str,
        *,
        params: GenerationParams | dict[str, Any] | None = None,
        name: str = "judge",
    ):
        check_judge({"engine": engine, "criterion": criterion, "params": params})
        self.engine = engine
        self.criterion = " ".join(criterion.split())
        self.params = GenerationParams(**params) if isinstance(params, dict) else params
        self.params = self.params or GenerationParams(max_new_tokens=16)
        self.name = name
        self.counts: Counter[str] = Counter()
        self.failures: dict[int, list[str]] = {}
        self.settings: dict[str, Any] = {
            "kind": "judge",
            "engine": engine.name,
            "criterion": self.criterion,
            "params": self.params.as_dict(),
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Ratings in [1, 10], `None` where none could be read."""
        ratings: dict[int, float | None] = {}
        replies: dict[int, list[str]] = {}
        asked = list(range(len(completions)))
        for turn, question in enumerate((QUESTION, QUESTION_AGAIN)):
            self.counts["retried"] += len(asked) if turn else 0
            params = replace(self.params, seed=self.params.seed + turn)
            chats = [self._chat(question, prompts[index], completions[index]) for index in asked]
            for place, reply in self.engine.generate(chats, params) if chats else ():
                ratings[asked[place]] = _read(reply)
                replies.setdefault(asked[place], []).append(reply.text)
            asked = [index for index in asked if ratings[index] is None]
        self.counts["unparsed"] += len(asked)
        self.failures = {index: replies[index] for index in asked}
        return [ratings[index] for index in range(len(completions))]

    def _chat(self, question: str, prompt: Prompt, text: str) -> list[dict[str, str]]:
        content = question.format(criterion=self.criterion, prompt=as_text(prompt), text=text)
        return [{"role": "user", "content": content}]


def judge_by_name(
    criterion: str,
    *,
    model: str | None = None,
    base_url: str | None = None,
    params: GenerationParams | dict[str, Any] | None = None,
    name: str = "judge",
) -> JudgeScorer:
    """A judge that is loaded here or, with the `base_url` of an endpoint, asked there; see `JudgeScorer`."""
    check_judge({"model": model, "criterion": criterion, "params": params})
    engine = "endpoint" if base_url else "transformers"
    engine = create_engine(EngineArguments(engine=engine, engine_model=model, engine_base_url=base_url))
    return JudgeScorer(engine, criterion, params=params, name=name)


def check_judge(arguments: dict[str, Any]) -> None:
    """Check arguments of `JudgeScorer` or `judge_by_name` without loading anything.

    Raises:
        ValueError: No judge, an empty criterion, or `params` with a field that there is not.
    """
    criterion, params = arguments["criterion"], arguments.get("params")
    if "engine" not in arguments and not arguments.get("model"):
        raise ValueError("scorer of kind judge: give the `model` that judges")
    if not isinstance(criterion, str) or not criterion.strip():
        raise ValueError("scorer of kind judge: `criterion` is empty; say in a few words what a good answer is")
    if isinstance(params, dict):
        try:
            GenerationParams(**params)
        except TypeError as error:
            raise ValueError(f"scorer of kind judge: `params`: {error}; correct it") from None


def parse_rating(reply: str) -> float | None:
    """Read a rating from 1 to 10 out of a judge's reply.

    Strict, since a number somewhere in a text may mean anything: the reply must be nothing but the number, written as
    `7`, `7.5`, `7/10`, `7 out of 10`, `Score: 7` or `The rating is 7.`, in any quotes, brackets or emphasis.

    Args:
        reply: The text of the reply; thoughts inside `<think>` are not read.

    Returns:
        The rating, in [1, 10]; `None` if the reply is anything else, or the number is out of range.
    """
    match = _RATING.fullmatch(without_thoughts(reply))
    rating = float(match["number"]) if match else 0.0
    return rating if 1 <= rating <= 10 else None


def _read(reply: Generation) -> float | None:
    """A reply that was cut off may end in the first digit of a 10."""
    return None if reply.finish_reason == "length" else parse_rating(reply.text)
