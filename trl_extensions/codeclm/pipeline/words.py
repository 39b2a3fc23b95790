"""Texts as words that can be compared and counted, in scripts with spaces and without."""

import unicodedata
from collections.abc import Sequence


# Han and kana; Thai and Lao; Burmese; Khmer. Words are not divided there, so each character stands for itself.
_SPACELESS = ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
              (0x20000, 0x3FFFF), (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))  # fmt: skip


class _Table(dict[int, str]):
    """What becomes of each character, worked out when it is first seen."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        if category == "Cf":  # joiners inside of words
            value = ""
        elif category[0] in "PZC" or category in ("Sk", "So"):
            value = " "
        else:
            value = f" {chr(code)} " if _is_spaceless(code) else chr(code)
        self[code] = value
        return value


def plain_words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation and emoji; mathematical and currency signs stay.

    In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every character is a word.
    """
    return unicodedata.normalize("NFKC", text).casefold().translate(_TABLE).split()


def count_words(words: Sequence[str]) -> int:
    """How many words there are, two characters of a script without spaces counted as one."""
    characters = sum(map(_is_character, words))
    return len(words) - characters + (characters + 1) // 2


def without_spaces(words: Sequence[str]) -> bool:
    """Whether most of a text is in a script without spaces."""
    return 2 * sum(map(_is_character, words)) > len(words)


def _is_character(word: str) -> bool:
    return len(word) == 1 and _is_spaceless(ord(word))


def _is_spaceless(code: int) -> bool:
    return code >= 0x0E00 and any(low <= code <= high for low, high in _SPACELESS)


_TABLE = _Table()
