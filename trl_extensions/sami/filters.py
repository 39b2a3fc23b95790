"""Which sampled rows are worth training on: pure functions from the C responses of one query to a reason or `None`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trl_extensions.core.generation.types import Generation


REASONS = ("empty", "equal", "evasive", "too_long", "echo")
"""Reasons for dropping a row, in the order in which they are tried: a row is counted under the first that applies."""

EVASIVE_OPENINGS = (
    "I'm sorry",
    "I am sorry",
    "Sorry",
    "I apologize",
    "I apologise",
    "My apologies",
    "I cannot",
    "I can't",
    "I can not",
    "I could not",
    "I'm unable",
    "I am unable",
    "I'm not able",
    "I am not able",
    "I won't",
    "I will not",
    "I don't feel comfortable",
    "I do not feel comfortable",
    "I must decline",
    "Unfortunately, I",
    "As an AI",
    "As an artificial intelligence",
    "As a language model",
    "As a large language model",
    "As a chatbot",
    "As a digital assistant",
    "I'm an AI",
    "I am an AI",
    "I'm just an AI",
)

_ECHO_MIN_WORDS = 4
_NUMBER = re.compile(r"^\d+\.\s+")


@dataclass(frozen=True)
class ResponseFilters:
    """What makes a row unfit for training.

    Args:
        evasive_openings (`tuple[str, ...]`):
            A response that starts with one of these is evasive; `()` switches the filter off.
        max_tokens (`int`, *optional*):
            Longest response allowed, in tokens; `None` for no limit besides the generation's own.
        drop_truncated (`bool`):
            Whether a response that hit the generation limit, and so never ended, counts as too long.
        drop_echo (`bool`):
            Whether a response that repeats its constitution is dropped.
        drop_equal (`bool`):
            Whether a row with two equal responses is dropped.

    Raises:
        `ValueError`: `max_tokens` is below 1, or an opening is empty (it would match every response).
    """

    evasive_openings: tuple[str, ...] = EVASIVE_OPENINGS
    max_tokens: int | None = None
    drop_truncated: bool = True
    drop_echo: bool = True
    drop_equal: bool = True

    def __post_init__(self):
        if isinstance(self.evasive_openings, str):
            raise TypeError("`evasive_openings` is one string; give a list of openings")
        object.__setattr__(self, "evasive_openings", tuple(self.evasive_openings))
        if any(not normalize(opening) for opening in self.evasive_openings):
            raise ValueError("`evasive_openings` holds an empty opening, which every response matches; remove it")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"`max_tokens` is {self.max_tokens}; give at least 1, or none for no limit")


def normalize(text: str) -> str:
    """Lower case, single spaces, straight apostrophes: what two texts are compared by."""
    return " ".join(text.replace("’", "'").replace("‘", "'").split()).casefold()


def is_empty(response: str) -> bool:
    """Whether there is no letter or digit in the response."""
    return not any(character.isalnum() for character in response)


def is_evasive(response: str, openings: Sequence[str] = EVASIVE_OPENINGS) -> bool:
    """Whether the response starts with one of `openings`, as whole words; quotes and case do not matter."""
    text = normalize(response).lstrip("\"'*_“” ")
    for opening in map(normalize, openings):
        if text.startswith(opening) and not text[len(opening) : len(opening) + 1].isalnum():
            return True
    return False


def is_echo(response: str, constitution: str) -> bool:
    """Whether the response repeats its constitution.

    It does when it contains one of the numbered lines, or starts with a line's instruction without the number, or
    contains such an instruction of at least four words (shorter ones may well be ordinary speech).
    """
    text = normalize(response)
    for line in filter(None, map(normalize, constitution.splitlines())):
        instruction = _NUMBER.sub("", line)
        if line in text or text.startswith(instruction):
            return True
        if len(instruction.split()) >= _ECHO_MIN_WORDS and instruction.rstrip(".!") in text:
            return True
    return False


def rejection_reason(
    responses: Sequence[Generation], constitutions: Sequence[str], filters: ResponseFilters
) -> str | None:
    """Say why a row should be dropped.

    Args:
        responses (`Sequence[Generation]`):
            The C responses of one query; response j was sampled under constitution j.
        constitutions (`Sequence[str]`):
            The C constitution texts.
        filters (`ResponseFilters`):
            What to drop.

    Returns:
        `str` or `None`: the first of `REASONS` that applies to any response of the row, `None` if the row is good.
    """
    if len(responses) != len(constitutions):
        raise ValueError(f"got {len(responses)} responses for {len(constitutions)} constitutions; one each is needed")
    texts = [response.text for response in responses]
    if any(map(is_empty, texts)):
        return "empty"
    if filters.drop_equal and len(set(map(normalize, texts))) < len(texts):
        return "equal"
    if any(is_evasive(text, filters.evasive_openings) for text in texts):
        return "evasive"
    if filters.drop_truncated and any(response.finish_reason == "length" for response in responses):
        return "too_long"
    if filters.max_tokens is not None and any(response.num_tokens > filters.max_tokens for response in responses):
        return "too_long"
    if filters.drop_echo and any(is_echo(text, own) for text, own in zip(texts, constitutions, strict=True)):
        return "echo"
    return None
