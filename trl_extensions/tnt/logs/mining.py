"""Phrases that flagged outputs use more than clean ones: where a log says that an output is bad, but not what in it.

Outputs are compared by the share of them that holds an n-gram, not by how often they repeat it: one long, repetitive
output must not outvote a hundred others.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias


MAX_WORDS = 5
"""Longest n-gram that is counted. One that always goes on in the same way is lengthened to the end of its sentence."""
MIN_Z = 1.96
MIN_LIFT = 2.0
"""A phrase must be in this many times the share of flagged outputs as of clean ones, so that no common word is one."""
SAME_SHARE = 0.9
"""A longer phrase stands for a shorter one inside it if it is in this share of the outputs that the shorter is in."""

# An underscore is no part of a word: Markdown writes _word_
_WORD = re.compile(r"[^\W_]+(?:['’‘ʼ＇-][^\W_]+)*")
_BREAK = re.compile(r"[.!?;:…][\"'”’)\]*_]*\s|[\n。！？；：]")
_STRAIGHT = str.maketrans("’‘ʼ＇", "'" * 4)

Gram: TypeAlias = tuple[str, ...]


class Word(NamedTuple):
    """A word of a text: what it is compared by (see `fold`), and its characters `[start, end)`."""

    key: str
    start: int
    end: int


class Spot(NamedTuple):
    """An occurrence of a phrase: words `[first, last)` of one sentence of one output."""

    output: int
    sentence: list[Word]
    first: int
    last: int


@dataclass(frozen=True)
class MinedPhrase:
    """A phrase that separates flagged outputs from clean ones.

    Args:
        forms (`dict[str, int]`): How the outputs write it, and how often.
        outputs (`frozenset[int]`): Positions of the flagged outputs that hold it.
        z (`float`): Its log-odds ratio in standard deviations, see `log_odds`.
    """

    forms: dict[str, int]
    outputs: frozenset[int]
    z: float


def fold(text: str) -> str:
    """Lower case, single spaces, straight apostrophes: texts that are equal so are found by the same search."""
    return " ".join(text.translate(_STRAIGHT).lower().split())


def sentences(text: str) -> list[list[Word]]:
    """The words of a text, a list for each sentence; a line break or a colon ends one too. Commas are skipped."""
    found: list[list[Word]] = []
    end = None
    for match in _WORD.finditer(text):
        if end is None or _BREAK.search(text, end, match.start()):
            found.append([])
        end = match.end()
        found[-1].append(Word(fold(match.group()), match.start(), end))
    return found


def log_odds(flagged_count: int, flagged: int, clean_count: int, clean: int) -> tuple[float, float]:
    """How much more flagged outputs hold an n-gram than clean ones: the log-odds ratio with a Dirichlet prior.

    Monroe, Colaresi and Quinn, "Fightin' Words" (2008), with their informative prior, for outputs instead of word
    tokens, so that the two categories are "holds it" and "does not". With y of n outputs in each group, the share s of
    all outputs that hold it, a prior worth a0 = min(n_flagged, n_clean) outputs and a = a0 s:

        delta = log((y_f + a) / (n_f + a0 - y_f - a)) - log((y_c + a) / (n_c + a0 - y_c - a))
        var   = 1 / (y_f + a) + 1 / (n_f + a0 - y_f - a) + 1 / (y_c + a) + 1 / (n_c + a0 - y_c - a)
        z     = delta / sqrt(var)

    The paper leaves out the second and fourth term of the variance, which vanish for a rare word; a phrase may well be
    in most of the flagged outputs. The prior draws both groups towards the common share, so that what was seen once or
    twice does not come out on top.

    Args:
        flagged_count: Flagged outputs that hold it, y_f.
        flagged: Flagged outputs, n_f, at least 1.
        clean_count: Clean outputs that hold it, y_c.
        clean: Clean outputs, n_c, at least 1.

    Returns:
        delta (nats) and z (standard deviations). Both are 0 if all outputs hold it, or none does.
    """
    share = (flagged_count + clean_count) / (flagged + clean)
    if share in (0.0, 1.0):
        return 0.0, 0.0
    prior = min(flagged, clean)
    delta = variance = 0.0
    for sign, count, total in ((1, flagged_count, flagged), (-1, clean_count, clean)):
        with_it = count + prior * share
        without = total + prior - with_it
        delta += sign * math.log(with_it / without)
        variance += 1 / with_it + 1 / without
    return delta, delta / math.sqrt(variance)


def separates(flagged_count: int, flagged: int, clean_count: int, clean: int) -> bool:
    """Whether the share of flagged outputs that hold something is at least `MIN_LIFT` times that of clean ones."""
    return flagged_count * clean >= MIN_LIFT * clean_count * flagged


def mine_phrases(flagged: Sequence[str], clean: Sequence[str], *, min_count: int = 2) -> list[MinedPhrase]:
    """Phrases that are over-represented in flagged outputs (see `log_odds`), the clearest first.

    Every n-gram of up to `MAX_WORDS` words within a sentence is tried; it must separate the groups (`separates`) and
    have log-odds of `MIN_Z` standard deviations. Of two, one inside the other, the longer stays if it is nearly as
    frequent (`SAME_SHARE`) or has the higher z; otherwise it is the shorter one with some neighbour, and goes.

    Args:
        flagged: Outputs that something is wrong with.
        clean: Outputs that nothing is known against.
        min_count: Flagged outputs that must hold a phrase; never fewer than 2.

    Returns:
        The phrases; none if either group is empty.
    """
    if not flagged or not clean:
        return []
    flagged_words, clean_words = [sentences(text) for text in flagged], [sentences(text) for text in clean]
    counts = _frequent_grams(flagged_words, max(2, min_count))
    clean_counts = Counter(gram for output in clean_words for gram in _grams(output) & counts.keys())
    scores = {}
    for gram, count in counts.items():
        group_counts = count, len(flagged), clean_counts[gram], len(clean)
        z = log_odds(*group_counts)[1]
        if z >= MIN_Z and separates(*group_counts):
            scores[gram] = z
    chosen = _without_nested(scores, counts)
    return _phrases(flagged, _spots(flagged_words, chosen), scores)


def _windows(output: list[list[Word]], size: int) -> Iterable[tuple[Gram, list[Word], int]]:
    for sentence in output:
        keys = [word.key for word in sentence]
        for first in range(len(keys) - size + 1):
            yield tuple(keys[first : first + size]), sentence, first


def _grams(output: list[list[Word]]) -> set[Gram]:
    return {gram for size in range(1, MAX_WORDS + 1) for gram, _, _ in _windows(output, size)}


def _frequent_grams(outputs: Sequence[list[list[Word]]], min_count: int) -> Counter[Gram]:
    """n-gram -> number of outputs that hold it; an n-gram is only counted if both (n-1)-grams in it are frequent."""
    frequent: Counter[Gram] = Counter()
    for size in range(1, MAX_WORDS + 1):
        counts: Counter[Gram] = Counter()
        for output in outputs:
            grams = {gram for gram, _, _ in _windows(output, size)}
            counts.update(g for g in grams if size == 1 or (g[:-1] in frequent and g[1:] in frequent))
        frequent.update({gram: count for gram, count in counts.items() if count >= min_count})
    return frequent


def _without_nested(scores: dict[Gram, float], counts: Counter[Gram]) -> list[Gram]:
    """One of each pair of n-grams of which one lies inside the other, longest first."""
    left = dict.fromkeys(sorted(scores, key=lambda gram: (-len(gram), -scores[gram], gram)))
    for gram in list(left):
        parts = (gram[i : i + size] for size in range(len(gram) - 1, 0, -1) for i in range(len(gram) - size + 1))
        for part in parts:
            if gram not in left:
                break
            if part in left:
                longer_wins = counts[gram] >= SAME_SHARE * counts[part] or scores[gram] >= scores[part]
                del left[part if longer_wins else gram]
    return list(left)


def _spots(outputs: Sequence[list[list[Word]]], grams: Iterable[Gram]) -> dict[Gram, list[Spot]]:
    spots: dict[Gram, list[Spot]] = {gram: [] for gram in grams}
    for size in {len(gram) for gram in spots}:
        for index, output in enumerate(outputs):
            for gram, sentence, first in _windows(output, size):
                if gram in spots:
                    spots[gram].append(Spot(index, sentence, first, first + size))
    return spots


def _phrases(flagged: Sequence[str], spots: dict[Gram, list[Spot]], scores: dict[Gram, float]) -> list[MinedPhrase]:
    """The chosen n-grams as the outputs write them; those that grow into the same phrase become one."""
    grown: dict[Gram, tuple[list[Spot], float]] = {}
    for gram, where in spots.items():
        where = _grow(where) if len(gram) == MAX_WORDS else where
        whole = tuple(word.key for word in where[0].sentence[where[0].first : where[0].last])
        known = grown.get(whole, (where, -math.inf))
        grown[whole] = (where, max(known[1], scores[gram]))
    phrases = []
    for where, z in grown.values():
        forms = Counter(_written(flagged, spot) for spot in where)
        phrases.append(MinedPhrase(dict(forms), frozenset(spot.output for spot in where), z))
    return sorted(phrases, key=lambda phrase: (-phrase.z, min(phrase.forms)))


def _written(outputs: Sequence[str], spot: Spot) -> str:
    start, end = spot.sentence[spot.first].start, spot.sentence[spot.last - 1].end
    return " ".join(outputs[spot.output][start:end].split())


def _grow(spots: list[Spot]) -> list[Spot]:
    """Lengthens a phrase while nearly all outputs with it have the same next, or previous, word."""
    while longer := _extended(spots, right=True) or _extended(spots, right=False):
        spots = longer
    return spots


def _extended(spots: list[Spot], *, right: bool) -> list[Spot]:
    groups: defaultdict[str, list[Spot]] = defaultdict(list)
    for output, sentence, first, last in spots:
        place = last if right else first - 1
        if 0 <= place < len(sentence):
            spot = Spot(output, sentence, min(first, place), max(last, place + 1))
            groups[sentence[place].key].append(spot)
    best = max(groups.values(), key=_num_outputs, default=[])
    return best if _num_outputs(best) >= SAME_SHARE * _num_outputs(spots) else []


def _num_outputs(spots: list[Spot]) -> int:
    return len({spot.output for spot in spots})
