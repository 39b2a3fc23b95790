"""From the logs of a deployed model, with flags or complaints, to candidates for a person to judge, to training rows.

The way of the data: `read_logs` -> `find_candidates` -> `write_candidates` -> a person edits the file ->
`load_candidates` -> `rows_from_logs`. The outputs must be the model's own: the method takes its targets from the
distribution that wrote them (arXiv 2406.13660, section 4).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..core.generation.sampling import completion_text
from ..core.generation.types import Prompt
from ..core.options import message, renamed
from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import write_atomically
from .annotate.phrases import PhraseAnnotator
from .annotate.rows import GIVEN, Span, merge_spans, severities_of
from .data import check_spans, is_chat


logger = logging.getLogger(__name__)

FOUND = "logs"  # who marked the spans where a selected candidate was found; those that the log marked are `GIVEN`
DEFAULT_SEVERITY = 1.0  # where nobody said: the factor on a span's weight in training that changes nothing


@dataclass(frozen=True)
class LogRow:
    """An output of a deployed model and what was said about it."""

    index: int  # position in the log, from 0
    prompt: Prompt
    completion: Prompt
    text: str  # of the completion; what spans point into
    flagged: bool = False  # whether there is any sign of a problem
    spans: tuple[tuple[int, int], ...] = ()  # parts of `text` that are marked as bad
    complaint: str = ""
    severity: float | None = None  # 1 to 5
    truncated: bool = False  # whether the output hit the generation limit, so that it has no end


def read_logs(path: str | os.PathLike) -> list[LogRow]:
    """Read logged outputs from JSON lines with `prompt`, `completion` and, where known, `flagged`, `spans` ([start,
    end) characters of the completion), `complaint`, `severity` and `truncated`; a `ValueError` names what is bad.

    A row is flagged if `flagged` is true or there is a span or a complaint; `severity` alone does it too, unless
    `flagged` is false. All others are clean, and training keeps them as they are.
    """
    logs = []
    for index, row in enumerate(read_jsonl(path, required=("prompt", "completion"))):
        try:
            logs.append(_log_row(row, index))
        except ValueError as error:
            raise ValueError(f"{path}: row {index + 1}: {error}") from None
    if not logs:
        raise ValueError(f"{path}: no rows; each line needs a `prompt` and a `completion`")
    return logs


def _log_row(row: dict[str, Any], index: int) -> LogRow:
    prompt, text = row["prompt"], completion_text(row["completion"])
    flagged, truncated, complaint, severity = map(row.get, ("flagged", "truncated", "complaint", "severity"))
    for column, expected, valid in (
        ("prompt", "a text or a list of chat messages", isinstance(prompt, str) or is_chat(prompt)),
        ("flagged", "true or false", flagged in (None, False, True)),
        ("truncated", "true or false", truncated in (None, False, True)),
        ("complaint", "text", complaint is None or isinstance(complaint, str)),
        ("severity", "a number from 1 to 5", severity is None or _is_severity(severity)),
    ):
        if not valid:
            raise ValueError(f"`{column}` must be {expected}, got {row[column]!r:.80}")
    spans, complaint = check_spans(row.get("spans"), len(text), "the log", "spans"), (complaint or "").strip()
    flagged = bool(flagged or spans or complaint or (severity is not None and flagged is None))
    return LogRow(index, prompt, row["completion"], text, flagged, tuple(spans), complaint, severity, bool(truncated))


def _is_severity(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= 5


@renamed(keep="selected")
@dataclass(frozen=True)
class Candidate:
    """Something that may be unwanted, and what the logs say about it."""

    text: str  # its most frequent form
    selected: bool = True  # whether it is unwanted indeed, and to be removed from the model
    severity: float = DEFAULT_SEVERITY  # 1 to 5: the mean over the rows it was found in
    kind: str = "phrase"  # "span", "quote" or "phrase": marked in an output; in a complaint; mined
    count: int = 0  # flagged outputs that hold it, in any form
    clean_count: int = 0  # outputs without any sign of a problem that hold it
    examples: tuple[str, ...] = ()  # where it occurs, with the text around it
    variants: tuple[str, ...] = ()  # other forms, the most frequent first; case and white space make no form

    @property
    def score(self) -> float:
        return self.count * self.severity

    @property
    def forms(self) -> tuple[str, ...]:
        return (self.text, *self.variants)


_KINDS = ("span", "quote", "phrase")
_TEXT = ("text that is not empty, in quotes", lambda v: isinstance(v, str) and bool(v.strip()))
_DECISIVE = {  # the other fields are for a person's information only
    "text": _TEXT,
    "variants": ("a list of texts, each in quotes", lambda v: isinstance(v, list) and all(map(_TEXT[1], v))),
    "selected": ("true or false", lambda v: isinstance(v, bool)),
    "severity": ("a number from 1 to 5", _is_severity),
}

_HEADER = """\
# What may be unwanted in the logged outputs: first what is selected by default, and of each part the worst first
# (count x severity). Read it before you train. For each entry:
#   selected  true: remove it from the model, wherever it occurs, flagged or not. false: it is fine as it is.
#             Set false rather than delete the entry: what a log marks is unwanted unless an entry says that it is not.
#   text, variants   what is looked for: whole words, any case and white space. Add forms, or delete wrong ones.
#   severity  1 (a blemish) to 5 (must never happen): a factor on `alpha` in training.
# `- text: ...` alone is an entry too. For your information only: kind (span: marked in an output; quote: from a
# complaint; phrase: more frequent in flagged outputs), count and clean_count (flagged and other outputs with it) and
# examples. A phrase that only flagged outputs share may be their subject, not their fault: look at the examples.
"""


def write_candidates(path: str | os.PathLike, candidates: Sequence[Candidate]) -> None:
    """Write candidates as YAML, under a comment that says how to edit them; a file that is there is refused."""
    import yaml

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists and may have been edited; move it away, or write to another file")
    if not candidates:
        raise ValueError(f"no candidate to write to {path}; add complaints that quote the output, or more logs")
    entries = json.loads(json.dumps([asdict(candidate) for candidate in candidates]))  # lists for tuples
    body = yaml.safe_dump({"candidates": entries}, sort_keys=False, allow_unicode=True, width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _HEADER + "\n" + body)


def load_candidates(path: str | os.PathLike) -> list[Candidate]:
    """Read a file of candidates (every field but `text` is optional); errors name file, entry (from 1) and field."""
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not valid YAML; put texts with special characters in quotes ({reason})") from None
    entries = document.get("candidates") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected only the key `candidates`, with a list of entries `- text: ...`")
    if any(isinstance(entry, dict) and "keep" in entry for entry in entries):
        warnings.warn(f"{path}: {message('keep', 'selected')}", FutureWarning, stacklevel=2)
    candidates: list[Candidate] = []
    owners: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number} ({entry!r:.40})"
        if not isinstance(entry, dict) or "text" not in entry:
            raise ValueError(f"{where} is no mapping with `text`; write `- text: <what is unwanted>`")
        if "keep" in entry:
            entry["selected"] = entry.pop("keep")
        if unknown := entry.keys() - {f.name for f in fields(Candidate)}:
            raise ValueError(f"{where}: unknown field {min(unknown)!r}; leave it out")
        for name in entry.keys() & _DECISIVE.keys():
            expected, is_valid = _DECISIVE[name]
            if not is_valid(entry[name]):
                raise ValueError(f"{where}: `{name}` must be {expected}, got {entry[name]!r:.80}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        candidates.append(Candidate(**values))
        for form in candidates[-1].forms:
            if (owner := owners.setdefault(form_key(form), number)) != number:
                raise ValueError(f"{where}: {form!r:.80} is in entry {owner} too; leave it in one of them")
    return candidates


# Looking for phrases. Not punctuation: "*", "$", "@" and the like, letters of what people rather not write out
_PUNCTUATION = " \t\r\n.,;:!?\"'()[]{}“”„‘’«»`…–—-"
_APOSTROPHES = str.maketrans("’‘ʼ＇", "'" * 4)
_RUN = re.compile(r"[^\W_]+")
_RUN_BEFORE = re.compile(r"[^\W_]*\Z")
_ENDING = re.compile(r"(?<=[^\W_]{3})(?:'?s|ed|ing)\b")
_MARKUP = re.compile(r"(\*{1,3}|_{1,3})(?=[^*_])(.+)(?<=[^*_])\1")
_QUOTE = re.compile(r"\"([^\"]+)\"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|`([^`]+)`|(?<!\w)['‘](.+?)['’](?!\w)", re.DOTALL)
_LEFT_OUT = re.compile(r"\[?(?:\.{3,}|…)\]?")


class PhraseIndex:
    """Texts in which phrases are found fast: only those that have all of its words are searched."""

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
        found = PhraseAnnotator([phrase]).annotate([self.texts[index] for index in indices], [])
        return {index: spans for index, spans in zip(indices, found, strict=True) if spans}


def fold(text: str) -> str:
    """Lower case, single spaces, straight apostrophes: texts that are equal so are found by the same search."""
    return " ".join(text.translate(_APOSTROPHES).lower().split())


def form_key(text: str) -> str:
    """The text in lower case and without punctuation around its words: equal for forms that differ in no more."""
    words = (word.strip(_PUNCTUATION) for word in fold(text).split())
    return " ".join(filter(None, words)) or fold(text)


def marked_text(text: str, start: int, end: int) -> str:
    """What a span marks, to look for elsewhere: widened to whole words, without punctuation or markup around it."""
    if not text[start:end].strip():
        return ""
    start -= len(_RUN_BEFORE.findall(text[:start] if text[start].isalnum() else "")[0])
    if run := _RUN.match(text, end - 1):
        end = run.end()
    words = " ".join(text[start:end].split())
    words = words.strip(_PUNCTUATION) or words
    return _MARKUP.sub(r"\2", words) if _MARKUP.fullmatch(words) else words


def find_quotes(complaint: str, text: str) -> list[Span]:
    """Where an output holds what a complaint about it quotes, in quotation marks of any kind.

    "..." stands for words left out; case, white space, kinds of apostrophes and punctuation at the ends do not matter.
    """
    parts = [
        part.strip(_PUNCTUATION) or part.strip()
        for match in _QUOTE.finditer(complaint)
        for part in _LEFT_OUT.split(next(group for group in match.groups() if group is not None))
    ]
    return [span for part in parts if part for span in PhraseAnnotator([part]).annotate([text], [])[0]]


# Phrases that more flagged outputs hold than clean ones, for logs that say that an output is bad, but not what is.
# How often one output repeats a phrase is no matter: a long, repetitive one must not outvote a hundred others.

MAX_WORDS, MIN_Z = 60, 1.96  # of a mined phrase
MIN_LIFT = 2.0  # a phrase is in so many times the share of flagged outputs as of clean ones, so that no common word is
SAME_SHARE = 0.9  # a longer phrase stands for one inside it if it is in this share of the outputs that hold that one

# An underscore is no part of a word: Markdown writes _word_
_WORD = re.compile(r"[^\W_]+(?:['’‘ʼ＇-][^\W_]+)*")
_BREAK = re.compile(r"[.!?;:…][\"'”’)\]*_]*\s|[\n。！？；：]")

Gram: TypeAlias = tuple[str, ...]
# Where a phrase occurs: the output, a sentence (for each word its folded text, start and end), its first word
Spots: TypeAlias = list[tuple[int, list[tuple[str, int, int]], int]]


def mine_phrases(flagged: Sequence[str], clean: Sequence[str]) -> Iterator[tuple[float, int, str]]:
    """Phrases that are over-represented in flagged outputs: z, a flagged output that holds it, and how that writes it.

    Tried is every phrase within a sentence that two flagged outputs hold. Of two, one inside the other, the longer
    stays if it is nearly as frequent (`SAME_SHARE`) or has the higher z; else it is the shorter one with a neighbour.
    """
    scores: dict[Gram, tuple[float, int]] = {}
    found: dict[Gram, Spots] = {}
    spots: dict[Gram, Spots] = {(): _beginnings(flagged)}
    in_clean: dict[Gram, Spots] = {(): _beginnings(clean)}
    for _ in range(MAX_WORDS if flagged and clean else 0):
        spots = {gram: where for gram, where in _longer(spots).items() if _num_outputs(where) >= 2}
        in_clean = {gram: where for gram, where in _longer(in_clean).items() if gram in spots}
        for gram, where in spots.items():
            counts = _num_outputs(where), len(flagged), _num_outputs(in_clean.get(gram, [])), len(clean)
            z = log_odds(*counts)[1]
            if z >= MIN_Z and separates(*counts):
                scores[gram], found[gram] = (z, counts[0]), where
    for gram in _without_nested(scores):
        for output, words, first in found[gram]:
            start, end = words[first][1], words[first + len(gram) - 1][2]
            yield scores[gram][0], output, " ".join(flagged[output][start:end].split())


def _beginnings(texts: Sequence[str]) -> Spots:
    """Every word of every text. A line break or a colon ends a sentence too; commas are skipped."""
    spots: Spots = []
    for index, text in enumerate(texts):
        words: list[tuple[str, int, int]] = []
        for match in _WORD.finditer(text):
            if words and _BREAK.search(text, words[-1][2], match.start()):
                words = []
            spots.append((index, words, len(words)))
            words.append((fold(match.group()), match.start(), match.end()))
    return spots


def _longer(spots: dict[Gram, Spots]) -> dict[Gram, Spots]:
    """The same phrases with the word behind them."""
    longer: defaultdict[Gram, Spots] = defaultdict(list)
    for gram, where in spots.items():
        for output, words, first in where:
            if first + len(gram) < len(words):
                longer[(*gram, words[first + len(gram)][0])].append((output, words, first))
    return longer


def _num_outputs(spots: Spots) -> int:
    return len({output for output, _, _ in spots})


def _without_nested(scores: dict[Gram, tuple[float, int]]) -> list[Gram]:
    """One of each pair of phrases of which one lies inside the other, longest first; scores are z and outputs."""
    left = dict.fromkeys(sorted(scores, key=lambda gram: (-len(gram), -scores[gram][0], gram)))
    for gram in list(left):
        z, count = scores[gram]
        parts = (gram[i : i + size] for size in range(len(gram) - 1, 0, -1) for i in range(len(gram) - size + 1))
        for part in parts:
            if gram not in left:
                break
            if part in left:
                del left[part if count >= SAME_SHARE * scores[part][1] or z >= scores[part][0] else gram]
    return list(left)


def log_odds(flagged_count: int, flagged: int, clean_count: int, clean: int) -> tuple[float, float]:
    """How much more flagged outputs hold a phrase than clean ones: delta (nats) and z (standard deviations), 0 if all
    outputs hold it, or none does.

    Monroe, Colaresi and Quinn, "Fightin' Words" (2008), for outputs instead of word tokens. Their Dirichlet
    prior, here worth as many outputs as the smaller group, keeps what was seen once or twice from coming out on top.
    The paper leaves the outputs without it out of the variance; a phrase may well be in most of the flagged ones.
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


# From complaints to candidates: what flagged outputs have in common, ranked, for a person to select

SELECT_Z = 3.0  # of thousands of n-grams tried a few reach 2 standard deviations by chance
MAX_CANDIDATES, NUM_EXAMPLES = 200, 3
_CONTEXT, _LONGEST_EXAMPLE = 40, 160  # characters


class _Mention(NamedTuple):
    """A form that a flagged row is said to hold, and by whom; z is infinite where somebody pointed at it."""

    kind: str
    form: str
    row: int
    z: float = math.inf


def find_candidates(logs: Sequence[LogRow]) -> list[Candidate]:
    """What may be unwanted in logged outputs: at most `MAX_CANDIDATES`, those selected first, and then by score.

    Candidates are the spans that rows mark, what complaints quote of the output and, for flagged rows with neither,
    the phrases that such outputs use more than clean ones. Forms that differ in case, punctuation or an English ending
    (-s, -ed, -ing) are variants of one. Selected by default are those that separate flagged outputs from clean ones,
    and those that half of the flagged outputs which hold them point at: "the", marked once by mistake, is not.
    """
    flagged, clean = [row for row in logs if row.flagged], [row for row in logs if not row.flagged]
    if not flagged:
        signs = "`flagged: true`, `spans`, a `complaint` or a `severity`"
        raise ValueError(f"none of the {len(logs)} logged outputs has a sign of a problem; bad ones need {signs}")
    mentions: defaultdict[str, list[_Mention]] = defaultdict(list)  # by form without English endings
    for index, row in enumerate(flagged):
        for kind, spans in (("span", row.spans), ("quote", find_quotes(row.complaint, row.text))):
            for start, end, *_ in spans:
                if text := marked_text(row.text, start, end):
                    mentions[_ENDING.sub("", form_key(text))].append(_Mention(kind, text, index))
    explained = {mention.row for group in mentions.values() for mention in group}
    rest = [index for index in range(len(flagged)) if index not in explained]
    if rest and not clean:
        logger.warning("%d flagged outputs have neither a span nor a quote, and no clean output to compare", len(rest))
    for z, index, form in mine_phrases([flagged[index].text for index in rest], [row.text for row in clean]):
        mentions[_ENDING.sub("", form_key(form))].append(_Mention("phrase", form, rest[index], z))
    indices = PhraseIndex([row.text for row in flagged]), PhraseIndex([row.text for row in clean])
    candidates = [c for group in mentions.values() if (c := _as_candidate(group, flagged, *indices)).count]
    candidates.sort(key=lambda c: (not c.selected, -c.score, c.clean_count, c.text))
    if left_out := candidates[MAX_CANDIDATES:]:
        selected = sum(candidate.selected for candidate in left_out)
        logger.warning("%d of %d candidates left out, %d selected", len(left_out), len(candidates), selected)
    return candidates[:MAX_CANDIDATES]


def _as_candidate(
    group: list[_Mention], flagged: Sequence[LogRow], in_flagged: PhraseIndex, in_clean: PhraseIndex
) -> Candidate:
    alike: defaultdict[str, Counter[str]] = defaultdict(Counter)  # forms that the search does not tell apart
    for mention in group:
        alike[fold(mention.form)][mention.form] += 1
    ordered = sorted(alike, key=lambda key: (-alike[key].total(), key))
    forms = [min(alike[key], key=lambda form: (-alike[key][form], form)) for key in ordered]
    places: dict[int, Span] = {}
    for form in forms:
        places = {index: spans[0] for index, spans in in_flagged.find(form).items()} | places
    clean_count = len({index for form in forms for index in in_clean.find(form)})
    counts = len(places), len(flagged), clean_count, len(in_clean.texts)
    kind, z, rows = min((m.kind for m in group), key=_KINDS.index), max(m.z for m in group), {m.row for m in group}
    pointed_at = kind != "phrase" and 2 * len(rows) >= len(places)
    least = SELECT_Z if kind == "phrase" else MIN_Z
    z = z if kind == "phrase" else log_odds(*counts)[1] if counts[3] else 0.0
    selected = pointed_at or (z >= least and separates(*counts))
    severities = [severity for index in sorted(rows) if (severity := flagged[index].severity) is not None]
    severity = round(sum(severities) / len(severities), 2) if severities else DEFAULT_SEVERITY
    pointing_first = sorted(places, key=lambda index: (index not in rows, index))
    contexts = dict.fromkeys(_context(flagged[index].text, *places[index][:2]) for index in pointing_first)
    examples, variants = tuple(contexts)[:NUM_EXAMPLES], tuple(forms[1:])
    return Candidate(forms[0], selected, severity, kind, len(places), clean_count, examples, variants)


def _context(text: str, start: int, end: int) -> str:
    """The text around a span in one line, "..." where it is cut."""
    first = max(0, start - _CONTEXT)
    last = min(len(text), end + _CONTEXT, first + _LONGEST_EXAMPLE)
    return ("..." if first else "") + " ".join(text[first:last].split()) + ("..." if last < len(text) else "")


_Mark: TypeAlias = tuple[int, int, str, str, float]  # start, end, by whom, the candidate, its severity


def rows_from_logs(logs: Sequence[LogRow], candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Training rows, as `annotate.annotate_rows` writes them, with everything marked that is unwanted.

    Marked are all forms of every selected candidate in every output, also where nobody flagged it, and the spans that
    the log marks, unless these are a form of a candidate that is not selected. What the log says of an output holds
    for another row with the same prompt and output too. Flagged outputs in which nothing is marked are left out: what
    is bad in them is unknown, and must not be trained as wanted. `severity` is a row's highest, 0 for a clean one.
    """
    index = PhraseIndex([row.text for row in logs])
    found: defaultdict[int, set[_Mark]] = defaultdict(set)
    for candidate in candidates:
        for form in candidate.forms if candidate.selected else ():
            for place, spans in index.find(form).items():
                found[place] |= {(s.start, s.end, FOUND, candidate.text, candidate.severity) for s in spans}
    outputs = [json.dumps([row.prompt, row.text], sort_keys=True) for row in logs]
    given = _given(logs, outputs, candidates)
    rows = []
    for place, row in enumerate(logs):
        marks = sorted(found[place] | given.get(outputs[place], set()))
        if not marks and outputs[place] in given:
            continue
        annotations = [{"start": m[0], "end": m[1], "by": m[2], "label": m[3], "severity": m[4]} for m in marks]
        merged = merge_spans(marks)
        made = {name: getattr(row, name) for name in ("index", "prompt", "completion", "truncated")}
        made |= {"negative_spans": merged, **severities_of(merged, annotations), "annotations": annotations}
        rows.append({"id": f"log-{row.index}", **made, "severity": max((mark[4] for mark in marks), default=0.0)})
    return rows


def _given(logs: Sequence[LogRow], outputs: Sequence[str], candidates: Sequence[Candidate]) -> dict[str, set[_Mark]]:
    """Output of a flagged row -> what the log marks in it, less candidates that are not selected."""
    of_form = {form_key(form): candidate for candidate in candidates for form in candidate.forms}
    marks: dict[str, set[_Mark]] = {output: set() for row, output in zip(logs, outputs, strict=True) if row.flagged}
    for row, output in zip(logs, outputs, strict=True):
        for start, end in row.spans:
            candidate = of_form.get(form_key(marked_text(row.text, start, end)))
            if candidate is None and start < end:
                marks[output].add((start, end, GIVEN, "", row.severity or DEFAULT_SEVERITY))
            elif candidate and candidate.selected and start < end:
                marks[output].add((start, end, GIVEN, candidate.text, candidate.severity))
    return marks
