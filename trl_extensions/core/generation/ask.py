"""Questions whose answers are read by a program: asked, read, asked once more if unreadable, and set aside then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .client import Request, Response, ResponseCache
from .replies import Unreadable, read_reply, schema_json, without_thoughts
from .types import GenerationEngine, GenerationParams, Prompt


if TYPE_CHECKING:
    from pydantic import BaseModel

    from .client import LLMClient

# So that a model that failed once does not fail in the same way again
RETRY_TEMPERATURE = 0.7
_LONGEST_QUOTE = 2000

Read = Callable[..., Any]
"""From the text of a reply and `truncated=` to what it says; raises `Unreadable`."""

Again = Callable[[Prompt, str, str], Prompt]
"""From a question, the reply to it and what was wrong with that to the question that is asked next."""


@dataclass(frozen=True)
class Answer:
    """What became of a question.

    Args:
        value: What was read; None if nothing could be.
        reason: Why not, for the last reply; None if it could.
        raw: All replies to it as they came, in their order.
    """

    value: Any
    reason: str | None
    raw: tuple[str, ...]


def ask_until_read(
    engine: GenerationEngine,
    prompts: Sequence[Prompt],
    params: GenerationParams,
    schema: type[BaseModel] | None,
    *,
    read: Read | None = None,
    again: Again | None = None,
    tries: int = 2,
    cache: ResponseCache | None = None,
    step: str = "ask",
    counts: Counter[str] | None = None,
) -> list[Answer]:
    """Ask all questions, read the replies, and ask those that cannot be read once more.

    The engine is held to the schema if it can be; the prompts must say in words too what form the reply has. A
    question is asked again with another seed and a temperature of at least 0.7.

    Args:
        engine: Whom to ask. Questions that are alike are asked once.
        prompts: Chats or texts.
        params: How replies are decoded.
        schema: What a reply should be; None for free text, with `read`.
        read: Reads a reply. Default: `read_reply` by the schema.
        again: Makes the next question of one whose reply was unreadable. Default: `again`.
        tries: How often a question is asked at most.
        cache: Finished calls: none that is in there is made again, and each is there before the next is waited for.
        step: What the questions are about: part of the key of a call, and the label of the progress bar.
        counts: Is added to: `calls` made, `cache_hits`, and questions `retried`.

    Returns:
        An answer for each prompt.

    Raises:
        ValueError, EndpointError, OSError: The engine refuses a question, or the cache cannot be written.
    """
    counts = Counter() if counts is None else counts
    params, read = _prepared(params, schema, read)
    answers = [Answer(None, None, ())] * len(prompts)
    questions = dict(enumerate(prompts))
    for turn in range(tries):
        if turn:
            counts["retried"] += len(questions)
        name, own = _turn(step, params, turn)
        calls = [Request(name, engine.name, prompt, own) for prompt in questions.values()]
        replies = cached_calls(engine, calls, cache, counts)
        unread = {}
        for place, reply in zip(list(questions), replies, strict=True):
            answers[place] = _answer(answers[place].raw, reply, read)
            if answers[place].reason is not None:
                unread[place] = (again or ask_again)(prompts[place], reply.text, answers[place].reason)
        questions = unread
    return answers


async def ask_client(
    client: LLMClient,
    role: str,
    prompt: Prompt,
    params: GenerationParams,
    schema: type[BaseModel] | None,
    *,
    read: Read | None = None,
    again: Again | None = None,
    tries: int = 2,
    step: str = "ask",
    finished: Callable[[Response], None] = lambda reply: None,
) -> Answer:
    """One question of `ask_until_read` for coroutines that share a client.

    Args:
        client: Makes the calls, with its cache and budgets.
        role: Which of its engines is asked.
        prompt, params, schema, read, again, tries, step: See `ask_until_read`.
        finished: Is called with every response that has come.

    Raises:
        CallFailed, BudgetSpent, EndpointError, OSError: See `LLMClient.call`.
    """
    params, read = _prepared(params, schema, read)
    answer, question = Answer(None, None, ()), prompt
    for turn in range(tries):
        name, own = _turn(step, params, turn)
        reply = await client.call(role, name, question, own)
        finished(reply)
        answer = _answer(answer.raw, reply, read)
        if answer.reason is None:
            break
        question = (again or ask_again)(prompt, reply.text, answer.reason)
    return answer


def ask_again(prompt: Prompt, reply: str, reason: str, note: str | None = None) -> Prompt:
    """The same chat, with the reply that could not be read and what is wrong with it. A text is left as it is.

    Args:
        prompt: What was asked.
        reply: What came back. It is quoted without thoughts, and only its beginning if it is long.
        reason: What was wrong with it, without a full stop.
        note: What to say in place of the usual request to keep to the form that was asked for.
    """
    if isinstance(prompt, str):
        return prompt
    note = note or (
        f"That reply could not be read: {reason}. Do the task once more. Keep exactly to the form that was asked for, "
        "and write nothing before or after it."
    )
    quoted = without_thoughts(reply).strip()
    if len(quoted) > _LONGEST_QUOTE:
        quoted = quoted[:_LONGEST_QUOTE] + " ..."
    if not quoted:  # chat templates refuse an empty turn, and two of the user in a row
        return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{note}"}]
    return [*prompt, {"role": "assistant", "content": quoted}, {"role": "user", "content": note}]


def cached_calls(
    engine: GenerationEngine, calls: Sequence[Request], cache: ResponseCache | None, counts: Counter[str]
) -> list[Response]:
    """The reply to each call: from the cache, or from the engine, which is asked once for all that are missing."""
    from tqdm.auto import tqdm

    known = {call.key: reply for call in calls if cache is not None and (reply := cache.find(call))}
    missing = list({call.key: call for call in calls if call.key not in known}.values())
    counts["cache_hits"] += len(known)
    with tqdm(total=len(missing), desc=missing[0].step if missing else None, unit="call", disable=not missing) as bar:
        for place, reply in _called(engine, missing):
            if cache is not None:
                cache.add(missing[place], reply)
            known[missing[place].key] = reply
            counts["calls"] += 1
            bar.update()
    return [known[call.key] for call in calls]


def _called(engine: GenerationEngine, calls: Sequence[Request]) -> Iterator[tuple[int, Response]]:
    """What the engine replies to calls that differ in nothing but their prompt, in any order."""
    prompts = [call.prompt for call in calls]
    if calls and calls[0].options:
        for place, generation, logprobs in engine.option_logprobs(prompts, calls[0].options):
            yield place, Response.of(generation, logprobs)
    elif calls:
        for place, generation in engine.generate(prompts, calls[0].params):
            yield place, Response.of(generation)


def _prepared(
    params: GenerationParams, schema: type[BaseModel] | None, read: Read | None
) -> tuple[GenerationParams, Read]:
    if schema is None:
        if read is None:
            raise ValueError("`schema` is None: give `read`, which reads the text of a reply")
        return params, read
    return replace(params, schema=schema_json(schema)), read or partial(read_reply, schema=schema)


def _turn(step: str, params: GenerationParams, turn: int) -> tuple[str, GenerationParams]:
    if not turn:
        return step, params
    temperature = max(params.temperature, RETRY_TEMPERATURE)
    return f"{step}:again", replace(params, seed=params.seed + turn, temperature=temperature)


def _answer(before: tuple[str, ...], reply: Response, read: Read) -> Answer:
    raw, truncated = (*before, reply.text), reply.finish_reason != "stop"
    try:
        return Answer(read(reply.text, truncated=truncated), None, raw)
    except Unreadable as error:
        cut = f" ({reply.finish_reason}: it is not complete)" if truncated else ""
        return Answer(None, f"{error}{cut}", raw)
