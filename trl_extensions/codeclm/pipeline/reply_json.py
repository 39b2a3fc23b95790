"""JSON in replies that were not asked for it: whole, cut off, or as Python writes it."""

from __future__ import annotations

import ast
import json
import re
from typing import Any


_START = re.compile(r"^[ \t]*(?:`{3,}\w*[ \t]*)?(?=[\[{])", re.MULTILINE)
_MARKED = re.compile(r"[\s>*_#]*(?:[\d(\[•①-⑳-]|\w+\s*#?\d|[A-Za-z][.)]\s)")
_DECODER = json.JSONDecoder(strict=False)
_MOST_TALK = 3


def json_values(text: str) -> list[Any]:
    """The elements of the JSON list of which a reply consists, or the objects if it has some but no list around them.

    Of a list that was cut off, or has a mistake in it, these are the elements before that. At most three lines of talk
    may stand before it, so that an instruction with JSON in it is not taken for a list.

    Args:
        text: The reply without thoughts.

    Returns:
        Texts, objects and lists, possibly none.
    """
    start = _START.search(text)
    if start is None:
        return []
    talk = [line for line in text[: start.start()].splitlines() if line.strip(" `")]
    if len(talk) > _MOST_TALK or any(_MARKED.match(line) for line in talk):
        return []
    text = text[start.end() :]
    values = _elements(text[1:]) if text[0] == "[" else _elements(text)
    if not values and text[0] == "[":
        values = _python_list(text)
    if any(not isinstance(value, (str, dict, list)) for value in values):
        return []
    return values


def _elements(text: str) -> list[Any]:
    """Values one after the other, with or without commas, up to what is none."""
    values, place = [], 0
    while True:
        place += re.compile(r"[\s,]*").match(text, place).end() - place
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return values
        values.append(value)


def _python_list(text: str) -> list[Any]:
    end = text.rfind("]") + 1
    try:
        value = ast.literal_eval(text[:end])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) else []
