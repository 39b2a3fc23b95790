"""Questions whose answers are read by a program: asked, read, asked once more if unreadable, and set aside then."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .client import Request, Response, ResponseCache
from .replies import Unreadable, read_reply, schema_json, without_thoughts
from .types import GenerationEngine, GenerationParams, Prompt


if TYPE_CHECKING:
    from pydantic import BaseModel

    from .client import LLMClient

RETRY_TEMPERATURE = 0.7  # so that a model that failed once does not fail in the same way again
_LONGEST_QUOTE = 2000
_LARGEST, _LONGEST_TIME = 1_000_000, 5.0  # products, and seconds, of a template

# From the text of a reply and `truncated=` to what it says; raises `Unreadable`
Read = Callable[..., Any]
# From a question, the reply to it and what was wrong with that to the question that is asked next
Again = Callable[[Prompt, str, str], Prompt]


@dataclass(frozen=True)
class Answer:
    """What was read, or None and the reason why nothing could be; and all replies as they came, in their order."""

    value: Any = None
    reason: str | None = None
    raw: tuple[str, ...] = ()


def ask_again(prompt: Prompt, reply: str, reason: str, note: str | None = None) -> Prompt:
    """The same chat, with the beginning of the reply that could not be read and a note on it; a text as it is."""
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


def ask_until_read(
    engine: GenerationEngine,
    prompts: Sequence[Prompt],
    params: GenerationParams,
    schema: type[BaseModel] | None,
    *,
    read: Read | None = None,
    again: Again = ask_again,
    tries: int = 2,
    cache: ResponseCache | None = None,
    step: str = "ask",
    counts: Counter[str] | None = None,
) -> list[Answer]:
    """Ask all questions, read the replies, and ask those that cannot be read once more.

    The engine is held to the schema if it can be; the prompts must say in words too what form the reply has. A
    question is asked again with another seed and a temperature of at least 0.7; questions that are alike, only once.

    Args:
        engine, prompts, params: Whom to ask what, in chats or texts, and how replies are decoded.
        schema: What a reply should be; None for free text, with `read`.
        read, again: Read a reply (default: `read_reply`), and make the next question of one that was unreadable.
        tries: How often a question is asked at most.
        cache: Finished calls: none that is in there is made again, and each is there before the next is waited for.
        step: What the questions are about: part of the key of a call, and the label of the progress bar.
        counts: Is added to: `calls` made, `cache_hits`, and questions `retried`.

    Raises:
        ValueError, EndpointError, OSError: The engine refuses a question, or the cache cannot be written.
    """
    counts = Counter() if counts is None else counts
    answers = [Answer()] * len(prompts)
    questions = dict(enumerate(prompts))
    for turn in range(tries):
        name, own = _turn(step, params, schema, turn)
        requests = [Request(name, engine.name, prompt, own) for prompt in questions.values()]
        counts["retried"] += len(requests) if turn else 0
        responses = cached_calls(engine, requests, cache, counts)
        for place, response in zip(list(questions), responses, strict=True):
            answers[place] = answer = _answer(answers[place].raw, response, schema, read)
            if answer.reason is None:
                del questions[place]
            else:
                questions[place] = again(prompts[place], response.text, answer.reason)
    return answers


async def ask_client(
    client: LLMClient,
    role: str,
    prompt: Prompt,
    params: GenerationParams,
    schema: type[BaseModel] | None,
    *,
    read: Read | None = None,
    again: Again = ask_again,
    step: str = "ask",
    finished: Callable[[Response], None] = lambda response: None,
) -> Answer:
    """One question of `ask_until_read`, to the engine of a role; `finished` is called with every response to it."""
    answer, question = Answer(), prompt
    for turn in range(2):
        name, own = _turn(step, params, schema, turn)
        response = await client.call(role, name, question, own)
        finished(response)
        answer = _answer(answer.raw, response, schema, read)
        if answer.reason is None:
            break
        question = again(prompt, response.text, answer.reason)
    return answer


def cached_calls(
    engine: GenerationEngine, requests: Sequence[Request], cache: ResponseCache | None, counts: Counter[str]
) -> list[Response]:
    """Responses from the cache, or from the engine, which is asked once for all that are missing.

    The requests differ in nothing but their prompt; with options, it is their log-probabilities that are asked for.
    """
    from tqdm.auto import tqdm

    known = {own.key: response for own in requests if cache is not None and (response := cache.find(own))}
    missing = list({own.key: own for own in requests if own.key not in known}.values())
    counts["cache_hits"] += len(known)
    if missing:
        prompts, first = [own.prompt for own in missing], missing[0]
        made: Iterator[Any]  # of places with a generation, and log-probabilities
        made = (
            engine.option_logprobs(prompts, first.options) if first.options else engine.generate(prompts, first.params)
        )
        for place, *result in tqdm(made, total=len(missing), desc=first.step, unit="call"):
            response = Response.of(*result)
            if cache is not None:
                cache.add(missing[place], response)
            known[missing[place].key] = response
            counts["calls"] += 1
    return [known[own.key] for own in requests]


def load_template(
    file: Path, variables: Sequence[str], *, needed: Sequence[str] = (), folders: Sequence[Path] = (), **options: Any
) -> Callable[[Mapping[str, Any]], str]:
    """A function that fills in a Jinja file of UTF-8 text in a sandbox, where it can run nothing, nor for ever. It may
    include what lies in `folders` (default: its own); `options` are the environment's.

    Raises `ValueError`, one line with file and line, if it cannot be read, uses other variables or lacks a needed one;
    so does the function if it cannot be filled in.
    """
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))
        deadline = math.inf

        def call(self, *args: Any, **kwargs: Any) -> Any:
            if time.monotonic() > self.deadline:  # a loop is short by itself, and one in another makes calls
                raise jinja2.TemplateRuntimeError(f"it takes more than {_LONGEST_TIME:g} seconds")
            return super().call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [own if isinstance(own, (int, float)) else len(own) for own in (left, right)]
            if operator == "**" or abs(math.prod(sizes)) > _LARGEST:
                raise jinja2.TemplateRuntimeError(f"{operator} makes too much")
            return super().call_binop(context, operator, left, right)

    loader = jinja2.FileSystemLoader([*folders, file.parent], encoding="utf-8-sig")
    environment = Sandbox(undefined=jinja2.StrictUndefined, loader=loader, **options)
    try:
        tree = environment.parse(file.read_text(encoding="utf-8-sig"))
        template = environment.get_template(file.name)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {' '.join(str(error).split())}; correct the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error}); rewrite the file") from None
    used = jinja2.meta.find_undeclared_variables(tree)
    for name in (name for name in tree.find_all(jinja2.nodes.Name) if name.name in used - set(variables)):
        may = f"it may use {', '.join(variables)}"
        raise ValueError(f"{file}, line {name.lineno}: unknown variable {name.name!r}; {may}")
    if missing := [name for name in needed if name not in used]:
        raise ValueError(f"{file}: {missing[0]!r} is not in it; write {{{{ {missing[0]} }}}} where it belongs")
    template.globals = dict(template.globals)  # a chain of mappings, slow to copy for every prompt

    def fill(values: Mapping[str, Any]) -> str:
        environment.deadline = time.monotonic() + _LONGEST_TIME
        try:
            return template.render(values)
        except Exception as error:  # of any kind: it is the template's own
            lines = [own for own in traceback.extract_tb(error.__traceback__) if not own.filename.endswith(".py")]
            where = f"{lines[-1].filename}, line {lines[-1].lineno}" if lines else str(file)
            what = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{where}: cannot be filled in ({what}); correct the file") from None

    return fill


def _turn(
    step: str, params: GenerationParams, schema: type[BaseModel] | None, turn: int
) -> tuple[str, GenerationParams]:
    if schema is not None:
        params = replace(params, schema=schema_json(schema))
    if not turn:
        return step, params
    temperature = max(params.temperature, RETRY_TEMPERATURE)
    return f"{step}:again", replace(params, seed=params.seed + turn, temperature=temperature)


def _answer(before: tuple[str, ...], response: Response, schema: Any, read: Read | None) -> Answer:
    raw, truncated = (*before, response.text), response.finish_reason != "stop"
    try:
        return Answer((read or partial(read_reply, schema=schema))(response.text, truncated=truncated), None, raw)
    except Unreadable as error:
        cut = f" ({response.finish_reason}: it is not complete)" if truncated else ""
        return Answer(None, f"{error}{cut}", raw)
