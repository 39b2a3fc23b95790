"""Mark what a text classifier objects to: sentence by sentence, or window by window of a few words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from ...core.generation.types import Prompt
from ...core.text import TextClassifier, load_profanity_check
from .rows import Span, merge_spans


Unit: TypeAlias = Literal["sentence", "window"]
WINDOW, STRIDE = 12, 6  # words in a window, and from the start of one to that of the next
_MAX_SENTENCE_WORDS = 60
_LINE = re.compile(r"[^\r\n\u2028\u2029]+")
# Bullet, number, quotation mark or heading in front of a line: never said by anyone, so never unwanted
_MARKER = re.compile(r"\s*(?:(?:[-*+•–—>]|#{1,6}|\(?\d{1,3}[.)]|\(?[a-zA-Z]\))\s+)*")
_STOP = re.compile(r"[.!?…]+(?P<closer>[\"'”’»)\]*_]*)(?=\s|$)|[。！？]+[”’」』）]*")
_BLANK_WORD = re.compile(r"\S+")
_WORD = re.compile(r"[^\W_]+(?:(?:['’-]|[*@$#]+)[^\W_]+)*")
# What a full stop may follow without ending a sentence: always, and before a number
_TITLE = re.compile(r"(?i:mrs?|m[sx]|dr|prof|st|gen|col|sgt|capt|lt|rev|hon|mt|messrs|vs|cf|viz)")
_BEFORE_NUMBER = re.compile(
    "(?i:nos?|figs?|eq|sec|ch|art|vol|pp?|ca|approx|jan|feb|mar|apr|ju[nl]|aug|sept?|oct|nov|dec)"
)
_DOTTED = re.compile(r"(?!(?i:[ap]\.m))(?:[^\W\d_]\.)+[^\W\d_]|(?!I)[^\W\d_]")  # "e.g", "U.S", an initial


class ClassifierAnnotator:
    """Marks the sentences, or windows of words, to which a sequence classifier gives a label.

    Overlapping marked windows become one span. The classifier sees each piece alone, without the prompt, and only its
    first tokens if there are more of them than it takes.

    Args:
        model, label: See `core.text.TextClassifier`; the label is the one that means unwanted.
        threshold: A piece is marked if its score is above this; a probability, between 0 and 1.
        unit: `"sentence"`, or `"window"`: `WINDOW` words at a time.
    """

    def __init__(
        self, model: str, label: str | None = None, threshold: float = 0.5, unit: Unit = "sentence", *,
        name: str = "classifier",
    ):  # fmt: skip
        settings = _checked(threshold, unit)
        self._classifier = TextClassifier(model, label)
        self.name, self.label, self.threshold, self.unit = name, self._classifier.label, threshold, unit
        self.settings: dict[str, Any] = {"kind": "classifier", "model": str(model), "label": self.label, **settings}

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        flagged = _above(texts, self.unit, self.threshold, self._classifier.score)
        return [[Span(start, end, str(self.label)) for start, end in merge_spans(spans)] for spans in flagged]


class ProfanityAnnotator:
    """Marks profanity by the linear model of the package `alt-profanity-check`, which runs in moments without a GPU.

    In a piece above the threshold only the words are marked that are above it by themselves; the whole piece if none
    is. Training then removes few tokens, which is what leaves the rest in place. Arguments: see `ClassifierAnnotator`.
    """

    def __init__(self, threshold: float = 0.5, unit: Unit = "sentence", *, name: str = "profanity"):
        settings = _checked(threshold, unit)
        self._score = load_profanity_check()
        self.name, self.threshold, self.unit = name, threshold, unit
        self.settings: dict[str, Any] = {"kind": "profanity", "narrow": True, **settings}

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        flagged = _above(texts, self.unit, self.threshold, self._score)
        words = [
            [[(match[0], match.span()) for match in _WORD.finditer(text, *span)] for span in spans]
            for text, spans in zip(texts, flagged, strict=True)
        ]
        distinct = list(dict.fromkeys(word for row in words for found in row for word, _ in found))
        scores = dict(zip(distinct, self._score(distinct), strict=True)) if distinct else {}
        found = []
        for spans, row in zip(flagged, words, strict=True):
            narrow = [[at for word, at in own if scores[word] > self.threshold] for own in row]
            parts = [part for span, own in zip(spans, narrow, strict=True) for part in own or [span]]
            found.append([Span(start, end, "profanity") for start, end in merge_spans(parts)])
        return found


def _checked(threshold: float, unit: str) -> dict[str, Any]:
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` is {threshold}; give a probability between 0 and 1")
    if unit not in ("sentence", "window"):
        raise ValueError(f"`unit` is {unit!r}; give 'sentence' or 'window'")
    return {"threshold": threshold, "unit": unit, "window": WINDOW, "stride": STRIDE}


def _above(
    texts: Sequence[str], unit: str, threshold: float, score: Callable[[list[str]], list[float]]
) -> list[list[tuple[int, int]]]:
    """The pieces of each text that score above the threshold. Equal ones are scored once, in order of length."""
    rows = [[(text[start:end], (start, end)) for start, end in pieces(text, unit)] for text in texts]
    distinct = sorted({piece for row in rows for piece, _ in row}, key=lambda piece: (len(piece), piece))
    scores = dict(zip(distinct, score(distinct), strict=True)) if distinct else {}
    return [[span for piece, span in row if scores[piece] > threshold] for row in rows]


def pieces(text: str, unit: str) -> list[tuple[int, int]]:
    """Offsets [start, end) of what is scored at once; a sentence of more than 60 words counts as several."""
    if unit == "window":
        return word_windows(text, WINDOW, STRIDE)
    return [
        (start + first, start + last)
        for start, end in split_sentences(text)
        for first, last in word_windows(text[start:end], _MAX_SENTENCE_WORDS, _MAX_SENTENCE_WORDS)
    ]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Offsets [start, end) of the sentences of a text, without the white space around them.

    A line break always ends a sentence; bullets, numbers, quotation marks and headings that begin a line are in none.
    Inside a line `.`, `!`, `?` and `…` do, with closing quotes and brackets, before white space; not after a title
    ("Dr."), an initial, "e.g." or "No." before a number, nor where the text goes on in lower case after a full stop or
    a closing quote. Chinese and Japanese marks always do.
    """
    sentences = []
    for line in _LINE.finditer(text):
        marker = _MARKER.match(text, line.start(), line.end())
        start = marker.end() if marker else line.start()
        for stop in _STOP.finditer(text, start, line.end()):
            if _ends_sentence(text, start, stop):
                sentences.append((start, stop.end()))
                start = stop.end()
        sentences.append((start, line.end()))
    return [
        (end - len(sentence.lstrip()), start + len(sentence.rstrip()))
        for start, end in sentences
        if (sentence := text[start:end]).strip()
    ]


def word_windows(text: str, window: int, stride: int) -> list[tuple[int, int]]:
    """Offsets [start, end) of runs of `window` words, one every `stride` words; the last ends with the text."""
    words = [match.span() for match in _BLANK_WORD.finditer(text)]
    if not words:
        return []
    last = max(len(words) - window, 0)
    starts = [*range(0, last, stride), last]
    return [(words[first][0], words[min(first + window, len(words)) - 1][1]) for first in starts]


def _ends_sentence(text: str, start: int, stop: re.Match[str]) -> bool:
    if stop["closer"] is None:  # Chinese and Japanese marks stand for nothing else
        return True
    following = text[stop.end() :].lstrip()[:1]
    if following.islower() and (stop[0].startswith((".", "…")) or stop["closer"]):
        return False
    if stop[0] != ".":
        return True
    word = re.split(r"\s", text[start : stop.start()])[-1].lstrip("\"'“‘([*_")
    if following.isdigit() and _BEFORE_NUMBER.fullmatch(word):
        return False
    return not (_TITLE.fullmatch(word) or _DOTTED.fullmatch(word))
