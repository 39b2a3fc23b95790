"""Instructions that share their words with the prompts of a benchmark."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...core.inputs import DEFAULT_COLUMNS, is_file, read_file
from .words import plain_words, without_spaces


WORDS_IN_A_ROW = 13
CHARACTERS_IN_A_ROW = 26
# A prompt of fewer words than this is found in instructions that have nothing else.
_WORDS_OF_A_PROMPT = 4
# Columns with questions, as benchmarks call them, beside those of `core.queries`.
_COLUMNS = (*DEFAULT_COLUMNS, "turns", "messages")
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Benchmarks:
    """Finds benchmark prompts in instructions.

    An instruction is contaminated by a prompt if they share 13 words in a row (26 characters in a prompt whose script
    has no spaces), or if it contains the whole of a shorter one; of a prompt of fewer than four words it must be a
    copy. Case and punctuation do not count. The words are held as 64-bit hashes: 12 bytes for every word in the files.

    Args:
        files: Of a `.jsonl`, `.json` or `.csv` (also gzipped) the columns query, prompt, text, instruction, post,
            question, turns and messages are read, or, where there is none of them, every column with text, each with
            `input` behind it, if there is one; of chats what the user says. Of a `.txt` each line is a prompt.

    Raises:
        ValueError: A file is missing, of another kind, cannot be read, or holds no text; names the file.
    """

    def __init__(self, files: Sequence[str | os.PathLike]):
        self._places: list[tuple[str, int]] = []
        hashes: dict[int, list[np.ndarray]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        for file in map(os.fspath, files):
            before = len(self._places)
            for row, prompts in _prompts(file):
                self._places.append((file, row))
                for words in prompts:
                    size = min(len(words), CHARACTERS_IN_A_ROW if without_spaces(words) else WORDS_IN_A_ROW)
                    *_, found = _windows(_hashes(words), size)
                    hashes.setdefault(size, []).append(found)
                    owners.setdefault(size, []).append(np.full(len(found), len(self._places) - 1, np.uint32))
            if len(self._places) == before:
                raise ValueError(f"`benchmarks`: {file} holds no text to compare with; check the file")
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for size, parts in hashes.items():
            keys, rows = np.concatenate(parts), np.concatenate(owners[size])
            order = np.argsort(keys, kind="stable")
            self._tables[size] = keys[order], rows[order]

    def find(self, words: Sequence[str]) -> tuple[str, int] | None:
        """The file and row (from 1) of a prompt that is in a text, given by its `plain_words`; None if none is."""
        own = _hashes(words)
        for size, found in enumerate(_windows(own, min(len(own), max(self._tables))), start=1):
            if size not in self._tables or (size < _WORDS_OF_A_PROMPT and size < len(own)):
                continue
            keys, rows = self._tables[size]
            places = np.searchsorted(keys, found)
            hits = np.flatnonzero(keys[np.minimum(places, len(keys) - 1)] == found)
            if len(hits):
                return self._places[rows[places[hits]].min()]
        return None


def _windows(hashes: np.ndarray, largest: int) -> Iterator[np.ndarray]:
    """For every size up to the largest, a hash of each run of so many words."""
    window = np.zeros(len(hashes), np.uint64)
    for size in range(1, largest + 1):
        window = window[: len(hashes) - size + 1] * _BASE + hashes[size - 1 :]
        yield window


def _hashes(words: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(_hash, words), np.uint64, len(words))


@lru_cache(maxsize=1 << 17)
def _hash(word: str) -> int:
    data = word.encode("utf-8", errors="replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _prompts(file: str) -> Iterator[tuple[int, list[list[str]]]]:
    """Row number and prompts, as words, of each row that has any."""
    if file.endswith(".txt"):
        rows: Any = ({"text": line} for line in _lines(file))
    elif is_file(file):
        rows = read_file(Path(file))
    else:
        raise ValueError(f"`benchmarks`: {file} is no file here; give .jsonl, .json, .csv or .txt")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            row = {"text": row}
        # Without its input, an instruction such as "Answer the question" is no prompt
        given = " ".join(_texts(row.get("input")))
        names = [name for name in _COLUMNS if name in row] or [name for name in row if name != "input"] or ["input"]
        texts = [f"{text} {given}" for name in names for text in _texts(row[name])] or [given]
        prompts = [words for words in map(plain_words, texts) if words]
        if prompts:
            yield number, prompts


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`benchmarks`: {file} cannot be read as UTF-8 text ({error}); check the file") from None


def _texts(value: Any) -> list[str]:
    """A text; or the texts in a list, of chat messages only the user's."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _texts(value.get("content")) if value.get("role") == "user" else []
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []
