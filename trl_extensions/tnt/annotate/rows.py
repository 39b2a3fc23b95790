"""Mark the unwanted parts of sampled outputs: what every annotator offers, and the file of annotated rows.

Targeted negative training (arXiv 2406.13660) learns from a model's own outputs with the unwanted tokens marked. Here
they are marked in characters; several annotators compose, since a part is unwanted as soon as one of them marks it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...core.generation.sampling import completion_text
from ...core.generation.types import Prompt
from ...core.runs.jsonl import JsonlWriter, read_jsonl
from ...core.runs.run import check_resume
from ..data import check_spans


GIVEN = "given"
"""Who marked the spans that a row came with."""


class Span(NamedTuple):
    """Unwanted characters of a text, `text[start:end]`, and why: the phrase, the class or the like."""

    start: int
    end: int
    label: str


class Failure(NamedTuple):
    """A text that an annotator could not annotate: its position in the call's `texts`, and the raw answers to it."""

    index: int
    answers: tuple[str, ...]


class Annotator(Protocol):
    """What every annotator offers.

    Two more attributes are read where they exist: `counts` (a `Counter` of what went wrong, by kind, over all calls)
    and `failures` (the `Failure`s of the last call).

    Attributes:
        name: Who marked a span, in the rows and the report.
        settings: JSON-ready values that the spans depend on; a resumed run must have the same ones.
    """

    name: str
    settings: dict[str, Any]

    def annotate(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[Span]]:
        """The spans of each text, in characters of it. `prompts[i]` is what `texts[i]` answers or continues."""
        ...


@dataclass(frozen=True)
class AnnotationReport:
    """What a call of `annotate_rows` did.

    Args:
        path (`Path`): The file of annotated rows.
        rows (`int`): Rows in the file, those of earlier runs included.
        with_span (`int`): Of these, rows in which something is unwanted.
        spans (`int`): Spans in the file, after merging.
        by_annotator (`dict[str, int]`): Annotator (or `"given"`) -> spans it marked, before merging.
        set_aside (`int`): Rows that an annotator could not judge, kept out of the file, by earlier runs too.
        counts (`dict[str, dict[str, int]]`): Annotator -> what went wrong in this call, by kind (quotes that are
            not in the text, ...).
        resumed (`int`): Rows that earlier runs had annotated or set aside.
        seconds (`float`): Wall time of this call.
    """

    path: Path
    rows: int
    with_span: int
    spans: int
    by_annotator: dict[str, int]
    set_aside: int
    counts: dict[str, dict[str, int]]
    resumed: int
    seconds: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        earlier = f" ({self.resumed} by an earlier run)" if self.resumed else ""
        marked = ", ".join(f"{count} by {name}" for name, count in sorted(self.by_annotator.items()))
        parts = [
            f"{self.path}: {self.rows} rows annotated{earlier}, {self.with_span} with a span",
            f"{self.spans} spans" + (f" ({marked} before merging)" if marked else ""),
        ]
        if self.set_aside:
            parts.append(f"{self.set_aside} rows set aside in {failures_path(self.path).name}")
        for name, counts in sorted(self.counts.items()):
            parts.append(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
        return "; ".join([*parts, f"{self.seconds:.1f} s"])


def merge_spans(spans: Iterable[Sequence[Any]]) -> list[list[int]]:
    """Sorted [start, end) pairs that cover the same characters, of which no two overlap or touch; none is empty.

    Args:
        spans: `Span`s or pairs with `start <= end`, in any order; what follows start and end is ignored.
    """
    merged: list[list[int]] = []
    for start, end in sorted((span[0], span[1]) for span in spans):
        if start == end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def failures_path(output: str | os.PathLike) -> Path:
    """The file beside `output` that holds the rows no one could judge, with the raw answers."""
    return Path(output).with_name(Path(output).stem + ".failures.jsonl")


def annotate_rows(
    rows: Sequence[dict[str, Any]],
    annotators: Sequence[Annotator],
    output: str | os.PathLike,
    *,
    chunk_size: int = 64,
) -> AnnotationReport:
    """Annotate rows with every annotator and append each to a JSON-lines file.

    A row keeps its columns and gets `negative_spans` (sorted and merged [start, end) character offsets into the text
    of `completion_text`) and `annotations` (`start`, `end`, `by` and `label` of each mark, before merging). Spans that
    a row has already stay, as marked by `"given"`, or by those named in its `annotations` where these make up the same
    spans.

    A row that an annotator fails on is no clean row. It goes to `<output stem>.failures.jsonl` with the raw answers;
    delete that file to try such rows again. The annotators' settings are written to `<output stem>.settings.json`, and
    all rows of a chunk are on disk before the next one begins: running again with the same settings goes on where an
    earlier run was stopped.

    Args:
        rows: Rows with `id` (distinct), `completion`, and optionally `prompt` and `negative_spans`.
        annotators: Who marks. May be empty if rows bring their spans.
        output: The `.jsonl` file to append to.
        chunk_size: Rows handed to each annotator at once.

    Raises:
        ValueError: A row that cannot be used (the message names it), given spans that are no integers, reversed or
            outside the text, two annotators of one name, spans outside the text from an annotator, or an `output` made
            with other settings or rows; no row on disk is changed.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}; give at least 1")
    output = Path(output)
    jobs = _read_rows(rows)
    _check_annotators(annotators, any_given=any(job.row.get("negative_spans") is not None for job in jobs))
    check_resume(
        output.with_name(output.stem + ".settings.json"),
        {annotator.name: annotator.settings for annotator in annotators},
        made=str(output),
        started=any(path.is_file() and path.stat().st_size > 0 for path in (output, failures_path(output))),
    )
    return _annotate_missing(jobs, annotators, output, chunk_size)


class _Job(NamedTuple):
    """A row, the text to mark and what is marked already."""

    row: dict[str, Any]
    text: str
    given: list[dict[str, Any]]


class _Tally:
    """Counts of what the file holds."""

    def __init__(self, names: list[str]):
        self.rows = self.with_span = self.spans = self.set_aside = 0
        self.by_annotator = Counter(dict.fromkeys(names, 0))  # whoever marks nothing at all should be seen

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.with_span += bool(row["negative_spans"])
        self.spans += len(row["negative_spans"])
        self.by_annotator.update(annotation["by"] for annotation in row["annotations"])


def _annotate_missing(
    jobs: list[_Job], annotators: Sequence[Annotator], output: Path, chunk_size: int
) -> AnnotationReport:
    from tqdm.auto import tqdm

    start = time.perf_counter()
    before = [Counter(getattr(annotator, "counts", {})) for annotator in annotators]
    tally = _Tally([annotator.name for annotator in annotators])
    with JsonlWriter(output) as writer:
        todo = _without_done(jobs, output, tally)
        resumed = len(jobs) - len(todo)
        with tqdm(total=len(jobs), initial=resumed, desc="annotating", unit="row") as bar:
            for first in range(0, len(todo), chunk_size):
                chunk = todo[first : first + chunk_size]
                _annotate_chunk(chunk, annotators, writer, tally)
                bar.update(len(chunk))
                bar.set_postfix(with_span=tally.with_span, spans=tally.spans)
    counts = {
        annotator.name: dict(new)
        for annotator, earlier in zip(annotators, before, strict=True)
        if (new := Counter(getattr(annotator, "counts", {})) - earlier)
    }
    return AnnotationReport(
        path=output,
        rows=tally.rows,
        with_span=tally.with_span,
        spans=tally.spans,
        by_annotator=dict(tally.by_annotator),
        set_aside=tally.set_aside,
        counts=counts,
        resumed=resumed,
        seconds=time.perf_counter() - start,
    )


def _read_rows(rows: Sequence[dict[str, Any]]) -> list[_Job]:
    jobs, seen = [], set()
    for index, row in enumerate(rows):
        key = row.get("id")
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ValueError(
                f"row {index} has no `id` that is a text or an integer (got {key!r}); give each row its own"
            )
        if key in seen:
            raise ValueError(f"row {index}: the `id` {key!r} occurs twice; give each row its own")
        seen.add(key)
        where = f"row {key!r}"
        if "completion" not in row:
            raise ValueError(f"{where} has no `completion`, only {sorted(row)}; name the column of the output so")
        try:
            text = completion_text(row["completion"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        jobs.append(_Job(row, text, _given(row, check_spans(row.get("negative_spans"), len(text), where))))
    if not jobs:
        raise ValueError("no rows to annotate; check where they come from")
    return jobs


def _given(row: dict[str, Any], spans: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Annotations for the spans a row came with; the recorded ones, if nobody has edited the spans since."""
    try:
        recorded = [
            {key: mark[key] for key in ("start", "end", "by", "label")} for mark in row.get("annotations") or []
        ]
        if merge_spans((mark["start"], mark["end"]) for mark in recorded) == merge_spans(spans):
            return recorded
    except (TypeError, KeyError):
        pass  # a column of another kind that happens to have this name
    return [{"start": start, "end": end, "by": GIVEN, "label": ""} for start, end in spans if start < end]


def _check_annotators(annotators: Sequence[Annotator], *, any_given: bool) -> None:
    if not annotators and not any_given:
        raise ValueError("no annotator, and no row has `negative_spans`; give at least one annotator")
    for name, count in Counter(annotator.name for annotator in annotators).items():
        if count > 1 or name == GIVEN:
            what = "two annotators are called" if count > 1 else "an annotator is called"
            raise ValueError(
                f"{what} {name!r}; give `name=` another value, so that the report can tell who marked what"
            )


def _without_done(jobs: list[_Job], output: Path, tally: _Tally) -> list[_Job]:
    """The jobs that earlier runs left; counts what they did."""
    aside = failures_path(output)
    texts = {job.row["id"]: job.text for job in jobs}
    done = set()
    for row in read_jsonl(output, required=("id", "completion", "negative_spans", "annotations")):
        _check_same(row, texts, output)
        done.add(row["id"])
        tally.add(row)
    for row in read_jsonl(aside, required=("id", "completion")) if aside.is_file() else []:
        _check_same(row, texts, aside)
        done.add(row["id"])
        tally.set_aside += 1
    return [job for job in jobs if job.row["id"] not in done]


def _check_same(row: dict[str, Any], texts: dict[Any, str], path: Path) -> None:
    if row["id"] not in texts:
        problem = f"its row {row['id']!r} is not among the rows given"
    # Lone surrogates cannot be written: the file has `?` for them
    elif completion_text(row["completion"]) != texts[row["id"]].encode("utf-8", errors="replace").decode("utf-8"):
        problem = f"its row {row['id']!r} has another completion than the row given"
    else:
        return
    raise ValueError(f"{path}: {problem}; give the same rows, or more, to resume, or use another output")


def _annotate_chunk(chunk: list[_Job], annotators: Sequence[Annotator], writer: JsonlWriter, tally: _Tally) -> None:
    marks = [list(job.given) for job in chunk]
    failed: dict[int, list[dict[str, Any]]] = {}
    for annotator in annotators:
        for place, spans in enumerate(_spans(annotator, chunk)):
            marks[place] += [{**span._asdict(), "by": annotator.name} for span in spans]
        for place, answers in getattr(annotator, "failures", ()):
            failed.setdefault(place, []).append({"by": annotator.name, "answers": list(answers)})
    for place, (job, found) in enumerate(zip(chunk, marks, strict=True)):
        if place in failed:
            with JsonlWriter(failures_path(writer.path)) as failures:
                failures.append({**job.row, "failures": failed[place]})
            tally.set_aside += 1
            continue
        spans = merge_spans((mark["start"], mark["end"]) for mark in found)
        found = sorted(found, key=lambda mark: (mark["start"], mark["end"]))
        row = {**job.row, "negative_spans": spans, "annotations": found}
        writer.append(row)
        tally.add(row)


def _spans(annotator: Annotator, chunk: list[_Job]) -> list[list[Span]]:
    """What an annotator marks in a chunk, checked: it may be the user's own."""
    found = annotator.annotate([job.text for job in chunk], [job.row.get("prompt") or "" for job in chunk])
    if len(found) != len(chunk):
        raise ValueError(
            f"annotator {annotator.name!r} gave {len(found)} lists of spans for {len(chunk)} texts; one each"
        )
    for job, spans in zip(chunk, found, strict=True):
        for span in spans:
            if not 0 <= span.start < span.end <= len(job.text):
                raise ValueError(
                    f"annotator {annotator.name!r} marked [{span.start}, {span.end}) in row {job.row['id']!r}, whose "
                    f"text has {len(job.text)} characters; it must mark at least one of them, and no others"
                )
    return found
