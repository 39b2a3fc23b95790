"""What a principle asks for, as something that can be counted in a response, and how often responses do it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any, Self, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..core.extras import import_extra
from ..core.generation.sampling import completion_text
from ..core.stats import wilson
from ..core.text import SPACELESS, pattern_finder


_ONLY_THESE = ConfigDict(extra="forbid")
# What a line of a list begins with: "- ", "* ", "1. ", "a) ", and in Japanese "・", "１．" or "①"
_ITEM = re.compile(
    r"^[ \t\u3000]*(?:(?:[-*+•‣◦▪–—]|[0-9]{1,2}[.)]|[a-zA-Z]\))\s+|(?:[・･●○◆■□①-⑳]|[0-9０-９]{1,2}[．、）])\s*)"
    r"(?=\S)",
    re.MULTILINE,
)
# A full stop ends a sentence where no lower-case word follows ("e.g. this"); 。！？ always do
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]*_]*\s+(?![a-z])|(?<=[。！？．])[」』）\"]*|\n+")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def count_words(text: str) -> int:
    """Words; two characters of a script without spaces (Chinese, Japanese, Thai, ...) are one."""
    rest, characters = SPACELESS.subn(" ", _ITEM.sub("", text))
    return len(_WORD.findall(rest)) + (characters + 1) // 2


def count_list_items(text: str) -> int:
    """Lines that begin with a bullet or a number."""
    return len(_ITEM.findall(text))


def count_sentences(text: str) -> int:
    """Sentences, where a line of a list or a heading is one too; one that was cut off counts."""
    return sum(any(map(str.isalnum, part)) for part in _SENTENCE_END.split(_ITEM.sub("", text)))


def _as_range(value: Any) -> Any:
    return {"at_least": value, "at_most": value} if isinstance(value, int) else value


@pydantic_dataclass(frozen=True, config=_ONLY_THESE)
class Range:
    """Bounds of a count, both included. In YAML a number alone is exactly that number."""

    at_least: Annotated[StrictInt, Field(ge=0)] | None = None
    at_most: Annotated[StrictInt, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise ValueError("give `at_least`, `at_most` or a number")
        if low is not None and high is not None and low > high:
            raise ValueError(f"`at_least` {low} is above `at_most` {high}")
        return self

    def holds(self, count: int) -> bool:
        return (self.at_least or 0) <= count <= (math.inf if self.at_most is None else self.at_most)


Count = Annotated[Range, BeforeValidator(_as_range)]
# From (instruction, query, response) to whether each is followed, None where the reply could not be read
Judge: TypeAlias = Callable[[list[tuple[str, str, str]]], list[bool | None]]
_COUNTED = ("words", "sentences", "list_items", "regex", "language")


@pydantic_dataclass(frozen=True, config=_ONLY_THESE)
class Check:
    """What a response has that does what it was told. All that is given must hold.

    Args:
        words: How many (two characters of a script without spaces are one).
        sentences, list_items: How many, see `count_sentences` and `count_list_items`.
        regex: Python regular expression found somewhere in the response; `(?i)`, `(?m)` and `(?s)` at its beginning.
        language: Code such as `ja`, guessed by py3langid.
        judge: Instead of all that, the model of the setting `judge` says whether the response follows the instruction.
    """

    words: Count | None = None
    sentences: Count | None = None
    list_items: Count | None = None
    regex: str | None = None
    language: str | None = None
    judge: StrictBool = False

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str | None) -> str | None:
        pattern_finder(regex or "", "`regex`")
        return regex

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        given = [name for name in _COUNTED if getattr(self, name) is not None]
        if bool(given) == self.judge:
            raise ValueError(f"give `judge: true` alone, or some of {', '.join(_COUNTED)}")
        return self

    def holds(self, text: str) -> bool:
        """Whether a response has what is counted."""
        counts = ((self.words, count_words), (self.sentences, count_sentences), (self.list_items, count_list_items))
        if not all(own is None or own.holds(count(text)) for own, count in counts):
            return False
        if self.regex is not None and next(pattern_finder(self.regex, "`regex`")(text), None) is None:
            return False
        return self.language is None or language_guesser(self.language)(text)


@pydantic_dataclass(frozen=True, config=_ONLY_THESE)
class PrincipleCheck(Check):
    """The `check` of a principle is that of its definition; `antithesis` is the antithesis' own, by default that the
    first does not hold."""

    antithesis: Check | None = None

    @property
    def parts(self) -> list[Check]:
        """The check itself, and that of the antithesis where it has its own."""
        return [self] if self.antithesis is None else [self, self.antithesis]

    def obeyed(self, definition: bool, text: str) -> bool | None:
        """Whether a response does what the definition (or else the antithesis) asks for; None if a judge must say."""
        own = self if definition or self.antithesis is None else self.antithesis
        if own.judge:
            return None
        return own.holds(text) == (definition or self.antithesis is not None)


@functools.cache
def language_guesser(language: str) -> Callable[[str], bool]:
    """A function that says whether a text is in a language; `ValueError` for a code that is not known."""
    py3langid = import_extra("py3langid")
    known = {code for code, _ in py3langid.rank("")}
    if language not in known:
        raise ValueError(f"`language`: {language!r} is not told apart; known are {', '.join(sorted(known))}.")
    return lambda text: py3langid.classify(text)[0] == language


def disobeys(
    checks: Mapping[str, PrincipleCheck | None], choices: Sequence[Mapping[str, bool]], number: int, text: str
) -> bool:
    """Whether the response of a row with that `number` fails a check that can be counted. `choices` are those of the
    row: principles chosen alike in all of its constitutions do not count, for they contrast nothing."""
    return any(
        own is not None and own.obeyed(choices[number][name], text) is False
        for name, own in checks.items()
        if len({one[name] for one in choices}) > 1
    )


def obedience(
    principles: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    originals: Sequence[Mapping[str, Any]] = (),
    judge: Judge | None = None,
) -> dict[str, Any]:
    """How often responses (rows of `sample_rows`) do what each principle asked of them, and the original's.

    JSON-ready, by name and by `definition`, `antithesis` and `all` of both, where the principle has a check that can
    be made: `n` (responses), `queries`, `unread` (by the judge), `obeyed` (share with Wilson's 95 % interval) and,
    with `originals`, their share `original` and the paired `difference`, see `paired_difference`. Responses to one
    query are alike, so each is a mean over queries, and intervals count these.
    """
    now, before = (_followed(principles, own, judge) for own in (rows, originals))
    result: dict[str, Any] = {}
    for (name, side), found in now.items():
        read = {place: own for place, own in found.items() if own is not None}
        if not read:
            continue
        old = {place: own for place, own in before.get((name, side), {}).items() if own is not None}
        shares = _by_query(read, read)
        entry = {
            "n": len(read),
            "unread": len(found) - len(read),
            "queries": len(shares),
            "obeyed": proportion(shares),
        }
        if both := [place for place in read if place in old]:
            after, original = _by_query(read, both), _by_query(old, both)
            entry["original"] = proportion(original)
            entry["difference"] = paired_difference([a - b for a, b in zip(after, original, strict=True)])
        result.setdefault(name, {})[side] = entry
    return result


def _by_query(found: Mapping[tuple[str, int], bool | None], places: Iterable[tuple[str, int]]) -> list[float]:
    """Of what is found at places (query, number) the mean by query."""
    by_query: dict[str, list[Any]] = {}
    for place in places:
        by_query.setdefault(place[0], []).append(found[place])
    return [fmean(own) for own in by_query.values()]


def proportion(values: Sequence[float]) -> dict[str, float]:
    """Mean of values in [0, 1] with Wilson's 95 % interval, JSON-ready."""
    low, high = wilson(min(sum(values), len(values)), len(values))
    return {"value": fmean(values), "low": low, "high": high}


def paired_difference(values: Sequence[float]) -> dict[str, float]:
    """Mean of differences in [-1, 1] with standard error and 95 % interval after Agresti and Min (2005): as if there
    were two more pairs, with 1/2 in each of the four cells, so that it has a width where nothing or all changed."""
    n = len(values) + 2
    centre = sum(values) / n
    error = math.sqrt(((sum(value * value for value in values) + 1) / n - centre * centre) / n)
    low, high = max(centre - 1.96 * error, -1.0), min(centre + 1.96 * error, 1.0)
    return {"value": fmean(values), "se": error, "low": low, "high": high}


def _followed(
    principles: Sequence[Any], rows: Sequence[Mapping[str, Any]], judge: Judge | None
) -> dict[tuple[str, str], dict[tuple[str, int], bool | None]]:
    """By principle and side: at (id of the query, number of the response) whether it is obeyed, None if unread; what
    only a judge can say is left out where there is none."""
    found: dict[tuple[str, str], dict[tuple[str, int], bool | None]] = {}
    asked = []
    for principle in (principle for principle in principles if principle.check is not None):
        for definition, side in ((True, "definition"), (False, "antithesis")):
            own = found[principle.name, side] = {}
            for row in rows:
                for number, (choices, completion) in enumerate(zip(row["choices"], row["completions"], strict=True)):
                    if choices.get(principle.name) is not definition:
                        continue
                    text, place = completion_text(completion), (row["id"], number)
                    obeyed = principle.check.obeyed(definition, text)
                    if obeyed is None and judge is None:
                        continue
                    own[place] = obeyed if text.strip() else False  # an empty response would be a very short one
                    if own[place] is None:
                        asked.append((own, place, (principle.wordings(definition)[0], row["query"], text)))
    answers = judge([question for *_, question in asked]) if judge is not None and asked else []
    for (own, place, _), answer in zip(asked, answers, strict=True):
        own[place] = answer
    for name in dict.fromkeys(name for name, _ in found):
        found[name, "all"] = found[name, "definition"] | found[name, "antithesis"]
    return found
