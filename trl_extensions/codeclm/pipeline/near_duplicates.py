"""Near-duplicates among a million texts: MinHash proposes, the true overlap decides."""

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .words import without_spaces


_PERMUTATIONS = 128
_RECALL = 0.99
_SEED = 1


class NearDuplicates:
    """Finds the text, of those added before, that a text overlaps with.

    A text is the set of its word 3-grams, or of its character 5-grams where it has fewer than three words or a script
    without spaces; two overlap if these sets' Jaccard similarity (what they share over what they hold together)
    reaches the threshold. Pairs are proposed by MinHash with bands chosen so that a pair right at the threshold is
    proposed with 99 % probability (a likelier one the more it overlaps), then checked against the true similarity:
    nothing is a near-duplicate by an accident of hashing.

    A text costs 12 bytes a band (25 bands at a threshold of 0.7), four a word, and its id: 0.6 GB for a million
    instructions of forty words, and as much again for a moment when arrays are merged. The index of datasketch itself
    takes 8 GB for the same bands.

    Args:
        threshold: In (0, 1]. Below 0.05 pairs at the threshold are missed more often than said above.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash

        self._threshold = threshold
        rows = _rows_of_a_band(threshold)
        bands = _PERMUTATIONS // rows
        self._empty = MinHash(num_perm=bands * rows, seed=_SEED, hashfunc=int)
        random = np.random.default_rng(_SEED)
        self._factors = random.integers(0, 1 << 64, size=(bands, rows), dtype=np.uint64) | np.uint64(1)
        self._buckets = _Buckets()
        self._ids: list[str] = []
        self._shingles, self._ends = array("I"), array("Q", [0])

    def __len__(self) -> int:
        return len(self._ids)

    def sketch(self, words: Sequence[str]) -> "Sketch":
        """What a text, given by its `plain_words`, is compared by."""
        own = shingles(words)
        minhash = self._empty.copy()
        minhash.update_batch(own)
        values = minhash.hashvalues.astype(np.uint64).reshape(self._factors.shape)
        return Sketch(own, (values * self._factors).sum(axis=1, dtype=np.uint64))

    def add(self, id: str, sketch: "Sketch") -> None:
        """Remember a text."""
        self._buckets.add(sketch.keys, len(self._ids))
        self._ids.append(id)
        self._shingles.extend(sorted(sketch.shingles))
        self._ends.append(len(self._shingles))

    def find(self, sketch: "Sketch") -> tuple[str, float] | None:
        """The id of the earliest text that this one overlaps with, and their similarity; None if there is none."""
        own = sketch.shingles
        for row in sorted(self._buckets.find(sketch.keys)):
            start, end = self._ends[row], self._ends[row + 1]
            if min(len(own), end - start) < self._threshold * max(len(own), end - start):
                continue
            shared = len(own.intersection(self._shingles[start:end]))
            similarity = shared / (len(own) + end - start - shared)
            if similarity >= self._threshold:
                return self._ids[row], similarity
        return None


@dataclass(frozen=True)
class Sketch:
    """A text to be compared.

    Args:
        shingles: 32-bit hashes of its pieces.
        keys: `(bands,)`: a 64-bit number for each band of its MinHash.
    """

    shingles: set[int]
    keys: np.ndarray


def shingles(words: Sequence[str]) -> set[int]:
    """32-bit hashes of the overlapping pieces of a text, given by its `plain_words`."""
    spaceless = without_spaces(words)
    if len(words) >= 3 and not spaceless:
        pieces = (" ".join(words[i : i + 3]) for i in range(len(words) - 2))
    else:
        text = ("" if spaceless else " ").join(words)
        pieces = (text[i : i + 5] for i in range(max(1, len(text) - 4)))
    return {zlib.crc32(piece.encode("utf-8", errors="replace")) for piece in pieces}


def _rows_of_a_band(threshold: float) -> int:
    """The longest bands, which propose the fewest pairs in vain, that still propose a pair at the threshold."""
    for rows in range(_PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _RECALL:
            return rows
    return 1


class _Buckets:
    """From 64-bit keys to the rows that have them: sorted arrays, each at least twice the next, and a dict of what
    came last."""

    _RECENT = 1 << 16

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._recent: dict[int, list[int]] = {}

    def add(self, keys: np.ndarray, row: int) -> None:
        for key in keys.tolist():
            self._recent.setdefault(key, []).append(row)
        if len(self._recent) >= self._RECENT:
            self._freeze()

    def find(self, keys: np.ndarray) -> set[int]:
        found = {row for key in keys.tolist() for row in self._recent.get(key, ())}
        for own, rows in self._runs:
            starts, ends = np.searchsorted(own, keys, "left"), np.searchsorted(own, keys, "right")
            for place in np.flatnonzero(ends > starts):
                found.update(rows[starts[place] : ends[place]].tolist())
        return found

    def _freeze(self) -> None:
        lengths = [len(rows) for rows in self._recent.values()]
        keys = [np.repeat(np.fromiter(self._recent, np.uint64, len(self._recent)), lengths)]
        rows = [np.fromiter((row for rows in self._recent.values() for row in rows), np.uint32, sum(lengths))]
        self._recent = {}
        while self._runs and len(self._runs[-1][0]) < 2 * sum(map(len, keys)):
            for parts, part in zip((keys, rows), self._runs.pop(), strict=True):
                parts.insert(0, part)
        joined = np.concatenate(keys)
        del keys
        order = np.argsort(joined, kind="stable")
        joined = joined[order]
        self._runs.append((joined, np.concatenate(rows)[order]))
