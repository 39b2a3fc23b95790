"""Mark the unwanted parts of sampled outputs: what every annotator offers, and the file of annotated rows.

Outputs are marked in characters; several annotators compose: a part is unwanted as soon as one of them marks it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...core.generation.sampling import completion_text
from ...core.generation.types import Prompt
from ...core.inputs import with_ids
from ...core.runs.resumable import Failed, failures_path, map_rows
from ..data import check_severities, check_spans


GIVEN = "given"  # who marked the spans that a row came with


class Span(NamedTuple):
    """Unwanted characters of a text, `text[start:end]`, and why: the phrase, the class or the like."""

    start: int
    end: int
    label: str


class Annotator(Protocol):
    """What every annotator offers.

    More attributes are read where they exist: `counts` (a `Counter` of what went wrong, by kind, over all calls),
    `failures` (of the last call: position of a text that could not be annotated -> the raw answers to it) and
    `severities` (label of a span -> the factor on its weight in training, 1 where there is none).
    """

    name: str  # who marked a span, in the rows and the report
    settings: dict[str, Any]  # JSON-ready values that the spans depend on; a resumed run must have the same ones

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        """The spans of each text, in characters of it. `prompts[i]` is what `texts[i]` answers or continues."""
        ...


@dataclass(frozen=True)
class AnnotationReport:
    """What a call of `annotate_rows` did; rows and spans of earlier runs are counted too."""

    path: Path
    rows: int
    with_span: int
    spans: int  # after merging
    by_annotator: dict[str, int]  # annotator (or `"given"`) -> spans it marked, before merging
    set_aside: int  # rows that an annotator could not judge
    counts: dict[str, dict[str, int]]  # annotator -> what went wrong in this call, by kind
    resumed: int  # rows that earlier runs had annotated or set aside
    seconds: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        earlier = f" ({self.resumed} by an earlier run)" if self.resumed else ""
        marked = ", ".join(f"{count} by {name}" for name, count in sorted(self.by_annotator.items()))
        parts = [f"{self.path}: {self.rows} rows annotated{earlier}, {self.with_span} with a span"]
        parts.append(f"{self.spans} spans" + (f" ({marked} before merging)" if marked else ""))
        if not self.spans:
            parts.append("nothing is marked, so there is nothing to learn: look at the outputs for what they do say")
        if self.set_aside:
            parts.append(f"{self.set_aside} rows set aside in {failures_path(self.path).name}")
        for name, counts in sorted(self.counts.items()):
            parts.append(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
        return "; ".join([*parts, f"{self.seconds:.1f} s"])


def merge_spans(spans: Iterable[Sequence[Any]]) -> list[list[int]]:
    """Sorted [start, end) pairs that cover the same characters, of which no two overlap or touch; none is empty."""
    merged: list[list[int]] = []
    for start, end in sorted((span[0], span[1]) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        elif start < end:
            merged.append([start, end])
    return merged


def severities_of(spans: Iterable[Sequence[int]], marks: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """`severities` of merged spans: of each the highest of the marks in it. Empty where no mark has one."""
    if all(mark.get("severity") is None for mark in marks):
        return {}
    own = [[mark.get("severity") or 1.0 for mark in marks if start <= mark["start"] < end] for start, end in spans]
    return {"severities": [max(severities) for severities in own]}


def annotate_rows(
    rows: Sequence[dict[str, Any]], annotators: Sequence[Annotator], output: str | os.PathLike, *, chunk_size: int = 64
) -> AnnotationReport:
    """Annotate rows with every annotator and append each to a JSON-lines file, resumable (see `map_rows`).

    A row keeps its columns and gets `negative_spans` (sorted and merged [start, end) character offsets into the text
    of the completion, or of the assistant message that ends it) and `annotations` (`start`, `end`, `by` and `label` of
    each mark, before merging, and `severity`, where it has one); then also `severities`, of each span the highest of
    its marks. Spans that a row has already stay, as marked by `"given"`, or by those named in its
    `annotations` where these make up the same spans. A row that an annotator fails on is no clean row: it goes to
    `<output stem>.failures.jsonl` with the raw answers; delete that file to try such rows again.

    Rows without an `id` get a digest of what they hold. There may be no annotator if rows bring their spans. An
    `output` made with other settings or rows is refused.
    """
    _check(rows, annotators)
    rows = rows if all("id" in row for row in rows) else with_ids(rows)
    before = [Counter(getattr(annotator, "counts", {})) for annotator in annotators]
    sums = {"with_span": 0, "spans": 0}
    by_annotator = Counter({annotator.name: 0 for annotator in annotators})  # who marks nothing at all should be seen

    def tally(row: dict[str, Any]) -> dict[str, int]:
        sums["with_span"] += bool(row["negative_spans"])
        sums["spans"] += len(row["negative_spans"])
        by_annotator.update(mark["by"] for mark in row["annotations"])
        return sums

    settings = {annotator.name: annotator.settings for annotator in annotators}
    report = map_rows(
        rows, lambda chunk: _annotated(chunk, annotators), output,
        chunk_size=chunk_size, settings=settings, desc="annotating", same=("completion",), tally=tally,
    )  # fmt: skip
    new = {a.name: Counter(getattr(a, "counts", {})) - then for a, then in zip(annotators, before, strict=True)}
    counts = {name: dict(kinds) for name, kinds in new.items() if kinds}
    return AnnotationReport(
        path=report.path, rows=report.rows, by_annotator=dict(by_annotator), set_aside=report.failed, counts=counts,
        resumed=report.resumed, seconds=report.seconds, **sums,
    )  # fmt: skip


def _check(rows: Sequence[dict[str, Any]], annotators: Sequence[Annotator]) -> None:
    for index, row in enumerate(rows):
        where = f"row {row.get('id', index)!r}"
        if "completion" not in row:
            raise ValueError(f"{where} has no `completion`, only {sorted(row)}; name the column of the output so")
        try:
            text = completion_text(row["completion"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        spans = check_spans(row.get("negative_spans"), len(text), where)
        check_severities(row.get("severities"), len(spans), where)
    if not annotators and rows and all(row.get("negative_spans") is None for row in rows):
        raise ValueError("no annotator, and no row has `negative_spans`; give at least one annotator")
    names = [GIVEN, *(annotator.name for annotator in annotators)]
    for name in names[1:]:
        if names.count(name) > 1:
            raise ValueError(f"two annotators are called {name!r}; give one another `name=`, and not {GIVEN!r}")


def _annotated(
    chunk: list[dict[str, Any]], annotators: Sequence[Annotator]
) -> Iterator[tuple[int, dict[str, Any] | Failed]]:
    texts = [completion_text(row["completion"]) for row in chunk]
    marks = [_given(row, text) for row, text in zip(chunk, texts, strict=True)]
    failed: dict[int, list[dict[str, Any]]] = {}
    for annotator in annotators:  # which may be the user's own
        who = f"annotator {annotator.name!r}"
        found = annotator.annotate(texts, [row.get("prompt") or "" for row in chunk])
        if len(found) != len(chunk):
            raise ValueError(f"{who} gave {len(found)} lists of spans for {len(chunk)} texts; one each")
        for place, spans in enumerate(found):
            for span in spans:
                if not 0 <= span.start < span.end <= len(texts[place]):
                    where = f"row {chunk[place]['id']!r}, whose text has {len(texts[place])} characters"
                    raise ValueError(f"{who} marked [{span.start}, {span.end}) in {where}; mark some of these only")
                severity = getattr(annotator, "severities", {}).get(span.label)
                mark = {**span._asdict(), "by": annotator.name}
                marks[place].append(mark if severity is None else mark | {"severity": severity})
        for place, answers in getattr(annotator, "failures", {}).items():
            failed.setdefault(place, []).append({"by": annotator.name, "answers": list(answers)})
    for place, row in enumerate(chunk):
        if place in failed:
            names = ", ".join(failure["by"] for failure in failed[place])
            yield place, Failed(f"not understood: {names}", {"failures": failed[place]})
        else:
            ordered = sorted(marks[place], key=lambda mark: (mark["start"], mark["end"]))
            merged = merge_spans((mark["start"], mark["end"]) for mark in ordered)
            kept = {name: value for name, value in row.items() if name != "severities"}
            yield place, {**kept, "negative_spans": merged, **severities_of(merged, ordered), "annotations": ordered}


def _given(row: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """Marks for the spans a row came with; the recorded ones, if nobody has edited these or severities since."""
    where, given = f"row {row['id']!r}", row.get("severities")
    spans = check_spans(row.get("negative_spans"), len(text), where)
    severities = check_severities(given, len(spans), where)
    try:
        recorded = [
            {key: mark[key] for key in ("start", "end", "by", "label")}
            | ({"severity": mark["severity"]} if mark.get("severity") is not None else {})
            for mark in row["annotations"]
        ]
        merged = merge_spans((mark["start"], mark["end"]) for mark in recorded)
        if merged == merge_spans(spans) and severities_of(merged, recorded).get("severities") == given:
            return recorded
    except (TypeError, KeyError):
        pass  # no such column, or one of another kind that happens to have this name
    return [
        {"start": start, "end": end, "by": GIVEN, "label": ""} | ({"severity": severity} if given else {})
        for (start, end), severity in zip(spans, severities, strict=True)
        if start < end
    ]
