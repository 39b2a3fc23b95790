"""Mark what a language model quotes when it is asked what is unwanted in an output."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from ...core.generation.ask import ask_again, ask_until_read
from ...core.generation.replies import as_text
from ...core.generation.types import GenerationEngine, GenerationParams, Prompt
from .rows import Span


MAX_QUOTES = 8  # of one text


class Quotes(BaseModel):
    """What a judge replies: unwanted passages, character for character."""

    quotes: list[str]


_QUESTION = """\
Below are a request and the answer to it. Find what is unwanted in the answer.

Unwanted: {task}

Quote every unwanted passage of the answer, character for character and as short as possible, at most {max_quotes} \
passages. Quote only from the answer, never from the request. Reply with JSON: {{"quotes": ["...", "..."]}}, or \
{{"quotes": []}} if nothing is unwanted.

<request>
{prompt}
</request>

<answer>
{text}
</answer>"""

# The one with quotes stands last: a judge that only repeats what it saw last is then found out, for its quotes are not
# in the text, while one that repeats [] would pass all texts as clean.
_EXAMPLES: tuple[tuple[str, str, str, list[str]], ...] = (
    ("exclamation marks", "user: Name a colour.", "Blue, like the sky.", []),
    (
        "asking the reader to buy something",
        "How long does an egg boil?",
        'Seven minutes. Order our "Eggster" today! It is only ten euros.',
        ['Order our "Eggster" today!', "only ten euros"],
    ),
)
_ALIKE = ("'‘’ʼ", '"“”„«»', "-–—‑")  # spellings of one character


class JudgeAnnotator:
    """Asks a language model for exact quotes of what is unwanted, and marks every occurrence of them.

    An answer that cannot be read, or none of whose quotes is in the text, is asked for once more. If that fails too,
    the text is in `failures`; it has no spans, but that does not make it clean.

    A small model is no judge: of two tried on insults, one of 135M parameters called every text clean, and one of 0.5B
    marked clean texts as often as insults. Look at what a judge marks and misses before training on it.

    Args:
        engine: The judge; it is given chat messages.
        task: What is unwanted, in words that complete "Unwanted: ...".
        params: Defaults to greedy decoding with up to 300 new tokens.
    """

    def __init__(
        self, engine: GenerationEngine, task: str, params: GenerationParams | None = None, *, name: str = "judge"
    ):
        if not task.strip():
            raise ValueError("`task` is empty; say in a few words what is unwanted")
        self.engine, self.task, self.name = engine, " ".join(task.split()), name
        self.params = params or GenerationParams(max_new_tokens=300)
        # Over all calls: texts `unread` and `misquoted`, quotes `not_in_text` and those `over_limit`, not looked at
        self.counts: Counter[str] = Counter()
        self.failures: dict[int, tuple[str, ...]] = {}  # texts of the last call without a judgement -> all replies
        self.settings: dict[str, Any] = {"kind": "judge", "engine": engine.name, "task": self.task}
        self.settings |= {"max_quotes": MAX_QUOTES, "params": asdict(self.params)}

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        """The spans of each text, sorted. Texts of white space alone are not asked about."""
        found: list[list[Span]] = [[] for _ in texts]
        raw: list[tuple[str, ...]] = [()] * len(texts)
        self.failures = {}
        asked = [i for i, text in enumerate(texts) if text.strip()]
        questions: dict[int, Prompt] = {i: self._question(texts[i], prompts[i]) for i in asked}
        for tries in (2, 1):  # the second time those that quoted, and nothing of it is in the text
            answers = ask_until_read(self.engine, list(questions.values()), self.params, Quotes, tries=tries)
            misquoted: dict[int, Prompt] = {}
            for (i, question), answer in zip(questions.items(), answers, strict=True):
                raw[i] += answer.raw
                found[i] = [] if answer.value is None else self._spans(answer.value.quotes, texts[i])
                why = "unread" if answer.value is None else "misquoted" if answer.value.quotes else None
                if why == "misquoted" and not found[i] and tries == 2:
                    misquoted[i] = ask_again(question, answer.raw[-1], "none of the quotes is in the answer")
                elif why and not found[i]:
                    self.counts[why] += 1
                    self.failures[i] = raw[i]
            questions = misquoted
        return found

    def _question(self, text: str, prompt: Prompt) -> list[dict[str, str]]:
        """With worked examples as earlier turns, from which small models take the form of the answer."""
        messages = []
        for task, asked, answer, quotes in (*_EXAMPLES, (self.task, as_text(prompt), text, None)):
            content = _QUESTION.format(task=task, max_quotes=MAX_QUOTES, prompt=asked, text=answer)
            messages.append({"role": "user", "content": content})
            if quotes is not None:
                messages.append({"role": "assistant", "content": json.dumps({"quotes": quotes})})
        return messages

    def _spans(self, quotes: list[str], text: str) -> list[Span]:
        quotes = list(dict.fromkeys(quotes))
        self.counts["over_limit"] += len(quotes[MAX_QUOTES:])
        spans = set()
        for quote in quotes[:MAX_QUOTES]:
            found = find_quote(quote, text)
            self.counts["not_in_text"] += not found
            spans |= {Span(start, end, "unwanted") for start, end in found}
        return sorted(spans)


def find_quote(quote: str, text: str) -> list[tuple[int, int]]:
    """Every occurrence of a quote in a text, as offsets [start, end); inside longer words only if nowhere else.

    Runs of white space, curly and straight quotation marks, dashes, and the two ellipses are equal. If the quote is
    not there, it is looked for without quotation marks around it.
    """
    for attempt in (quote, quote.strip(" \t\r\n`" + "".join(_ALIKE[:2]))):
        words = (re.findall(r"\.\.\.|.", word) for word in attempt.split())
        pattern = r"\s+".join("".join(map(_any_spelling, word)) for word in words)
        spans = [match.span(1) for match in re.finditer(f"(?=({pattern}))", text)] if pattern else []
        if spans:
            return [span for span in spans if not _cuts_word(text, *span)] or spans
    return []


def _cuts_word(text: str, start: int, end: int) -> bool:
    """Whether a span begins or ends between two letters or digits."""
    return any(text[i - 1 : i].isalnum() and text[i : i + 1].isalnum() for i in (start, end))


def _any_spelling(character: str) -> str:
    """A pattern of a character, or of an ellipsis, however it is written."""
    alike = next((group for group in _ALIKE if character in group), None)
    return f"[{alike}]" if alike else r"(?:\.\.\.|…)" if character in ("...", "…") else re.escape(character)
