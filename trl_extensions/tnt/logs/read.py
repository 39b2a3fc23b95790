"""Logs of a deployed model, with flags or complaints, and the training rows made of them.

The way of the data: `read_logs` -> `candidates.find_candidates` -> `candidate_file.write_candidates` -> a person edits
the file -> `candidate_file.load_candidates` -> `rows_from_logs`. The outputs must be the model's own: the method takes
its targets from the distribution that wrote them (arXiv 2406.13660, section 4).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.generation.types import Prompt
from ...core.runs.jsonl import read_jsonl
from ..annotate.rows import GIVEN, completion_text, merge_spans
from ..data import check_spans
from .candidates import DEFAULT_SEVERITY, Candidate, Outputs, check_severity, form_key, marked_text


FOUND = "logs"
"""Who marked the spans in training rows where a kept candidate was found; those that the log marked are `GIVEN`."""


@dataclass(frozen=True)
class LogRow:
    """An output of a deployed model and what was said about it.

    Args:
        index (`int`): Position in the log, from 0.
        prompt (`str` or `list[dict]`): What was asked.
        completion (`str` or `list[dict]`): What the model answered.
        text (`str`): The text of `completion` that spans point into.
        flagged (`bool`): Whether there is any sign of a problem.
        spans (`tuple[tuple[int, int], ...]`): Parts of `text` that are marked as bad: character offsets, half-open.
        complaint (`str`): Free text, empty if there is none.
        severity (`float`, *optional*): 1 to 5.
        truncated (`bool`): Whether the output hit the generation limit, so that it has no end.
    """

    index: int
    prompt: Prompt
    completion: Prompt
    text: str
    flagged: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    complaint: str = ""
    severity: float | None = None
    truncated: bool = False


@dataclass(frozen=True)
class LogsReport:
    """What `rows_from_logs` made of a log.

    Args:
        rows (`int`): Training rows, `with_span + clean`.
        with_span (`int`): Rows in which something is marked.
        newly_marked (`int`): Of these, rows that nobody had flagged.
        clean (`int`): Rows without a span, kept whole.
        spans (`int`): Spans in all rows, after merging.
        unknown (`int`): Rows left out: they, or another row of the same prompt and output, are flagged, but nothing in
            them is marked, and what is bad must not be trained as wanted.
    """

    rows: int
    with_span: int
    newly_marked: int
    clean: int
    spans: int
    unknown: int

    @property
    def summary(self) -> str:
        """One line for a log."""
        return (
            f"{self.rows} training rows: {self.with_span} with {self.spans} spans ({self.newly_marked} of them nobody "
            f"had flagged), {self.clean} clean; {self.unknown} left out because their bad part is unknown"
        )


def read_logs(
    path: str | os.PathLike, *, prompt_column: str = "prompt", completion_column: str = "completion"
) -> list[LogRow]:
    """Read logged outputs from a JSON-lines file.

    Columns besides prompt and completion, all of them optional, null where unknown: `flagged` (bool), `spans` (pairs
    [start, end) of character offsets into the completion), `complaint` (free text, in which quotation marks tell what
    the output said), `severity` (1 to 5), `truncated` (bool). Other columns are ignored. A row is flagged if `flagged`
    is true or there is a span or a complaint; `severity` alone does it too, unless `flagged` is false. All other rows
    are clean: nobody found anything wrong with them, and training keeps them as they are.

    Args:
        path (`str` or `os.PathLike`): The file. A last line that a crash cut short is skipped with a warning.
        prompt_column (`str`): Column of the prompt, text or chat messages.
        completion_column (`str`): Column of the output, text or messages of which the last one is the assistant's.

    Returns:
        `list[LogRow]`: in file order, at least one.

    Raises:
        `FileNotFoundError`: there is no such file. `ValueError`: one line naming the file, the line or row (from 1,
        empty lines not counted), the column and what is wrong.
    """
    path = Path(path)
    raw = read_jsonl(path, required=(prompt_column, completion_column))
    if not raw:
        raise ValueError(f"{path}: no rows; each line needs a {prompt_column!r} and a {completion_column!r}")
    rows = []
    for index, row in enumerate(raw):
        try:
            rows.append(_log_row(row, index, row[prompt_column], row[completion_column]))
        except ValueError as error:
            raise ValueError(f"{path}: row {index + 1}: {error}") from None
    return rows


def rows_from_logs(logs: Sequence[LogRow], candidates: Sequence[Candidate]) -> tuple[list[dict[str, Any]], LogsReport]:
    """Training rows with everything marked that is unwanted.

    Marked are all forms of every kept candidate in every output, also where nobody flagged it, and the spans that the
    log marks, unless these are a form of a dropped candidate. What the log says of an output holds for another row
    with the same prompt and output too.

    Args:
        logs: Rows of `read_logs`.
        candidates: Candidates as a person left them, see `candidate_file.load_candidates`.

    Returns:
        Rows `{"id", "index" (position in the log), "prompt", "completion", "truncated", "negative_spans",
        "annotations", "severity"}` and a count of them. `negative_spans` are sorted and merged [start, end) character
        offsets, [] for a clean row; `annotations` tell who marked what, `by` `"given"` or `"logs"`, with the candidate
        as `label`; `severity` is the highest of what is marked, 0 for a clean row.
    """
    found = _found([row.text for row in logs], candidates)
    given, flagged = _given(logs, candidates)
    rows, newly_marked, unknown = [], 0, 0
    for row, marks in zip(logs, found, strict=True):
        key = _same_output(row)
        marks = sorted({*marks, *given.get(key, ())}, key=lambda mark: (mark.start, mark.end, mark.by, mark.label))
        if not marks and key in flagged:
            unknown += 1
            continue
        newly_marked += bool(marks) and key not in flagged
        rows.append(
            {
                "id": f"log-{row.index}",
                "index": row.index,
                "prompt": row.prompt,
                "completion": row.completion,
                "truncated": row.truncated,
                "negative_spans": merge_spans((mark.start, mark.end) for mark in marks),
                "annotations": [
                    {key: getattr(mark, key) for key in ("start", "end", "by", "label")} for mark in marks
                ],
                "severity": max((mark.severity for mark in marks), default=0.0),
            }
        )
    with_span = sum(bool(row["negative_spans"]) for row in rows)
    return rows, LogsReport(
        rows=len(rows),
        with_span=with_span,
        newly_marked=newly_marked,
        clean=len(rows) - with_span,
        spans=sum(len(row["negative_spans"]) for row in rows),
        unknown=unknown,
    )


@dataclass(frozen=True)
class _Mark:
    start: int
    end: int
    by: str
    label: str
    severity: float


def _found(texts: Sequence[str], candidates: Sequence[Candidate]) -> list[set[_Mark]]:
    """For each text, where the kept candidates are."""
    outputs = Outputs(texts)
    marks: list[set[_Mark]] = [set() for _ in texts]
    for candidate in candidates:
        for form in candidate.forms if candidate.keep else ():
            for index, spans in outputs.find(form).items():
                for start, end, _ in spans:
                    marks[index].add(_Mark(start, end, FOUND, candidate.text, candidate.severity))
    return marks


def _given(logs: Sequence[LogRow], candidates: Sequence[Candidate]) -> tuple[dict[str, set[_Mark]], set[str]]:
    """Marks that the log brings, less those of dropped candidates, and what is flagged, both by prompt and output."""
    of_form = {form_key(form): candidate for candidate in candidates for form in candidate.forms}
    marks: defaultdict[str, set[_Mark]] = defaultdict(set)
    flagged = set()
    for row in logs:
        if not row.flagged:
            continue
        key = _same_output(row)
        flagged.add(key)
        for start, end in row.spans:
            candidate = of_form.get(form_key(marked_text(row.text, start, end)))
            if start == end or (candidate and not candidate.keep):
                continue
            severity = DEFAULT_SEVERITY if row.severity is None else row.severity
            if candidate:
                severity = candidate.severity
            marks[key].add(_Mark(start, end, GIVEN, candidate.text if candidate else "", severity))
    return marks, flagged


def _same_output(row: LogRow) -> str:
    return json.dumps([row.prompt, row.text], sort_keys=True)


def _log_row(row: dict[str, Any], index: int, prompt: Any, completion: Any) -> LogRow:
    if not (isinstance(prompt, str) or _is_chat(prompt)):
        raise ValueError(f"the prompt must be a text or a list of chat messages, got {prompt!r:.80}")
    text = completion_text(completion)
    try:
        spans = check_spans(row.get("spans"), len(text), "the log")
    except ValueError as error:
        raise ValueError(str(error).replace("negative_spans", "spans")) from None
    complaint, severity = row.get("complaint"), row.get("severity")
    if not (complaint is None or isinstance(complaint, str)):
        raise ValueError(f"`complaint` must be text, got {complaint!r:.80}")
    if severity is not None:
        severity = check_severity(severity)
    flagged, truncated = (_bool(row.get(column), column) for column in ("flagged", "truncated"))
    complaint = (complaint or "").strip()
    return LogRow(
        index=index,
        prompt=prompt,
        completion=completion,
        text=text,
        flagged=bool(flagged or spans or complaint or (severity is not None and flagged is None)),
        spans=tuple(spans),
        complaint=complaint,
        severity=severity,
        truncated=bool(truncated),
    )


def _bool(value: Any, column: str) -> bool | None:
    if value is not None and value not in (0, 1):
        raise ValueError(f"`{column}` must be true or false, got {value!r:.80}")
    return None if value is None else bool(value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and m.get("role") for m in value)
