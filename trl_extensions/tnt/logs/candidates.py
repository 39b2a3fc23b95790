"""From complaints to candidates: what flagged outputs have in common, ranked, for a person to keep or drop."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal

from ..annotate.phrases import PhraseAnnotator, inflected_forms
from ..annotate.rows import Span
from .mining import MIN_Z, fold, log_odds, mine_phrases, separates


if TYPE_CHECKING:
    from .read import LogRow


logger = logging.getLogger(__name__)

DEFAULT_SEVERITY = 3.0
"""Of what nobody gave a severity: the middle of 1 to 5."""
KEEP_Z = 3.0
"""A phrase that statistics alone found is kept by default from these standard deviations of its log-odds on. Thousands
of n-grams are tried, so that a few reach 2 by chance."""
NUM_EXAMPLES = 3

_CONTEXT = 40
_LONGEST_EXAMPLE = 160
# Not "*", "$", "@" and the like, which stand for letters in what people rather not write out
_PUNCTUATION = " \t\r\n.,;:!?\"'()[]{}“”„‘’«»`…–—-"
_MARKUP = re.compile(r"(\*{1,3}|_{1,3})(?=[^*_])(.+)(?<=[^*_])\1")
_QUOTE = re.compile(r"\"([^\"]+)\"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|`([^`]+)`|(?<!\w)['‘](.+?)['’](?!\w)", re.DOTALL)
_LEFT_OUT = re.compile(r"\[?(?:\.{3,}|…)\]?")
_RUN = re.compile(r"[^\W_]+")
_NEGATIONS = frozenset(["no", "not", "never", "none", "nobody", "nothing", "neither", "nor", "without", "cannot"])


@dataclass(frozen=True)
class Candidate:
    """Something that may be unwanted, and what the logs say about it.

    Args:
        text (`str`): Its most frequent form.
        keep (`bool`): Whether it is unwanted indeed.
        severity (`float`): 1 to 5: the mean over the rows it was found in.
        kind (`str`): How it was found: `"span"` (marked in an output), `"quote"` (a complaint quotes it) or `"phrase"`
            (flagged outputs use it more than clean ones).
        count (`int`): Flagged outputs that hold it, in any form.
        clean_count (`int`): Outputs without any sign of a problem that hold it.
        examples (`tuple[str, ...]`): Where it occurs, with the text around it.
        variants (`tuple[str, ...]`): Other forms of it, the most frequent first. Case and white space make no form.
    """

    text: str
    keep: bool = True
    severity: float = DEFAULT_SEVERITY
    kind: Literal["span", "quote", "phrase"] = "phrase"
    count: int = 0
    clean_count: int = 0
    examples: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """Frequency x severity: what candidates are ranked by."""
        return self.count * self.severity

    @property
    def forms(self) -> tuple[str, ...]:
        """Every form to look for."""
        return (self.text, *self.variants)


def check_severity(value: Any) -> float:
    """The value as a number from 1 to 5.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 5:
        raise ValueError(f"`severity` must be a number from 1 to 5, got {value!r:.80}")
    return float(value)


class Outputs:
    """Texts in which phrases are found fast: only those that have all of its words are searched.

    Args:
        texts: The texts.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self._with_word: defaultdict[str, set[int]] = defaultdict(set)
        for index, text in enumerate(texts):
            for word in set(_RUN.findall(text.lower())):
                self._with_word[word].add(index)

    def find(self, phrase: str) -> dict[int, list[Span]]:
        """Position of a text -> where it holds the phrase, as a whole word, whatever the case and white space."""
        sets = [self._with_word.get(word, set()) for word in _RUN.findall(phrase.lower())]
        indices = sorted(set.intersection(*sets)) if sets else range(len(self.texts))
        annotator = PhraseAnnotator([phrase])
        found = annotator.annotate([self.texts[index] for index in indices], [""] * len(indices))
        return {index: spans for index, spans in zip(indices, found, strict=True) if spans}


def form_key(text: str) -> str:
    """The text in lower case and without punctuation around its words: equal for forms that differ in no more."""
    words = (word.strip(_PUNCTUATION) for word in fold(text).split())
    return " ".join(filter(None, words)) or fold(text)


def marked_text(text: str, start: int, end: int) -> str:
    """What a span marks, as something to look for elsewhere: widened to whole words, without punctuation around it.

    Empty if the span holds nothing but white space.
    """
    if not text[start:end].strip():
        return ""
    while start > 0 and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    while end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
        end += 1
    words = " ".join(text[start:end].split())
    words = words.strip(_PUNCTUATION) or words
    return _MARKUP.sub(r"\2", words) if _MARKUP.fullmatch(words) else words


def find_quotes(complaint: str, text: str) -> tuple[list[Span], int]:
    """Where an output holds what a complaint about it quotes.

    Quotation marks of any kind count, and "..." for words left out; case, white space, the kind of apostrophe and
    punctuation at either end do not matter.

    Returns:
        The spans in the output, labelled with the quote, and the number of quotes that are not in it.
    """
    spans, missing = [], 0
    for match in _QUOTE.finditer(complaint):
        quote = next(group for group in match.groups() if group is not None)
        parts = [part.strip(_PUNCTUATION) or part.strip() for part in _LEFT_OUT.split(quote)]
        parts = [part for part in parts if part]
        found = [span for part in parts for span in PhraseAnnotator([part]).annotate([text], [""])[0]]
        missing += bool(parts) and not found
        spans += found
    return spans, missing


def find_candidates(logs: Sequence[LogRow], *, max_candidates: int = 200, min_count: int = 1) -> list[Candidate]:
    """What may be unwanted in logged outputs, ranked by frequency x severity, near-duplicates merged.

    Candidates are the spans that rows mark, the quotes of their complaints that are found in the output and, for
    flagged rows with neither, the phrases that such outputs use more than clean ones (`mining.mine_phrases`). Forms
    that differ in case, punctuation, inflection, spelling or one of four or more words become one candidate, unless it
    is by a negation or a number.

    By default a candidate is kept if it separates flagged outputs from clean ones: their shares that hold it differ by
    a factor of at least `MIN_LIFT`, and the log-odds are `MIN_Z` standard deviations above 0 (`KEEP_Z` for a phrase
    that nobody pointed at). Spans and quotes also are if at least half of the flagged outputs with them are where they
    come from: "the", marked once by mistake, is not.

    Args:
        logs: Rows of `read_logs`, clean ones included.
        max_candidates: Longest list; a warning counts what is cut off.
        min_count: Flagged outputs that must hold a candidate.

    Returns:
        The candidates, those to keep first, and then by score.

    Raises:
        ValueError: No row is flagged, or an argument is below 1.
    """
    for name, value in (("max_candidates", max_candidates), ("min_count", min_count)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; give at least 1")
    flagged, clean = [row for row in logs if row.flagged], [row for row in logs if not row.flagged]
    if not flagged:
        raise ValueError(
            f"none of the {len(logs)} logged outputs has a sign of a problem; bad ones need `flagged: true`, `spans`, "
            "a `complaint` or a `severity`"
        )
    groups = _marked(flagged)
    _add_mined(groups, flagged, clean, min_count)
    flagged_outputs, clean_outputs = Outputs([row.text for row in flagged]), Outputs([row.text for row in clean])
    candidates = [_candidate(group, flagged, flagged_outputs, clean_outputs) for group in _merge_similar(groups)]
    candidates = [candidate for candidate in candidates if candidate.count >= min_count]
    candidates.sort(
        key=lambda candidate: (not candidate.keep, -candidate.score, candidate.clean_count, candidate.text)
    )
    if len(candidates) > max_candidates:
        logger.warning(
            "%d of %d candidates left out, %d of which would be kept; raise max_candidates to see them",
            len(candidates) - max_candidates,
            len(candidates),
            sum(candidate.keep for candidate in candidates[max_candidates:]),
        )
    return candidates[:max_candidates]


@dataclass
class _Group:
    """Forms of one candidate and the flagged rows they were found in (row -> the first place, if it was marked)."""

    kind: Literal["span", "quote", "phrase"]
    z: float = math.inf
    forms: Counter[str] = field(default_factory=Counter)
    rows: dict[int, tuple[int, int] | None] = field(default_factory=dict)

    def absorb(self, other: _Group) -> None:
        self.kind = min(self.kind, other.kind, key=("span", "quote", "phrase").index)
        self.z = max(self.z, other.z)
        self.forms += other.forms
        for row, place in other.rows.items():
            self.rows[row] = self.rows.get(row) or place


def _marked(flagged: Sequence[LogRow]) -> dict[str, _Group]:
    """Key of a form -> what spans and quotes say of it."""
    groups: dict[str, _Group] = {}
    missing = 0
    for index, row in enumerate(flagged):
        quotes, not_found = find_quotes(row.complaint, row.text)
        missing += not_found
        for kind, spans in (("span", row.spans), ("quote", quotes)):
            for start, end, *_ in spans:
                if text := marked_text(row.text, start, end):
                    group = _Group(kind, forms=Counter([text]), rows={index: (start, end)})
                    groups.setdefault(form_key(text), _Group(kind)).absorb(group)
    if missing:
        logger.info("%d quotes in complaints are not in the output complained about; they are ignored", missing)
    return groups


def _add_mined(groups: dict[str, _Group], flagged: Sequence[LogRow], clean: Sequence[LogRow], min_count: int) -> None:
    """Add the phrases that flagged rows without a span or quote have in common."""
    explained = {index for group in groups.values() for index in group.rows}
    rest = [index for index in range(len(flagged)) if index not in explained]
    if rest and not clean:
        logger.warning(
            "%d flagged outputs have neither a span nor a quote, and there is no clean output to compare them with; "
            "add outputs that nobody flagged",
            len(rest),
        )
    texts = [flagged[index].text for index in rest]
    for phrase in mine_phrases(texts, [row.text for row in clean], min_count=min_count):
        rows = {rest[index]: None for index in sorted(phrase.outputs)}
        for form, count in phrase.forms.items():
            group = _Group("phrase", phrase.z, Counter({form: count}), rows)
            groups.setdefault(form_key(form), _Group("phrase", phrase.z)).absorb(group)


def _merge_similar(groups: dict[str, _Group]) -> list[_Group]:
    """Put each form, the most frequent first, to the first more frequent one that it is a near-duplicate of."""
    heads: list[tuple[list[str], _Group]] = []
    having: defaultdict[str, list[int]] = defaultdict(list)  # beginning of a word -> the heads that have such a word
    for key, group in sorted(groups.items(), key=lambda item: (-len(item[1].rows), item[0])):
        words = [word.removesuffix("'s").strip("*_") or word for word in key.split()]
        beginnings = {word[:2] for word in words}
        shared = Counter(place for beginning in beginnings for place in having[beginning])
        for place, count in shared.most_common():
            if 2 * count >= len(beginnings) and _near_duplicates(words, heads[place][0]):
                heads[place][1].absorb(group)
                break
        else:
            for beginning in beginnings:
                having[beginning].append(len(heads))
            heads.append((words, group))
    return [group for _, group in heads]


def _near_duplicates(one: list[str], other: list[str]) -> bool:
    """Whether the words are the same, up to spelling, but for added ones: at most a quarter of the longer text."""
    added = 0
    for tag, i, j, k, m in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if tag == "replace" and j - i == m - k and all(map(_same_word, one[i:j], other[k:m])):
            continue
        words = one[i:j] + other[k:m]
        if tag == "replace" or any(map(_never_ignored, words)):
            return False
        added += len(words)
    return 4 * added <= max(len(one), len(other))


def _same_word(one: str, other: str) -> bool:
    """Whether two words are inflections or misspellings of each other; the first letter tells "safe" from "unsafe"."""
    if _never_ignored(one) or _never_ignored(other) or one[0] != other[0]:
        return False
    if one.isalpha() and other.isalpha() and (other in inflected_forms(one) or one in inflected_forms(other)):
        return True
    return min(len(one), len(other)) >= 6 and SequenceMatcher(None, one, other, autojunk=False).ratio() >= 0.85


def _never_ignored(word: str) -> bool:
    return word in _NEGATIONS or word.endswith("n't") or any(char.isdigit() for char in word)


def _candidate(
    group: _Group, flagged: Sequence[LogRow], flagged_outputs: Outputs, clean_outputs: Outputs
) -> Candidate:
    forms = _distinct_forms(group.forms)
    places = dict(group.rows)
    for form in forms:
        for index, spans in flagged_outputs.find(form).items():
            places[index] = places.get(index) or (spans[0].start, spans[0].end)
    count = sum(place is not None for place in places.values())
    clean_count = len({index for form in forms for index in clean_outputs.find(form)})
    given = [flagged[index].severity for index in group.rows if flagged[index].severity is not None]
    contexts = (_context(flagged[index].text, *place) for index, place in places.items() if place is not None)
    return Candidate(
        text=forms[0],
        kind=group.kind,
        keep=_is_clear(group, count, len(flagged), clean_count, len(clean_outputs.texts)),
        severity=sum(given) / len(given) if given else DEFAULT_SEVERITY,
        count=count,
        clean_count=clean_count,
        examples=tuple(dict.fromkeys(contexts))[:NUM_EXAMPLES],
        variants=tuple(forms[1:]),
    )


def _is_clear(group: _Group, count: int, flagged: int, clean_count: int, clean: int) -> bool:
    """Whether a candidate is kept by default, see `find_candidates`."""
    if group.kind == "phrase":
        return group.z >= KEEP_Z and separates(count, flagged, clean_count, clean)
    if 2 * len(group.rows) >= count:
        return True
    counts = (count, flagged, clean_count, clean)
    return clean > 0 and separates(*counts) and log_odds(*counts)[1] >= MIN_Z


def _distinct_forms(forms: Counter[str]) -> list[str]:
    """One form of those that the search does not tell apart, the most frequent first."""
    alike: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for form, count in forms.items():
        alike[fold(form)][form] += count
    ordered = sorted(alike, key=lambda key: (-alike[key].total(), key))
    return [min(alike[key], key=lambda form: (-alike[key][form], form)) for key in ordered]


def _context(text: str, start: int, end: int) -> str:
    """The text around a span in one line, "..." where it is cut."""
    first, last = max(0, start - _CONTEXT), min(len(text), end + _CONTEXT)
    last = min(last, first + _LONGEST_EXAMPLE)
    inside = " ".join(text[first:last].split())
    return ("..." if first else "") + inside + ("..." if last < len(text) else "")
