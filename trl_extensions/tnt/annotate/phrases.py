"""Mark words, phrases and regular expressions."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...core.generation.types import Prompt
from ...core.inputs import read_rows
from ...core.text import SPACELESS, pattern_finder
from .rows import Span


_APOSTROPHES = "'’‘ʼ＇"
_LETTER = r"[^\W_]"  # or a digit; an underscore is no letter, since Markdown writes _word_
_NOT_CONTRACTED = rf"(?![{_APOSTROPHES}][tT](?!{_LETTER}))"
_LAST_LETTERS = re.compile(rf"(?<![{_APOSTROPHES}])(?<![^\W_])[^\W\d_]+$")
_LETTERS = re.compile(rf"{_LETTER}+")
_VOWELS = "aeiou"


class PhraseAnnotator:
    """Marks every occurrence of words and phrases, and every match of regular expressions.

    Phrases: a stretch of white space matches any other, straight and curly apostrophes are equal. With `whole_words`,
    a phrase that begins or ends with a letter or digit must not go on with another one: "cat" is not in "category",
    but is in "_cat_", "(cat)", "cat-like" and before an apostrophe ("cat's", and "he" in "he'll"); only "can" is not
    in "can't". Beside a letter of a script without spaces (kana, kanji, Thai, ...) a word may begin and end anywhere.

    Args:
        phrases, patterns: What to look for, also the spans' labels. Regular expressions are used as they are (no word
            boundaries, apostrophes as written).
        ignore_case: In phrases and patterns.
        inflections: Whether the last word of a phrase may have a regular English ending (-s, -ed, -ing and the
            possessive 's). Ordinary words may be met by accident ("even", "evening"): look at a sample.
        first_word: Whether to mark of a phrase only the word it begins with ("Here" of "Here's"). What is trained
            away is then the step into the phrase, and what follows other words stays as it was.
        severities: Phrase -> its severity, a factor on the weight of its spans in training.
        labels: Phrase -> label of its spans, instead of itself: forms of one thing are counted together.
    """

    def __init__(
        self,
        phrases: Sequence[str] = (),
        patterns: Sequence[str] = (),
        *,
        ignore_case: bool = True,
        whole_words: bool = True,
        inflections: bool = False,
        first_word: bool = False,
        name: str = "phrases",
        severities: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
    ):
        phrases, patterns = _strings(phrases, "phrases"), _strings(patterns, "patterns")
        if not phrases and not patterns:
            raise ValueError("no phrases and no patterns: give at least one to look for")
        flags = re.IGNORECASE if ignore_case else re.NOFLAG
        self.name, self.whole_words, self.first_word = name, whole_words, first_word
        self.settings: dict[str, Any] = {
            "kind": "phrases", "phrases": phrases, "patterns": patterns, "ignore_case": ignore_case,
            "whole_words": whole_words, "inflections": inflections, "first_word": first_word,
        }  # fmt: skip
        self._labels = labels or {}
        self.severities = {self._labels.get(phrase, phrase): value for phrase, value in (severities or {}).items()}
        if self.severities:
            self.settings["severities"] = self.severities
        self._phrases = [(phrase, re.compile(_regex(phrase, whole_words, inflections), flags)) for phrase in phrases]
        self._patterns = [(pattern, pattern_finder(pattern, "the pattern", flags)) for pattern in patterns]
        for pattern, find in self._patterns:
            _reject_empty(next(find(""), None), pattern)

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        """The occurrences in each text, those that overlap included; prompts are not looked at."""
        return [sorted(self._spans(text)) for text in texts]

    def _spans(self, text: str) -> Iterator[Span]:
        for phrase, regex in self._phrases:
            position = 0
            while match := regex.search(text, position):
                start, end = match.span()
                position = start + 1  # "ha ha" is in "ha ha ha" twice
                if self.whole_words and _cuts_a_letter(text, start, end):
                    continue
                first = _LETTERS.match(text, start, end) if self.first_word else None
                yield Span(start, first.end() if first else end, self._labels.get(phrase, phrase))
        for pattern, find in self._patterns:
            for match in find(text):
                _reject_empty(match, pattern)
                yield Span(match.start(), match.end(), pattern)


def load_phrases(path: str | os.PathLike) -> list[str]:
    """The distinct phrases of a `.txt` file (one a line, where `#` begins a comment) or a `.json` list of strings."""
    lines: list[Any] = [row.get("text") for row in read_rows(path)]
    if os.fspath(path).endswith(".txt"):
        lines = [phrase for line in lines if (phrase := re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip())]
    if not lines:
        raise ValueError(f"{path}: no phrases in it; write one a line in a .txt file, or a list of strings as .json")
    return _strings(lines, os.fspath(path))


def inflected_forms(word: str) -> list[str]:
    """A word with its regular English inflections (-s, -ed, -ing); some are no words ("stupids"): they never occur."""
    forms = {word[: len(word) - cut] + ending for cut, ending in _endings(word.lower())}
    if word.isupper() and len(word) > 1:
        forms |= {form.upper() for form in forms}
    return sorted(forms)


def _endings(word: str) -> set[tuple[int, str]]:
    """Pairs of how many letters go and what comes in their place."""
    last, before = word[-1], word[-2:-1]
    # One vowel between consonants, the second of which is doubled: "hit", "hitting". In a word of one syllable always,
    # so that "star" is not in "stare"'s "stared"; in longer ones sometimes ("travelled", "traveled").
    doubles = bool(re.search(rf"(?:[^{_VOWELS}]|qu)[{_VOWELS}][^{_VOWELS}chwxy]$", word))
    single = doubles and not re.search(rf"[{_VOWELS}y]+[^{_VOWELS}y]+[{_VOWELS}]", word.replace("qu", "q"))
    if last == "y" and before and before not in _VOWELS:
        ends = {(1, "ies")}
    elif last in "sxz" or word.endswith(("ch", "sh")):
        ends = {(0, "es")} | ({(0, last + "es")} if doubles else set())
    else:
        ends = {(0, "s")} | ({(0, "es")} if last == "o" else set())
    ends.add((0, ""))
    if len(word) < 3:
        return ends
    if last == "e":
        ing = {(2, "ying")} if before == "i" else {(0, "ing")} if before in ("e", "o", "y") else {(1, "ing")}
        return ends | ing | {(0, "d")}
    if last == "y" and before not in _VOWELS:
        return ends | {(1, "ied"), (0, "ing")}
    stems = {last} if single else {"", last} if doubles else {"", "k"} if last == "c" else {""}
    return ends | {(0, stem + ending) for stem in stems for ending in ("ed", "ing")}


def _regex(phrase: str, whole_words: bool, inflections: bool) -> str:
    words = phrase.split()
    body = r"\s+".join(map(_literal, words))
    letters = _LAST_LETTERS.search(words[-1])
    if inflections and letters:
        forms = sorted(inflected_forms(letters[0]), key=len, reverse=True)  # the longest first
        rest = r"\s+".join(map(_literal, [*words[:-1], words[-1][: letters.start()]]))
        body = f"{rest}(?:{'|'.join(map(re.escape, forms))})(?:[{_APOSTROPHES}][sS](?!{_LETTER}))?"
    begins, ends = (whole_words and re.match(_LETTER, c) and not SPACELESS.match(c) for c in (phrase[0], phrase[-1]))
    left = rf"(?:(?<!{_LETTER})|(?<={SPACELESS.pattern}))" if begins else ""
    right = rf"(?:(?!{_LETTER})|(?={SPACELESS.pattern})){_NOT_CONTRACTED}" if ends else ""
    return left + body + right


def _literal(word: str) -> str:
    """A word's pattern, with any apostrophe for one, and full-width letters and signs for ASCII's."""
    wide = {char: chr(ord(char) + 0xFEE0) for char in word if "!" <= char <= "~"}
    return "".join(f"[{_APOSTROPHES if c in _APOSTROPHES else re.escape(c) + wide.get(c, '')}]" for c in word)


def _cuts_a_letter(text: str, start: int, end: int) -> bool:
    """Whether the span begins or ends between a letter and its accent or vowel sign, which `\\w` does not match."""
    neighbours = re.sub("[\ufe00-\ufe0f]", "", text[start - 1 : start] + text[end : end + 1])  # emoji have these
    return any(unicodedata.category(char) in ("Mn", "Mc") for char in neighbours)


def _reject_empty(match: re.Match[str] | None, pattern: str) -> None:
    if match and not match[0]:
        raise ValueError(f"the pattern {pattern!r} matches the empty string; require a character in it")


def _strings(values: Sequence[str], name: str) -> list[str]:
    """Distinct strings without surrounding white space."""
    if isinstance(values, str):
        raise TypeError(f"{name}: {values!r} is one string; give a list of them")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{index}] is {value!r:.60}, not a string; put quotes around it")
        if not value.strip():
            raise ValueError(f"{name}[{index}] is empty, which would match everywhere; remove it")
    return list(dict.fromkeys(values if name == "patterns" else map(str.strip, values)))
