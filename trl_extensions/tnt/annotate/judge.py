"""Mark what a language model quotes when it is asked what is unwanted in an output."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...core.generation.replies import as_text, fenced_parts, without_fences, without_thoughts
from ...core.generation.types import GenerationEngine, GenerationParams, Prompt
from .rows import Failure, Span


_QUESTION = """\
Below are a request and the answer to it. Find what is unwanted in the answer.

Unwanted: {task}

Quote every unwanted passage of the answer, character for character and as short as possible, at most {max_quotes} \
passages. Quote only from the answer, never from the request. Reply with a JSON list of strings, or with [] if \
nothing is unwanted.

<request>
{prompt}
</request>

<answer>
{text}
</answer>"""

_QUESTION_AGAIN = """\
<request>
{prompt}
</request>

<answer>
{text}
</answer>

Which words inside <answer> are unwanted? Unwanted means: {task}

Write nothing but one JSON list. Each entry is copied exactly from <answer>; there are at most {max_quotes} of them, \
and none ([]) if all of it is fine. Begin your reply with the character [."""

# The one with quotes stands last: a judge that only repeats what it saw last is then found out, for its quotes are not
# in the text, while one that repeats [] would pass all texts as clean.
_EXAMPLES = (
    {
        "task": "exclamation marks",
        "prompt": "user: Name a colour.",
        "text": "Blue, like the sky.",
        "reply": "[]",
    },
    {
        "task": "asking the reader to buy something",
        "prompt": "How long does an egg boil?",
        "text": 'Seven minutes. Order our "Eggster" today! It is only ten euros.',
        "reply": json.dumps(['Order our "Eggster" today!', "only ten euros"]),
    },
)

_JSON_STRING = r'"(?:[^"\\]|\\.)*"'
_UNFINISHED_LIST = re.compile(rf"\[\s*((?:{_JSON_STRING}\s*,\s*)*{_JSON_STRING})")
_ENTRY = re.compile(r"^\s*(?:(?:\(?\d{1,3}[.):]|[-*•–])\s+(?P<listed>\S.*?)|(?P<quoted>[\"“][^\"“”]+[\"”],?))\s*$")
_OPENING_QUOTE = re.compile(r"""^(?:"(.+?)"|“(.+?)”|'(.+)'|‘(.+?)’|`(.+?)`)(?=$|[\s,.;:(–—-])""")
_NOTHING = re.compile(
    r"n/?a|no|no,? there\b.*|(?:there (?:is|are) )?(?:none|nothing|no (?:unwanted|such|passage|quote|part))\b.*"
    r"|all of it is fine|the answer is fine",
    re.IGNORECASE,
)
_MAX_NOTHING_WORDS = 15
_NORMAL = {"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'}
_NORMAL |= {"–": "-", "—": "-", "‑": "-", "…": "..."}


class JudgeAnnotator:
    """Asks a language model for exact quotes of what is unwanted, and marks every occurrence of them.

    An answer out of which no list can be read, or none of whose quotes is in the text, is asked for once more, in
    other words and with another seed. If that fails too, the text is in `failures`; it has no spans, but that does not
    make it clean. `annotate_rows` sets such rows aside.

    A small model is no judge: of two tried on insults, one of 135M parameters called every text clean, and one of 0.5B
    marked clean texts as often as insults. Look at what a judge marks and misses before training on it.

    Attributes:
        counts: Over all calls: `unparsed` and `misquoted` texts (those in `failures`), quotes that are `not_in_text`
            and so marked nothing, and quotes `over_limit` that were not looked at.
        failures: The texts of the last call that could not be judged, with both answers.

    Args:
        engine: The judge; it is given chat messages.
        task: What is unwanted, in words that complete "Unwanted: ...".
        max_quotes: Quotes a text at most.
        params: Defaults to greedy decoding with up to 300 new tokens.
        name: Who marked the spans.

    Raises:
        ValueError: The task is empty or `max_quotes` below 1.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        task: str,
        max_quotes: int = 8,
        params: GenerationParams | None = None,
        *,
        name: str = "judge",
    ):
        if not task.strip():
            raise ValueError("`task` is empty; say in a few words what is unwanted")
        if max_quotes < 1:
            raise ValueError(f"`max_quotes` is {max_quotes}; ask for at least 1")
        self.engine = engine
        self.task = " ".join(task.split())
        self.max_quotes = max_quotes
        self.params = params or GenerationParams(max_new_tokens=300)
        self.name = name
        self.counts: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.settings: dict[str, Any] = {
            "kind": "judge",
            "engine": engine.name,
            "task": self.task,
            "max_quotes": max_quotes,
            "params": self.params.as_dict(),
        }

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        """The spans of each text, sorted. Texts of white space alone are not asked about."""
        spans: dict[int, list[Span] | None] = {}
        answers: dict[int, list[str]] = {}
        asked = [index for index, text in enumerate(texts) if text.strip()]
        for turn, question in enumerate((_first_question, _second_question)):
            params = replace(self.params, seed=self.params.seed + turn)
            questions = [question(self.task, self.max_quotes, texts[i], prompts[i]) for i in asked]
            for place, answer in self.engine.generate(questions, params) if questions else ():
                index = asked[place]
                answers.setdefault(index, []).append(answer.text)
                spans[index] = self._read(answer.text, texts[index])
            asked = [index for index in asked if spans[index] is None]
        self.failures = [Failure(index, tuple(answers[index])) for index in asked]
        for failure in self.failures:
            self.counts["unparsed" if parse_quotes(failure.answers[-1]) is None else "misquoted"] += 1
        return [spans.get(index) or [] for index in range(len(texts))]

    def _read(self, answer: str, text: str) -> list[Span] | None:
        """What an answer marks; `None` if it cannot be read, or quotes and yet marks nothing."""
        quotes = parse_quotes(answer)
        if quotes is None:
            return None
        quotes = list(dict.fromkeys(quotes))
        self.counts["over_limit"] += len(quotes[self.max_quotes :])
        spans = set()
        for quote in quotes[: self.max_quotes]:
            found = find_quote(quote, text)
            self.counts["not_in_text"] += not found
            spans |= {Span(start, end, "unwanted") for start, end in found}
        return sorted(spans) if spans or not quotes else None


def _first_question(task: str, max_quotes: int, text: str, prompt: Prompt) -> list[dict[str, str]]:
    """With worked examples as earlier turns, from which small models take the form of the answer."""
    messages = []
    for example in _EXAMPLES:
        content = _QUESTION.format(max_quotes=max_quotes, **example)
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": example["reply"]}]
    content = _QUESTION.format(task=task, max_quotes=max_quotes, prompt=as_text(prompt), text=text)
    return [*messages, {"role": "user", "content": content}]


def _second_question(task: str, max_quotes: int, text: str, prompt: Prompt) -> list[dict[str, str]]:
    content = _QUESTION_AGAIN.format(task=task, max_quotes=max_quotes, prompt=as_text(prompt), text=text)
    return [{"role": "user", "content": content}]


def parse_quotes(answer: str) -> list[str] | None:
    """Read a list of quotes out of a model's answer.

    Understands a JSON list (of strings, or of objects with one string under "quote", "text" or "passage"), also in a
    code fence, inside prose or an object, with single quotes, or cut off in the middle; otherwise numbered, bulleted
    or quoted lines; otherwise a short sentence to say that there is nothing.

    Args:
        answer: The text of the answer; thoughts inside `<think>` are not read.

    Returns:
        The quotes, without those of white space alone; `None` if the answer is none of these.
    """
    answer = without_thoughts(answer)
    lists = [quotes for part in [*fenced_parts(answer), answer] for quotes in _lists(part)]
    if lists:
        return max(lists, key=len)
    lines = [quote for line in without_fences(answer).splitlines() if (quote := _line_quote(line))]
    if lines:
        return lines
    plain = answer.strip(" \n\t\"'`*.")
    if _NOTHING.fullmatch(plain) and len(plain.split()) <= _MAX_NOTHING_WORDS and not re.search(r"[\"“”:\n]", plain):
        return []
    return None


def find_quote(quote: str, text: str) -> list[tuple[int, int]]:
    """Every occurrence of a quote in a text, as offsets [start, end).

    Runs of white space, curly and straight quotation marks, dashes, and the two ellipses are equal. If the quote is
    not there, it is looked for without quotation marks around it. Occurrences inside longer words do not count where
    there are others.

    Args:
        quote: What a model claims to be in the text; surrounding white space is ignored.
        text: Where to look.
    """
    normal, starts, ends = _normalized(text)
    quote = _normalized(quote)[0].strip()
    for attempt in (quote, quote.strip("\"'` ")):
        if attempt and (spans := _occurrences(attempt, normal)):
            return [(starts[start], ends[end - 1]) for start, end in spans]
    return []


def _occurrences(quote: str, text: str) -> list[tuple[int, int]]:
    spans = []
    start = text.find(quote)
    while start >= 0:
        spans.append((start, start + len(quote)))
        start = text.find(quote, start + 1)
    return [span for span in spans if not _cuts_word(text, *span)] or spans


def _cuts_word(text: str, start: int, end: int) -> bool:
    """Whether a span begins or ends between two letters or digits."""
    return (text[start - 1 : start].isalnum() and text[start].isalnum()) or (
        text[end - 1].isalnum() and text[end : end + 1].isalnum()
    )


def _normalized(text: str) -> tuple[str, list[int], list[int]]:
    """A text in one spelling, and for each of its characters where what it stands for starts and ends in `text`."""
    characters, starts, ends = [], [], []
    for match in re.finditer(r"\s+|\S", text):
        for character in " " if match[0].isspace() else _NORMAL.get(match[0], match[0]):
            characters.append(character)
            starts.append(match.start())
            ends.append(match.end())
    return "".join(characters), starts, ends


def _lists(text: str) -> Iterator[list[str]]:
    """Every list of strings in a text."""
    decoder = json.JSONDecoder(strict=False)
    for bracket in re.finditer(r"\[", text):
        try:
            value, _ = decoder.raw_decode(text, bracket.start())
        except json.JSONDecodeError:
            value = _python_list(text[bracket.start() :])
        if value is None and (unfinished := _UNFINISHED_LIST.match(text, bracket.start())):
            value = [json.loads(string, strict=False) for string in _complete_strings(unfinished[1])]
        quotes = _strings(value)
        if quotes is not None:
            yield quotes


def _python_list(text: str) -> Any:
    """A list as Python writes it, with single quotes."""
    for end in re.finditer(r"\]", text):
        try:
            return ast.literal_eval(text[: end.end()])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _complete_strings(text: str) -> list[str]:
    strings = []
    for string in re.findall(_JSON_STRING, text):
        try:
            json.loads(string, strict=False)
        except json.JSONDecodeError:  # an escape that JSON does not know
            continue
        strings.append(string)
    return strings


def _strings(value: Any) -> list[str] | None:
    """The strings of a list of strings or of objects that hold one; `None` for any other value."""
    if not isinstance(value, list):
        return None
    quotes = []
    for entry in value:
        if isinstance(entry, dict):
            entry = next((entry[key] for key in ("quote", "text", "passage") if key in entry), None)
        if not isinstance(entry, str):
            return None
        quotes.append(entry)
    return [quote for quote in quotes if quote.strip()]


def _line_quote(line: str) -> str | None:
    """The quote on a numbered, bulleted or quoted line; what follows a quotation in quotation marks is a remark."""
    match = _ENTRY.match(line)
    if match is None:
        return None
    entry = (match["listed"] or match["quoted"]).strip()
    quotation = _OPENING_QUOTE.match(entry.lstrip("*_"))
    if quotation is not None:
        return next(group for group in quotation.groups() if group is not None)
    return entry.rstrip(",").strip("*_") or None
