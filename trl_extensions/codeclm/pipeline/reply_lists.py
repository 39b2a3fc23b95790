"""Lists of instructions as models write them: numbered, lettered, bulleted, labelled, as headings or JSON."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.generation.replies import Unreadable, without_thoughts
from .reply_json import json_values
from .reply_text import (
    INSTRUCTION_WORDS,
    clean_instruction,
    count_words,
    is_preamble,
    is_refusal,
    is_remark,
    normal,
    object_instruction,
)


_OPENING = r"[ \t>]*+(?:\#{1,6}[ \t]*+)?(?:(?P<bold>[*_]{2,3}|[*_](?=\d))[ \t]*+)?"
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
_CHINESE = "一二三四五六七八九十"
_NUMBERED = re.compile(
    rf"(?P<opening>{_OPENING})(?:"
    rf"(?P<word>[^\W\d_]+(?:[ \t][^\W\d_]+)?[ \t]*(?:\#|№|[Nn][o°º]\.?)?[ \t]*)(?P<labelled>\d{{1,3}})"
    rf"(?P<colon>[ \t]*[*_]*[ \t]*(?:[:：.)）]|[-–—](?=\s)|$))"
    rf"|第?(?P<bracket>[(（\[【]?)(?P<number>\d{{1,3}})"
    rf"(?P<point>[ \t]?[)）\]】]|[.．、:：](?!\d)|[ \t]+[-–—](?=\s)|[*_]{{2}}[.):])"
    rf"|(?P<circled>[{_CIRCLED}])|(?P<chinese>[{_CHINESE}])[、.．]"
    rf")"
)
_LETTERED = re.compile(rf"(?P<opening>{_OPENING})(?P<bracket>[(\[]?)(?P<letter>[A-Za-z])(?P<point>[.)\]])(?=[\s*_])")
_BULLET = re.compile(r"(?P<opening>[ \t>]*)(?P<bullet>[-*+•–—▪‣·●○◦➢►✓])[ \t]+(?=\S)")
_LABELLED = re.compile(rf"(?P<opening>{_OPENING})(?P<label>{INSTRUCTION_WORDS})[*_]*[ \t]*[:：]", re.IGNORECASE)
_HEADING = re.compile(r"#{1,6}\s.*|(?P<mark>\*\*|__)(?:(?!(?P=mark)).)+(?P=mark):?|[-*_=]{3,}")
_BETWEEN = re.compile(r"(?<=[.?!:;\"”])[ \t]++(?=\d{1,2}[.)]\s)")
_FEWEST_WORDS = 3  # of an entry and its number in such a line: "1. 5 2. 7" is none
_MATERIAL = re.compile(r"""["'“«「『`|>\d(\[{<*•-]|[^\s:]+(?: [^\s:]+){0,3}:\s""")


@dataclass
class _Marker:
    """Where an entry may begin: its line, how it is marked, how far in, its number, and the rest of its line."""

    line: int
    kind: str
    style: tuple[Any, ...]
    indent: int
    number: int
    rest: str


def read_list(text: str, *, truncated: bool = False, single: bool = False) -> list[str]:
    """Read a list of instructions.

    An entry may have several lines, paragraphs, code blocks and lists of its own. Talk before and after the list,
    headings between its parts, labels and titles of entries, and entries that are there twice are left out.

    Args:
        text: The reply.
        truncated: The token limit cut the reply off: its last entry is left out.
        single: Whether one was asked for, so that a reply without marks is one instruction.

    Raises:
        Unreadable: There is no entry left.
    """
    body = re.sub(r"\A(?:[ \t]*\r?\n)+", "", without_thoughts(text)).rstrip()  # the first line stays moved in
    if not body:
        raise Unreadable("the reply is empty")
    if is_refusal(body):
        raise Unreadable("a refusal and nothing else")
    values = json_values(body)
    if values:
        entries = [object_instruction(value) for value in _flat(values)]
    else:
        entries = split_entries(body if single else _one_a_line(body), single=single)
        if truncated:
            entries = entries[:-1]
    found: dict[str, str] = {}
    for entry in entries:
        cleaned = clean_instruction(entry)
        if (key := normal(cleaned)) and any(character.isalpha() for character in key):
            found.setdefault(key, cleaned)
    if not found:
        raise Unreadable("cut off by the token limit before an entry was complete" if truncated else "no list entry")
    return list(found.values())


def _flat(values: Sequence[Any]) -> list[Any]:
    """The entries: also of `{"instructions": [...]}` and of `{"1": "...", "2": "..."}`."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, dict):
            inner = [item for item in value.values() if isinstance(item, (list, dict)) and item]
            numbered = [item for key, item in value.items() if re.search(r"\d$", str(key).strip())]
            if numbered and len(numbered) == len(value):
                flat += _flat(numbered)
            elif inner and len(inner) == len(value):
                flat += _flat(inner)
            else:
                flat.append(value)
        elif isinstance(value, list):
            flat += _flat(value)
        else:
            flat.append(value)
    return flat


def _one_a_line(body: str) -> str:
    """A list that was written in one line, "1. Write a haiku. 2. Explain tides.", as lines."""
    lines = body.splitlines()
    numbered = [place for place, line in enumerate(lines) if re.match(r"\s*\d{1,3}[.)]\s", line)]
    if len(numbered) != 1 or "```" in body:
        return body
    parts = _BETWEEN.split(lines[numbered[0]])
    counted = all(re.match(rf"\s*{number}[.)]\s", part) for number, part in enumerate(parts, start=1))
    if counted and all(count_words(part) > _FEWEST_WORDS for part in parts[:-1]):
        lines[numbered[0]] = "\n".join(parts)
    return "\n".join(lines)


def split_entries(body: str, *, single: bool = False) -> list[str]:
    """The raw entries of a list: without their marks, and without what stands before, between and after them."""
    lines = body.splitlines()
    fenced = _fenced(lines)
    markers = _chain(_markers(lines, fenced), lines)
    if not markers and any(fenced):  # perhaps the list is inside
        inside = [line for line, is_inside in zip(lines, fenced, strict=True) if is_inside and "```" not in line]
        if inner := _chain(_markers(inside, _fenced(inside)), inside):
            lines, markers = inside, inner
    before = _joined(lines[: markers[0].line]) if markers else ""
    if single and before and not is_preamble(before):  # a list inside of the one instruction
        markers = []
    if not markers:
        return _unmarked(body, single)
    ends = [marker.line for marker in markers[1:]] + [len(lines)]
    blocks = [_block(marker, lines[marker.line + 1 : end]) for marker, end in zip(markers, ends, strict=True)]
    for block in blocks[:-1]:
        _drop_headings(block)
    _drop_remarks(blocks)
    return [_joined(_moved_out(block)) for block in blocks]


def _fenced(lines: Sequence[str]) -> list[bool]:
    """For each line whether it is in a code block, the block's marks included."""
    flags, fence = [], ""
    for line in lines:
        mark = re.match(r"[\s>]*(?:\S{1,4}\s+)?(`{3,}|~{3,})", line)
        flags.append(bool(fence) or (mark is not None and line.strip().startswith(mark[1])))
        if fence:
            fence = "" if line.strip() == fence else fence
        elif mark is not None and mark[1] not in line[mark.end() :]:
            fence = mark[1]
    return flags


def _markers(lines: Sequence[str], fenced: Sequence[bool]) -> list[_Marker]:
    return [
        marker
        for index, line in enumerate(lines)
        if not fenced[index] and (marker := _marker(index, line)) is not None
    ]


def _marker(index: int, line: str) -> _Marker | None:
    for kind, pattern in (("number", _NUMBERED), ("letter", _LETTERED), ("label", _LABELLED), ("bullet", _BULLET)):
        match = pattern.match(line)
        if match is None:
            continue
        groups = match.groupdict()
        opening = groups["opening"]
        word = re.sub(r"\W", "", groups.get("word") or "").casefold()
        if word and not re.fullmatch(INSTRUCTION_WORDS, word, re.IGNORECASE) and not _is_heading(line):
            continue  # "Section 3: ..." may begin a line of anything
        style = (kind, word, groups.get("bracket"), (groups.get("point") or "").strip(" *_"), groups.get("bullet"))
        style += (bool(groups.get("bold")), "#" in opening)
        rest = line[match.end() :].strip()
        if bold := groups.get("bold"):
            rest = rest[len(bold) :].strip() if rest.startswith(bold) else f"{bold}{rest}" if bold in rest else rest
        indent, number = len(line) - len(line.lstrip(" \t>")), _number(groups)
        rest = re.sub(rf"^{number}[.)]\s+", "", rest)  # "1. 1. ...", where the prompt showed how to begin
        return _Marker(index, kind, style, indent, number, rest)
    return None


def _number(groups: dict[str, str | None]) -> int:
    if digits := groups.get("labelled") or groups.get("number"):
        return int(unicodedata.normalize("NFKC", digits))
    if circled := groups.get("circled"):
        return _CIRCLED.index(circled) + 1
    if chinese := groups.get("chinese"):
        return _CHINESE.index(chinese) + 1
    if letter := groups.get("letter"):
        return ord(letter.lower()) - ord("a") + 1
    return 0


def _chain(markers: Sequence[_Marker], lines: Sequence[str]) -> list[_Marker]:
    """The markers of the outer list: those in the style of the first one, not further in, and counted through."""
    if not markers:
        return []
    first = markers[0]
    near = [marker for marker in markers if marker.kind == first.kind and marker.indent < first.indent + 2]
    strict = [marker for marker in near if marker.style == first.style]
    if first.kind in ("bullet", "label"):
        return strict
    chain = _counted(strict, lines)
    loose = _counted(near, lines)
    return loose if len(chain) == 1 else chain


def _counted(markers: Sequence[_Marker], lines: Sequence[str]) -> list[_Marker]:
    """Of markers of one list and of lists inside its entries, those of the outer one."""
    if len({marker.number for marker in markers}) == 1:
        return list(markers)
    chain = [markers[0]]
    inner: _Marker | None = None
    for marker in markers[1:]:
        last = chain[-1].number
        if inner is not None and marker.number == inner.number + 1:
            spaced = _after_blank(marker, lines) and not _after_blank(inner, lines)
            if marker.number != last + 1 or not spaced:
                inner = marker
                continue
        if marker.number in (last + 1, last + 2) or (marker.number == 1 and _after_heading(marker, lines)):
            chain.append(marker)
            inner = None
        elif marker.number == 1:
            inner = marker
    return chain


def _after_blank(marker: _Marker, lines: Sequence[str]) -> bool:
    return marker.line > 0 and not lines[marker.line - 1].strip()


def _after_heading(marker: _Marker, lines: Sequence[str]) -> bool:
    """Whether a heading, or a line with a colon behind a blank one, stands before a marker."""
    before = [index for index in range(marker.line) if lines[index].strip()]
    if not before:
        return False
    heading = lines[before[-1]]
    spaced = before[-1] > 0 and not lines[before[-1] - 1].strip()
    return _is_heading(heading) or (spaced and heading.strip().endswith((":", "：")))


def _is_heading(line: str) -> bool:
    return _HEADING.fullmatch(line.strip()) is not None


def _block(marker: _Marker, following: Sequence[str]) -> list[str]:
    """The lines of an entry; a title that has the first one for itself is left out."""
    in_bold = marker.rest.startswith(("**", "__")) and marker.rest.rstrip(":：").endswith(("**", "__"))
    alone = in_bold or marker.style[-1]
    is_title = alone and _is_title(marker.rest) and any(line.strip() for line in following)
    return ["" if is_title else marker.rest, *(line.rstrip() for line in following)]


def _moved_out(block: Sequence[str]) -> list[str]:
    """An entry whose lines after the first are all moved in, without that."""
    depth = min((len(line) - len(line.lstrip(" \t")) for line in block[1:] if line.strip()), default=0)
    return [*block[:1], *(line[depth:] for line in block[1:])]


def _is_title(text: str) -> bool:
    text = text.strip(" *_:")
    return len(text.split()) <= 8 and not text.endswith((".", "?", "!", "。", "？", "！"))


def _drop_headings(block: list[str]) -> None:
    """Drop headings of the next part of the list from the end of an entry."""
    while len(block) > 1:
        line = block[-1].strip()
        category = line.endswith((":", "：")) and not block[-2].strip() and line == block[-1]
        if line and not _is_heading(line) and not category:
            return
        if line.startswith(("```", "~~~")):
            return
        block.pop()


def _drop_remarks(blocks: list[list[str]]) -> None:
    """Drop talk after the list from its last entry.

    Talk is a last paragraph that begins like it, in the languages known here; in others, one that is not moved in,
    where no other entry has a second paragraph and the one before it does not announce it.
    """
    block = blocks[-1]
    alone = len(blocks) > 2 and not any("" in "\n".join(other).strip().split("\n") for other in blocks[:-1])
    while True:
        while len(block) > 1 and (not block[-1].strip() or _is_heading(block[-1])):
            block.pop()
        blanks = [index for index, line in enumerate(block) if not line.strip() and index]
        if not blanks or _fenced(block)[-1]:
            return
        paragraph, before = block[blanks[-1] + 1 :], _joined(block[: blanks[-1]])
        if len(paragraph) > 1 and re.fullmatch(r"[-*_=]{3,}", paragraph[0].strip()):
            paragraph = paragraph[1:]
        talk = alone and not before.endswith((":", "：")) and not _MATERIAL.match(paragraph[0])
        if not (is_remark(paragraph[0]) or (talk and not paragraph[0].startswith((" ", "\t")))):
            return
        del block[blanks[-1] :]


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines).strip()


def _unmarked(body: str, single: bool) -> list[str]:
    """Entries without marks: paragraphs if there are several, else lines; one if only one was asked for."""
    parts = re.split(r"\n\s*\n", body)
    parts = [part for part in parts if not _is_heading(part)]
    if parts and is_preamble(parts[0]) and len(parts) > 1:
        parts = parts[1:]
    while len(parts) > 1 and is_remark(parts[-1]):
        parts.pop()
    if len(parts) == 1 and not single:
        lines = parts[0].splitlines()
        parts = lines[1:] if len(lines) > 1 and is_preamble(lines[0]) else lines
    elif parts and (lines := parts[0].splitlines()) and len(lines) > 1 and is_preamble(lines[0]):
        parts[0] = _joined(lines[1:])
    return ["\n\n".join(parts)] if single else parts
