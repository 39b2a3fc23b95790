"""Replies made of two fields that belong together, once or several times, in whatever form models give them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.generation.replies import Unreadable, without_fences, without_thoughts
from .reply_json import json_values
from .reply_lists import split_entries
from .reply_text import is_preamble, is_refusal, normal


Kind = Literal["first", "second"]

_MARK = re.compile(r"[\s>]*(?:(?:[-*+•–▪●○◦·]|\(?\d{1,2}[.):、．]|\(?\d{1,2}\)|#{1,6}|[①-⑳])\s*(?![\d*]))*[\s*_`#]*")
_QUALIFIERS = (
    r"(?:(?:the|required|needed|necessary|key|main|primary|core|relevant|essential|suggested|proposed|important|"
    r"erforderliche|benötigte|notwendige|wichtige|principales?|необходимые|ключевые|основны[ей])[ \t]+){0,2}"
    r"(?:所需|必要な|必需|需要的?|关键|필요한[ \t]*)?"
)
_ITEM = re.compile(r"\s*(?:[-*+•–▪●○◦·]\s|\(?\d{1,2}[.):、．)](?!\d)|[①-⑳]|[a-z]\)\s)")
_ARROW = re.compile(r"\s*(?:→|->|=>|⇒)\s*")
_HALVES = re.compile(r"[*_]*[:：][\s*_]*|\s+[–—-]\s+|\s*\((?=[^()]*\)\W*$)")
_LABELLED = re.compile(r"(?P<label>[^:：]{1,40})[:：][\s*_]*(?P<value>\S.*)")
_LAST_PART = re.compile(r"[,;、，；][^,;、，；]*\Z")


class Labels:
    """What two fields are called.

    Args:
        first: Regular expression of the names of the first.
        second: Of the second.
        short: Whether the fields are names and lists of names, and not sentences: a name ends with its line, and
            `name: list` may stand for both.
    """

    def __init__(self, first: str, second: str, *, short: bool):
        self.short = short
        tail = r"(?:[ \t]+(?:required|needed|involved|erforderlich|requises?|requeridas|necesarias))?"
        number = r"(?:[ \t]*\#?\d{1,2}|[ \t]*\([^()]{0,20}\))?"
        mark = r"[\s*_`\"']{0,12}"
        self.line = re.compile(
            rf"{mark}{_QUALIFIERS}(?:(?P<first>{first})|(?P<second>{second})){tail}{number}{mark}"
            r"(?:[:：=][\s*_`]*|[ \t]+[-–—][ \t]+|$)(?P<value>.*)",
            re.IGNORECASE,
        )
        self._inline = re.compile(
            rf"(?<=[\s;,.|*(（，；。/])[ \t(（|*_]{{0,8}}"
            rf"(?=[*_]{{0,4}}(?:required[ \t])?(?:{first}|{second}){tail}{number}[*_]{{0,4}}[ \t]*[:：])",
            re.IGNORECASE,
        )

    def lines(self, body: str) -> list[str]:
        """The lines of a reply, each label at the beginning of its own."""
        return [line for whole in body.splitlines() for line in self._inline.sub("\n", whole).split("\n")]

    def find(self, line: str) -> tuple[Kind, str] | None:
        """The field whose label a line begins with, and what stands behind the label."""
        match = self.line.match(_unmarked(line)) or self.line.match(line.strip())
        return None if match is None else ("first" if match["first"] else "second", match["value"].strip("*_ \t"))


@dataclass
class _Field:
    """A field as it was met: its items, the line of its label, and whether the reply ends in it."""

    kind: Kind
    items: list[str] = field(default_factory=list)
    line: int = 0
    open: bool = False


def read_records(text: str, labels: Labels, *, truncated: bool, several: bool) -> list[tuple[list[str], list[str]]]:
    """Read pairs of fields out of a reply: JSON, a table, labelled lines, two lists, or entries that hold both.

    Args:
        text: The reply.
        labels: What the fields are called; without them, the order decides.
        truncated: The token limit cut the reply off: the item that it ends in is left out.
        several: Whether several pairs were asked for.

    Returns:
        Each field of each pair as a list of items, none of them empty; possibly no pair.

    Raises:
        Unreadable: The reply is empty or a refusal.
    """
    body = unicodedata.normalize("NFC", without_thoughts(text)).strip()
    if not body:
        raise Unreadable("the reply is empty")
    if is_refusal(body):
        raise Unreadable("a refusal and nothing else")
    fields = list(_json_fields(json_values(body), labels))
    if not fields:
        body = without_fences(body).strip()
        fields = list(_table_fields(body, labels)) or _line_fields(body, labels)
        if len({found.kind for found in fields}) < 2:
            fields = _fields_by_order(body, labels, fields, several)
    if truncated and fields and fields[-1].open:
        _shorten(fields[-1], labels)
    return _pair(fields)


def _shorten(last: _Field, labels: Labels) -> None:
    """Leave out what a reply that was cut off ends in: a skill of a list, or a whole sentence."""
    item = last.items.pop() if last.items else ""
    if labels.short and last.kind == "second" and (cut := _LAST_PART.search(item)):
        last.items.append(item[: cut.start()])


def _pair(fields: Sequence[_Field]) -> list[tuple[list[str], list[str]]]:
    """First and second fields put together, whether they take turns or all of one kind come first."""
    runs: list[list[_Field]] = []
    for found in fields:
        if not found.items:
            continue
        if runs and runs[-1][0].kind == found.kind:
            runs[-1].append(found)
        else:
            runs.append([found])
    if runs and runs[0][0].kind == "second":
        runs = runs[1:]
    pairs = []
    for firsts, seconds in zip(runs[::2], runs[1::2], strict=False):
        if len(firsts) == 1 and len(firsts[0].items) > 1 and len(seconds) == 1:  # a list of each
            pairs += [([one], [other]) for one, other in zip(firsts[0].items, seconds[0].items, strict=False)]
        elif len(firsts) == 1 or len(seconds) == 1:
            pairs.append((firsts[-1].items, [item for found in seconds for item in found.items]))
        else:
            pairs += [(one.items, other.items) for one, other in zip(firsts, seconds, strict=False)]
    return pairs


def _json_fields(values: Sequence[Any], labels: Labels) -> Iterator[_Field]:
    for value in values:
        if isinstance(value, list):
            yield from _json_fields(value, labels)
        elif isinstance(value, dict):
            known = [(label[0], item) for key, item in value.items() if (label := _key(key, labels))]
            flat = [(kind, items) for kind, item in known if (items := _json_items(item))]
            if {kind for kind, _ in flat} == {"first", "second"}:
                yield from (_Field(kind, items) for kind, items in flat)
            elif any(isinstance(item, dict) or _holds_objects(item) for item in value.values()):
                yield from _json_fields(list(value.values()), labels)
            else:  # {"planning a trip": ["geography", "budgeting"]}
                for key, item in value.items():
                    if not _key(key, labels) and (items := _json_items(item)):
                        yield from (_Field("first", [str(key)]), _Field("second", items))


def _key(key: Any, labels: Labels) -> tuple[Kind, str] | None:
    return labels.find(str(key).replace("_", " ") + ":")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _json_items(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and item.strip()]


def _table_fields(body: str, labels: Labels) -> Iterator[_Field]:
    """Two columns of a Markdown table: those named by the labels, or else the last two."""
    rows = [
        [cell.strip(" *_`") for cell in line.strip().strip("|").split("|")]
        for line in body.splitlines()
        if "|" in line
    ]
    rule = next((i for i, row in enumerate(rows) if i and all(re.fullmatch(r":?-{2,}:?", cell) for cell in row)), None)
    if rule is None:
        return
    header = rows[rule - 1]
    found = [_key(cell, labels) for cell in header]
    kinds: list[Kind | None] = [label and label[0] for label in found]
    if not {"first", "second"} <= set(kinds):
        kinds = [None] * (len(header) - 2) + ["first", "second"]
    for row in rows[rule + 1 :]:
        if len(row) == len(header) >= 2:
            cells = [(kind, row[kinds.index(kind)]) for kind in ("first", "second")]
            yield from (_Field(kind, [cell]) for kind, cell in cells if cell)


def _line_fields(body: str, labels: Labels) -> list[_Field]:
    """The fields that have a known label: what stands behind it and, if that is nothing or a list, below it."""
    fields: list[_Field] = []
    blank, listing, inside = True, True, False
    for number, line in enumerate(labels.lines(body)):
        if not line.strip():
            blank = True
            continue
        inside = True
        if label := labels.find(line):
            kind, value = label
            fields.append(_Field(kind, [value] if value else [], number))
            listing = not value
        elif fields and _takes(fields[-1], line, labels, blank, listing):
            items = fields[-1].items
            if _ITEM.match(line) or not items:
                items.append(_unmarked(line))
            else:
                items[-1] += " " + line.strip()
        else:
            inside = listing = False
        blank = False
    if fields:
        fields[-1].open = inside
    return fields


def _takes(last: _Field, line: str, labels: Labels, blank: bool, listing: bool) -> bool:
    """Whether a line without a label belongs to the field before it."""
    if not last.items:
        return True
    if _ITEM.match(line):
        return listing or (last.kind == "second" and not blank and line[:1].isspace())
    return not blank and (listing or not labels.short)


def _fields_by_order(body: str, labels: Labels, known: Sequence[_Field], several: bool) -> list[_Field]:
    """Fields of which at most one has a known label."""
    lines = labels.lines(body)
    if known and known[0].kind == "second":
        return _with_lines_before(lines, known, labels)
    plain = [rest for line in lines if line.strip() and (rest := _unmarked(line))]
    plain = plain[1:] if len(plain) > 1 and is_preamble(plain[0]) else plain
    if known:
        # A second label that nobody knows, or none; several first fields alone are no pairs.
        rest = [line for line in plain if not labels.find(line) and line not in known[0].items]
        if len(known) > 1 or not rest or not labels.short:
            return []
        return [known[0], _Field("second", [re.sub(r"^[^:：]{1,30}[:：]\s*", "", line) for line in rest])]
    labelled = [match for line in plain if (match := _LABELLED.fullmatch(line))]
    names = list(dict.fromkeys(normal(match["label"]) for match in labelled))
    if len(names) == 2 and len(labelled) == len(plain) and not (several and len(plain) == 2):
        return [_Field("first" if normal(m["label"]) == names[0] else "second", [m["value"]]) for m in labelled]
    if fields := _fields_of_entries(body, labels):
        return fields
    if labels.short and len(plain) == 2 and re.search(r"[,;、，；]", plain[1]):
        return [_Field("first", plain[:1]), _Field("second", plain[1:], open=True)]
    return []


def _with_lines_before(lines: Sequence[str], known: Sequence[_Field], labels: Labels) -> list[_Field]:
    """Second fields, each with the last line before it that belongs to none as its first field."""
    fields: list[_Field] = []
    start = 0
    for found in known:
        between = [rest for line in lines[start : found.line] if (rest := _unmarked(line))]
        between = [rest for rest in between if not (fields and rest in fields[-1].items)]
        if between and not is_preamble(between[-1]):
            fields += [_Field("first", [between[-1].strip(" *_:")]), found]
        start = found.line + 1
    return fields


def _fields_of_entries(body: str, labels: Labels) -> list[_Field]:
    """Entries of a list that hold both fields: `first -> second`, `first: second`, or one line each."""
    fields: list[_Field] = []
    for entry in split_entries(body):
        halves = _ARROW.split(entry, maxsplit=1)
        if len(halves) < 2 and labels.short:
            halves = _HALVES.split(entry, maxsplit=1)
        if len(halves) < 2:
            halves = [line for line in entry.splitlines() if line.strip()]
        if len(halves) == 2:
            first, second = (half.strip(" *_()\n") for half in halves)
            fields += [_Field("first", [first]), _Field("second", [_unmarked(second)], open=True)]
    for found in fields[:-1]:
        found.open = False
    return fields


def _unmarked(line: str) -> str:
    """A line without number, bullet, heading and emphasis before it."""
    return line[_MARK.match(line).end() :].strip()
