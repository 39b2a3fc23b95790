"""What engines take and give: prompts, parameters, generations, and the protocol they share."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from ..options import check_least


# Text to be continued as it stands, or chat messages that the model's chat template renders.
Prompt: TypeAlias = str | list[dict[str, str]]
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationParams:
    """How to decode. A model's own sampling defaults never apply: what is not said here is off.

    Args:
        temperature: 0 decodes greedily, without `top_p` and `seed`.
        stop: Generation ends at the first of these strings in the generated text, which is cut before it.
        schema: JSON schema, as text, that the generated text must follow. An engine or a server that cannot enforce
            one says so once and generates without.

    Raises:
        `ValueError`: naming the field, if a value is out of range or of the wrong type.
    """

    max_new_tokens: int = 350
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    schema: str | None = None

    def __post_init__(self) -> None:
        check_least(self, 2**64, max_new_tokens=1, seed=0)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.schema is not None:
            try:
                if not isinstance(json.loads(self.schema), dict):
                    raise ValueError("it is no object")
            except (ValueError, TypeError) as error:
                raise ValueError(f"schema must be a JSON schema as text ({error})") from None

    def as_dict(self) -> dict[str, Any]:
        """What keys and files of settings hold: without the schema where there is none, as before there were any."""
        return {name: value for name, value in vars(self).items() if name != "schema" or value is not None}


@dataclass(frozen=True)
class Generation:
    """What a model wrote for one prompt, without special tokens, the stop string and trailing whitespace; "length" if
    the token limit cut it off; tokens generated, with the end token and those of a stop string; tokens of the prompt,
    0 where an endpoint does not say."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    num_prompt_tokens: int = field(default=0, compare=False)


class GenerationEngine(Protocol):
    """What every engine offers."""

    name: str

    def generate(
        self, prompts: Sequence[Prompt], params: GenerationParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Generates for every prompt: yields an index into `prompts` and its result, each once, in any order.

        Bad prompts are refused here (`TypeError` or `ValueError`, naming the index), before anything is generated. The
        iterator may be abandoned at any point. With `seeds`, one for each prompt, what is sampled for a prompt depends
        on its own seed only, whatever other prompts there are.
        """
        ...

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Iterator[tuple[int, Generation, list[float]]]:
        """Says how likely it is that the answer to each prompt begins with each of a few options: short strings that
        differ in their first tokens, such as digits. A leading space does not count.

        Yields an index into `prompts`, what it cost (an empty text), and the log-probability of each option in nats,
        without the temperature; minus infinity where an engine lists its likeliest tokens only.
        """
        ...


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuses anything that is neither a string nor a list of chat messages, naming the index."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of prompts, got one string; wrap it in a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list)):
            raise TypeError(f"prompt {index} must be a string or a list of messages, got {type(prompt).__name__}")
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        for message in [] if isinstance(prompt, str) else prompt:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise TypeError(f"prompt {index}: a message needs the strings 'role' and 'content', got {message!r}")


def is_adapter_directory(model: str | os.PathLike[str]) -> bool:
    """Whether a path holds a PEFT adapter (`adapter_config.json`)."""
    return (Path(model) / "adapter_config.json").is_file()


def adapter_base(adapter: str | os.PathLike[str]) -> str:
    """The model that an adapter lies on, to be loaded."""
    from ...embedded import BASE_NOTE, resolve_model_name

    note = Path(adapter) / BASE_NOTE
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return resolve_model_name(note.read_text("utf-8") if note.is_file() else config["base_model_name_or_path"])


def tokenizer_source(model: str) -> str:
    """Where a model's tokenizer lies: with the model, or with the base of an adapter that was saved without one."""
    from ...embedded import resolve_model_name

    has_none = is_adapter_directory(model) and not (Path(model) / "tokenizer_config.json").is_file()
    return adapter_base(model) if has_none else resolve_model_name(model)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it, without trailing whitespace."""
    ends = [end for end in (text.find(string) for string in stop) if end >= 0]
    return text[: min(ends, default=len(text))].rstrip()


def sum_by_option(listed: Iterable[tuple[str, float]], options: Sequence[str]) -> list[float]:
    """The log-probability of each option in nats, out of tokens as text with theirs: those that are the same but for
    white space, and the marks that some tokenizers write for it, add up; minus infinity for one that is not listed."""
    shares = dict.fromkeys(options, 0.0)
    for token, logprob in listed:
        token = token.strip(" \n\t\u0120\u010a\u2581")
        if token in shares:
            shares[token] += math.exp(logprob)
    return [math.log(shares[option]) if shares[option] > 0 else -math.inf for option in options]


def request_seed(seed: int, index: int | str) -> int:
    """The seed of one request, batch or named series of them, in 31 bits. Mixed rather than added: request 1 under
    seed 0 must not repeat request 0 under seed 1, and equal prompts in a run must not all get the same sample."""
    return random.Random(f"{seed}/{index}").getrandbits(31)
