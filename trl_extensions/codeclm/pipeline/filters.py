"""Which instructions and pairs are worth keeping, beside the gap: length, copies, benchmarks, language, screens."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...core.extras import import_extra
from ...core.inputs import DEFAULT_COLUMNS, is_file, read_rows
from ...core.text import SPACELESS
from ..config import CodecLMConfig, base_language


REASONS = ("empty", "too short", "too long", "near-duplicate", "contaminated", "language")  # in the order tried

# What is shorter, or less clear, counts as right. Of 3,500 texts in English (Alpaca, Self-Instruct; code and formulas
# among them) another language was likelier in 3 %, by 12 nats in 0.2 %; of 1,700, held against six others, 0.2 % pass
_WORDS_OF_A_LANGUAGE, _SURE = 5, 12.0
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_PERMUTATIONS = 128
_RECALL = 0.99

WORDS_IN_A_ROW, CHARACTERS_IN_A_ROW = 13, 26
_WORDS_OF_A_PROMPT = 4  # a shorter prompt is found in instructions that have nothing else
_COLUMNS = (*DEFAULT_COLUMNS, "turns")  # of questions, as benchmarks call them


class InstructionFilters:
    """Says of one instruction after the other whether it is kept; the outcome depends on their order.

    Of instructions that were dropped, `details` has by id what they nearly copy, the benchmark's file and row, or the
    language found (by py3langid, where it is sure and there are five words or more). Raises a `ValueError` that names
    the setting if a benchmark cannot be read, a language is unknown, or no length is left.
    """

    def __init__(self, config: CodecLMConfig):
        if config.min_words > config.max_words:
            raise ValueError(f"`min_words` {config.min_words} is above `max_words` {config.max_words}: swap them.")
        self._config = config
        self._benchmarks = Benchmarks(config.decontaminate_against) if config.decontaminate_against else None
        self._language = _load_language_guesser(config.languages) if config.languages else None
        self.forget()

    def add(self, id: str, text: str) -> None:
        """Remember a text, such as a seed, without a check: what copies it will be a near-duplicate."""
        if words := plain_words(text):
            self._kept.add(id, words)

    def forget(self) -> None:
        """Give back what was remembered, and its memory."""
        self._kept = NearDuplicates(self._config.dedup_threshold)
        self.details: dict[str, str] = {}

    def check(self, id: str, instruction: str) -> str | None:
        """One of `REASONS` to drop the instruction; None keeps and remembers it."""
        reason = self.check_alone(id, instruction, self._kept)
        if reason is None:
            self.add(id, instruction)
        return reason

    def check_alone(self, id: str, instruction: str, others: NearDuplicates | None = None) -> str | None:
        """As `check`, whatever instructions there are but `others`, and nothing is remembered."""
        words, config = plain_words(instruction), self._config
        if not words:
            return "empty"
        length = count_words(words)
        if not config.min_words <= length <= config.max_words:
            return "too short" if length < config.min_words else "too long"
        if others and (copied := others.find(words)):
            self.details[id] = f"{copied[1]:.2f} of {copied[0]}"
            return "near-duplicate"
        if self._benchmarks and (place := self._benchmarks.find(words)):
            self.details[id] = f"{place[0]}, row {place[1]}"
            return "contaminated"
        if language := self.foreign(instruction):
            self.details[id] = language
            return "language"
        return None

    def foreign(self, text: str) -> str | None:
        """The language of a text, code in fences aside, where it is none of `languages`; None where it is one of them,
        or too little is there to tell."""
        if self._language is None:
            return None
        text = _FENCED.sub(" ", text)
        return self._language(text) if count_words(plain_words(text)) >= _WORDS_OF_A_LANGUAGE else None


class NearDuplicates:
    """Finds the text, of those added before, that a text overlaps with.

    A text is the set of its word 3-grams, or of its character 5-grams where it has fewer than three words or a script
    without spaces. MinHash (datasketch) proposes, with bands in which a pair right at the threshold is found with 99 %
    probability; the true Jaccard similarity decides.
    """

    def __init__(self, threshold: float):
        datasketch = import_extra("datasketch")
        self._threshold = threshold
        rows = next((rows for rows in range(_PERMUTATIONS // 2, 1, -1) if _recall(threshold, rows) >= _RECALL), 1)
        bands = _PERMUTATIONS // rows
        self._empty = datasketch.MinHash(num_perm=bands * rows, seed=1, hashfunc=int)
        self._index = datasketch.MinHashLSH(num_perm=bands * rows, params=(bands, rows))
        self._shingles: list[array[int]] = []
        self._ids: list[str] = []

    def add(self, id: str, words: Sequence[str]) -> None:
        """Remember a text, given by its `plain_words`."""
        own = shingles(words)
        self._index.insert(len(self._ids), self._sketch(own))
        self._ids.append(id)
        self._shingles.append(array("I", own))

    def find(self, words: Sequence[str]) -> tuple[str, float] | None:
        """The id of the earliest text that this one overlaps with, and their similarity; None if there is none."""
        own = shingles(words)
        for row in sorted(self._index.query(self._sketch(own))):
            shared = len(own.intersection(self._shingles[row]))
            similarity = shared / (len(own) + len(self._shingles[row]) - shared)
            if similarity >= self._threshold:
                return self._ids[row], similarity
        return None

    def _sketch(self, pieces: set[int]) -> Any:
        minhash = self._empty.copy()
        minhash.update_batch(pieces)
        return minhash


def shingles(words: Sequence[str]) -> set[int]:
    """32-bit hashes of the overlapping pieces of a text, given by its `plain_words`."""
    spaceless = without_spaces(words)
    if len(words) >= 3 and not spaceless:
        pieces = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
    else:
        text = ("" if spaceless else " ").join(words)
        pieces = [text[i : i + 5] for i in range(max(1, len(text) - 4))]
    return {zlib.crc32(piece.encode("utf-8", errors="replace")) for piece in pieces}


def _recall(threshold: float, rows: int) -> float:
    """How likely a pair at the threshold is proposed with bands of so many rows: longer ones propose less in vain."""
    return 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows)


class Benchmarks:
    """Finds benchmark prompts in instructions, case and punctuation aside.

    An instruction is contaminated by a prompt if they share 13 words in a row (26 characters in a prompt whose script
    has no spaces), or if it contains the whole of a shorter one; of a prompt of fewer than four words it must be a
    copy. Files are in any format of `core.inputs`.
    """

    def __init__(self, files: Sequence[str | os.PathLike]):
        # By size of a run of words: the hashes of the runs, each with the first row that has it
        self._runs: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._files = [os.fspath(file) for file in files]
        for number, file in enumerate(self._files):
            found = False
            for row, words in _prompts(file):
                found = True
                size = min(len(words), CHARACTERS_IN_A_ROW if without_spaces(words) else WORDS_IN_A_ROW)
                for run in _runs_of(words, size):
                    self._runs[size].setdefault(run, (number, row))
            if not found:
                raise ValueError(f"`decontaminate_against`: {file} holds no text to compare with; check the file")

    def find(self, words: Sequence[str]) -> tuple[str, int] | None:
        """The file and row (from 1) of a prompt that is in a text, given by its `plain_words`; None if none is."""
        for size in sorted(self._runs):
            if size > len(words) or (size < _WORDS_OF_A_PROMPT and size < len(words)):
                continue
            if hits := [place for run in _runs_of(words, size) if (place := self._runs[size].get(run))]:
                number, row = min(hits)
                return self._files[number], row
        return None


def _runs_of(words: Sequence[str], size: int) -> Iterator[int]:
    """A hash of each run of so many words: a number takes less memory than the words do."""
    return (hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1))


def _prompts(file: str) -> Iterator[tuple[int, list[str]]]:
    """Row number and words of every prompt in a file."""
    if not is_file(file):
        raise ValueError(f"`decontaminate_against`: {file} is no file here; give .jsonl, .json, .csv or .txt")
    for number, row in enumerate(read_rows(file), start=1):
        # Without its input, an instruction such as "Answer the question" is no prompt
        given = " ".join(_texts(row.get("input")))
        names = [name for name in _COLUMNS if name in row] or [name for name in row if name != "input"]
        for text in [f"{text} {given}" for name in names for text in _texts(row[name])] or [given]:
            if words := plain_words(text):
                yield number, words


def _texts(value: Any) -> list[str]:
    """A text; or the texts in a list, of chat messages only the user's."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        said = value.get("role", value.get("from")) in ("user", "human")
        return _texts(value.get("content", value.get("value"))) if said else []
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _load_language_guesser(languages: Sequence[str]) -> Callable[[str], str | None]:
    """The language of a text that is surely in none of these."""
    py3langid = import_extra("py3langid")
    wanted = {base_language(own): own for own in languages}
    if unknown := wanted.keys() - dict(py3langid.rank("")):
        names = ", ".join(sorted(language for language, _ in py3langid.rank("")))
        what = f"{wanted[min(unknown)]!r} is no language that is told apart; those are {names}"
        raise ValueError(f"`languages`: {what}.")

    def foreign(text: str) -> str | None:
        scores = py3langid.rank(text)  # log-probabilities, best first
        found, best = scores[0]
        unsure = best - max(score for own, score in scores if own in wanted) < _SURE
        if found == "zh" and "ja" in wanted:  # Japanese without kana, if Japan has the characters
            letters = "".join(filter(str.isalpha, text))
            unsure |= letters.encode("cp932", "ignore").decode("cp932") == letters
        return None if unsure or found == "zxx" else found  # that is no language at all: a table, a formula

    return foreign


class Screens:
    """Drops pairs that one of `screens` finds something in: "profanity", "pii" (personal data), "bias" (attacks on
    groups of people), or a sequence classifier as "model" or "model:label".

    Prompt and completion are judged each for itself: a long prompt must not push the completion out. Raises an
    `ImportError` of one line where the extra of a screen is missing, and a `ValueError` where a classifier is.
    """

    def __init__(self, config: CodecLMConfig):
        self._threshold = config.screen_threshold
        self._scores = {name: _load_screen(name) for name in config.screens}

    def find(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        """For each of a batch of (prompt, completion) the first screen that drops it, or None."""
        found: list[str | None] = [None] * len(pairs)
        for name, score in self._scores.items():
            left = [place for place, dropped in enumerate(found) if dropped is None]
            scores = score([text for place in left for text in pairs[place]]) if left else []
            for place, own in zip(left, zip(scores[::2], scores[1::2], strict=True), strict=True):
                found[place] = name if max(own) >= self._threshold else None
        return found


_CLASSIFIERS = {"bias": "unitary/unbiased-toxic-roberta:identity_attack"}
_NOT_PERSONAL = {"URL", "DATE_TIME"}
# Between ASCII and letters that are not Latin
_BESIDE_ASCII = re.compile(r"(?<=[^\x00-\u024f])(?=[!-~])|(?<=[!-~])(?=[^\x00-\u024f])")


def _load_screen(name: str) -> Callable[[Sequence[str]], list[float]]:
    from ...core.text import TextClassifier, load_profanity_check

    if name == "profanity":
        return load_profanity_check()
    if name == "pii":
        return _load_pii_check()
    name = _CLASSIFIERS.get(name, name)
    model, separator, label = name.rpartition(":")
    whole = not separator or Path(name).exists()
    try:
        return TextClassifier(name if whole else model, None if whole else label or None).score
    except OSError as error:
        known = "profanity, pii, bias, or a classifier that can be loaded"
        raise ValueError(f"`screens`: {name!r} is none of {known} ({str(error).strip().splitlines()[0]})") from None


def _load_pii_check() -> Callable[[Sequence[str]], list[float]]:
    """A function from texts to the score of what is most surely personal data, by the patterns and check digits of
    Presidio: addresses, numbers of phones, cards, accounts and passports; no names, which take a model."""
    presidio = import_extra("presidio_analyzer")
    engines = import_extra("presidio_analyzer.nlp_engine")
    for noisy in ("presidio-analyzer", "tldextract"):  # recognizers of other languages; a list that is not fetched
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    nothing = engines.NoOpNlpEngine(models=[{"lang_code": "en", "model_name": "none"}])
    analyzer = presidio.AnalyzerEngine(nlp_engine=nothing, supported_languages=["en"])
    entities = sorted(set(analyzer.get_supported_entities("en")) - _NOT_PERSONAL)

    def score(text: str) -> float:
        # Its patterns begin and end at the bounds of words, which scripts without spaces do not have
        text = _BESIDE_ASCII.sub(" ", unicodedata.normalize("NFKC", text))
        found = analyzer.analyze(text, language="en", entities=entities, context=plain_words(text))
        return max((own.score for own in found), default=0.0)

    return lambda texts: [score(text) for text in texts]


# Texts as words that can be compared and counted, in scripts with spaces and without


class _Table(dict[int, str]):
    """What becomes of each character, worked out when it is first seen."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        if category == "Cf":  # joiners inside of words
            value = ""
        elif category[0] in "PZC" or category in ("Sk", "So"):
            value = " "
        else:
            value = f" {chr(code)} " if _is_spaceless(chr(code)) else chr(code)
        self[code] = value
        return value


def plain_words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation and emoji; mathematical and currency signs stay.

    In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every character is a word.
    """
    return unicodedata.normalize("NFKC", text).casefold().translate(_TABLE).split()


def count_words(words: Sequence[str]) -> int:
    """How many words there are, two characters of a script without spaces counted as one."""
    characters = sum(map(_is_spaceless, words))
    return len(words) - characters + (characters + 1) // 2


def without_spaces(words: Sequence[str]) -> bool:
    """Whether most of a text is in a script without spaces."""
    return 2 * sum(map(_is_spaceless, words)) > len(words)


def _is_spaceless(word: str) -> bool:
    return SPACELESS.fullmatch(word) is not None


_TABLE = _Table()
