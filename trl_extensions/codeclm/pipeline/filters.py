"""Which instructions and pairs are worth keeping, beside the gap."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import CodecLMConfig
from .contamination import Benchmarks
from .near_duplicates import NearDuplicates
from .words import count_words, plain_words


REASONS = ("empty", "too short", "too long", "near-duplicate", "contaminated", "language")
"""Why an instruction is dropped, in the order in which it is tried."""

# Below this a language is guessed wrong too often.
_WORDS_OF_A_LANGUAGE = 5


class InstructionFilters:
    """Says of one instruction after the other whether it is kept. The outcome depends on their order, and on nothing
    else.

    Two characters of a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) count as a word. For what
    a near-duplicate is, and what it costs in memory, see `NearDuplicates`; for contamination see `Benchmarks`. The
    language is guessed by py3langid in instructions of five words or more, and shorter ones pass.

    Args:
        config: Uses `min_words`, `max_words`, `near_duplicates`, `benchmarks` and `languages`.

    Attributes:
        details: Of instructions that were dropped, by id: what they nearly copy, the benchmark's file and row, or the
            language found.

    Raises:
        ValueError: A benchmark cannot be read, a language is unknown, or no length is left; names the setting.
        ImportError: `languages` are set and py3langid is not installed.
    """

    def __init__(self, config: CodecLMConfig):
        if config.min_words > config.max_words:
            raise ValueError(
                f"`min_words` ({config.min_words}) is above `max_words` ({config.max_words}): nothing would be kept."
            )
        self._shortest, self._longest = config.min_words, config.max_words
        self._threshold = config.near_duplicates
        self._kept = NearDuplicates(self._threshold)
        self._benchmarks = Benchmarks(config.benchmarks) if config.benchmarks else None
        self._languages = frozenset(config.languages)
        self._language = _load_language_guesser(config.languages) if config.languages else None
        self.details: dict[str, str] = {}

    def add(self, id: str, text: str) -> None:
        """Remember a text, such as a seed, without a check: what copies it will be a near-duplicate."""
        if words := plain_words(text):
            self._kept.add(id, self._kept.sketch(words))

    def forget(self) -> None:
        """Give back what was remembered, and its memory."""
        self._kept = NearDuplicates(self._threshold)
        self.details = {}

    def check(self, id: str, instruction: str) -> str | None:
        """One of `REASONS` to drop the instruction; None keeps and remembers it."""
        words = plain_words(instruction)
        if reason := self._wrong_length(words):
            return reason
        sketch = self._kept.sketch(words)
        if copied := self._kept.find(sketch):
            self.details[id] = f"{copied[1]:.2f} of {copied[0]}"
            return "near-duplicate"
        if reason := self._unwanted(id, instruction, words):
            return reason
        self._kept.add(id, sketch)
        return None

    def check_alone(self, id: str, instruction: str) -> str | None:
        """As `check`, whatever other instructions there are: not "near-duplicate", and nothing is remembered."""
        words = plain_words(instruction)
        return self._wrong_length(words) or self._unwanted(id, instruction, words)

    def _wrong_length(self, words: Sequence[str]) -> str | None:
        if not words:
            return "empty"
        length = count_words(words)
        if length < self._shortest:
            return "too short"
        return "too long" if length > self._longest else None

    def _unwanted(self, id: str, instruction: str, words: Sequence[str]) -> str | None:
        if self._benchmarks and (place := self._benchmarks.find(words)):
            self.details[id] = f"{place[0]}, row {place[1]}"
            return "contaminated"
        if self._language and count_words(words) >= _WORDS_OF_A_LANGUAGE:
            language = self._language(instruction)
            if language not in self._languages:
                self.details[id] = language
                return "language"
        return None


class Screen:
    """Drops pairs that are toxic to a classifier.

    Prompt and completion are judged each for itself, so that a long prompt does not push the completion out of what a
    classifier reads.

    Args:
        config: Uses `screen` ("profanity", or a sequence classifier as "model" or "model:label") and
            `screen_threshold`.

    Raises:
        ValueError: `screen` is not set, or the classifier does not have the label.
        ImportError: The profanity classifier is not installed.
    """

    def __init__(self, config: CodecLMConfig):
        from ...core.classifiers import TextClassifier, load_profanity_check

        if not config.screen:
            raise ValueError("`screen` is not set; name a classifier, or profanity.")
        self._threshold = config.screen_threshold
        if config.screen == "profanity":
            self._score = load_profanity_check()
        else:
            model, separator, label = config.screen.rpartition(":")
            if not separator or Path(config.screen).exists():
                model, label = config.screen, None
            self._score = TextClassifier(model, label or None).score

    def drops(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each of a batch of (prompt, completion) is to go."""
        scores = self._score([text for pair in pairs for text in pair])
        return [max(scores[i : i + 2]) >= self._threshold for i in range(0, len(scores), 2)]


def _load_language_guesser(languages: Sequence[str]) -> Callable[[str], str]:
    try:
        import py3langid
    except ImportError as error:
        raise ImportError(f"`languages` needs py3langid ({error}): pip install 'trl-extensions[codeclm]'") from None
    known = {language for language, _ in py3langid.rank("")}
    unknown = [language for language in languages if language not in known]
    if unknown:
        raise ValueError(
            f"`languages`: {unknown[0]!r} is no language that is told apart; those are {', '.join(sorted(known))}."
        )
    return lambda text: py3langid.classify(text)[0]
