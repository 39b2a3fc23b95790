"""Replies of language models: without their thoughts, and read by a schema or not at all."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .types import Prompt


Model = TypeVar("Model", bound=BaseModel)

_TAGS = ("think", "thinking", "thought", "reasoning", "seed:think")
_MARKS = [(f"<{tag}>", f"</{tag}>") for tag in _TAGS]
_MARKS += [("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|START_THINKING|>", "<|END_THINKING|>")]
_MARKS += [("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|channel>thought", "<channel|>")]
# Where a chat template opens the thoughts, only their end is in the reply; where they are cut off, only their start
_THOUGHTS = [
    re.compile(rf"\A(?:(?!{start}).)*?{end}|{start}.*?(?:{end}|\Z)", re.DOTALL)
    for start, end in (map(re.escape, marks) for marks in _MARKS)
]
# gpt-oss says it in the last channel; "assistantfinal" is what its marks become without their special tokens
_FINAL = re.compile(
    r"\A.*<\|channel\|>final\b[^<]*(?:<\|constrain\|>\w+)?<\|message\|>|\Aanalysis.*assistantfinal", re.DOTALL
)
_END_OF_FINAL = re.compile(r"<\|(?:return|end)\|>\s*\Z")
_OTHER_CHANNEL = re.compile(r"\A(?:<\|start\|>assistant)?<\|channel\|>(?!final).*", re.DOTALL)
_AROUND_ANSWER = re.compile(
    r"\A\s*<\|(?:START_RESPONSE|begin_of_solution)\|>|<\|(?:END_RESPONSE|end_of_solution)\|>\s*\Z"
)
_LEFT = re.compile(
    "|".join(re.escape(mark) for marks in _MARKS for mark in marks)
    + r"|<\|(?:channel|message|constrain|start|end|return|START_RESPONSE|END_RESPONSE)\|>"
)

_OPENING_FENCE = re.compile(r"\A```(?:json|JSON)?\s*(?=[\[{])")
_CLOSING_FENCE = re.compile(r"\s*```\s*\Z")
# What may stand behind JSON: the end of its fence, and a remark in lines of its own without any more JSON
_REMARK = re.compile(r"[ \t]*(?:\n[ \t]*)?(?:```)?[ \t]*(?:\n[^\[\]{}`]*)?\Z")
_CUTS = re.compile(r"[\"'”’\]}\w](?=\s*,)|[\]}]")
_MOST_CUTS = 12
_ENTRY = re.compile(r"[ \t]*(\d{1,2})[ \t]*[.)．、）][ \t]*(\S.*)")
_BETWEEN_STRINGS = re.compile(r"[\"'“”]\s*[,:]\s*[\"'“”]")
_SPELLINGS = {'"': r'\\?"', "'": r"\\?'", "/": r"\\?/", "\\": r"\\{1,2}", "\n": r"(?:\\n|\r?\n)", "\t": r"(?:\\t|\t)"}
_CONSTANTS = {"None": "(?:null|None)", "True": "(?:true|True)", "False": "(?:false|False)"}


class Unreadable(ValueError):  # noqa: N818 (it is the reply that is)
    """A reply that cannot be read; as a string, the reason in one short line."""


def without_thoughts(text: str) -> str:
    """A reply without the thoughts of a reasoning model, also where only one mark of two is in it."""
    if final := _FINAL.match(text):
        text = _END_OF_FINAL.sub("", text[final.end() :])
    text = _OTHER_CHANNEL.sub("", text)
    for thoughts in _THOUGHTS:
        text = thoughts.sub("", text)
    return _AROUND_ANSWER.sub("", text)


def answer_text(text: str) -> str:
    """What a reply says, without thoughts; `Unreadable` if nothing is left of it, or marks of thoughts still are."""
    said = without_thoughts(text).strip()
    if not said:
        raise Unreadable("there are only thoughts" if text.strip() else "the reply is empty")
    if left := _LEFT.search(said):
        raise Unreadable(f"thoughts are left in it ({left[0]})")
    return said


def read_reply(text: str, schema: type[Model], *, truncated: bool = False) -> Model:
    """Read a reply, without its thoughts, that should be JSON of a schema. What may mean two things is not read.

    Understood are JSON, alone or in one fence, a remark behind it allowed; JSON with the mistakes that models make
    (quotes inside strings, single quotes, commas too many), if every element is followed by a separator or a bracket;
    and for a schema that is one list of strings a list without its object, or a plain list numbered from 1. Of a reply
    that was `truncated`, what stands behind the last separator is left out.

    Raises:
        Unreadable: It is nothing of that; the reason is fit to be told to the model.
    """
    body = answer_text(text)
    json_text = _OPENING_FENCE.sub("", body)
    if json_text[0] in "[{":
        try:
            value, end = _DECODER.raw_decode(json_text)
            if not _REMARK.match(json_text, end):
                raise Unreadable("something else stands behind the JSON")
        except (json.JSONDecodeError, RecursionError):
            return _read_damaged(_CLOSING_FENCE.sub("", json_text), schema, truncated)
        return _validated(value, schema)
    entries = _numbered(body)[: -1 if truncated else None]
    if entries and len(schema.model_fields) == 1:
        return _validated(entries, schema)
    raise Unreadable("it is not JSON and nothing else")


def schema_json(schema: type[BaseModel]) -> str:
    """The JSON schema of a model as text, every field required and no others; docstrings change no request."""
    strict = json.loads(json.dumps(schema.model_json_schema()), object_hook=_strict)
    return json.dumps(strict, ensure_ascii=False)


def as_text(prompt: Prompt) -> str:
    """A prompt to be quoted inside another: a text as it is, a chat as `role: content` lines, "(none)" if empty."""
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return prompt or "(none)"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable("a key is there twice")
    return found


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_distinct)


def _read_damaged(text: str, schema: type[Model], truncated: bool) -> Model:
    if not truncated:
        return _validated(_repaired(text), schema)
    for cut in list(_CUTS.finditer(text))[: -_MOST_CUTS - 1 : -1]:
        try:
            return _validated(_repaired(text[: cut.end()], cut=True), schema)
        except Unreadable:
            continue
    raise Unreadable("cut off before anything was complete")


def _repaired(text: str, *, cut: bool = False) -> Any:
    """What json_repair makes of JSON with mistakes, if that is what stands there.

    Written out again, in whatever quotes, it must be the text; so nothing is lost or made up, and every element ends
    where a separator or a bracket follows. Of a text that was cut, the outer list and object need not be closed.
    """
    import json_repair

    if len(text) > 20_000 or sum(map(text.count, "[{\"'")) > 1000:  # the time it takes grows with the square of these
        raise Unreadable("it is no valid JSON, and too much to be mended")
    try:
        value = json_repair.loads(text, skip_json_loads=True)
        tokens = list(_written(value)) if isinstance(value, (list, dict)) else []
    except (ValueError, RecursionError):
        tokens = []
    closing = "".join(token[-1] for token in tokens)
    for missing in ("", "]", "}", "]}") if cut else ("",):
        if not tokens or not closing.endswith(missing):
            continue
        if found := re.fullmatch(r"\s*".join(tokens[: len(tokens) - len(missing)]), text.strip()):
            if any(map(_is_ambiguous, found.groups())):
                raise Unreadable("it is not clear where a string ends: quotes inside one need a backslash")
            return value
    raise Unreadable("it is no valid JSON")


def _written(value: Any) -> Iterator[str]:
    """Patterns of the tokens of which JSON consists."""
    if isinstance(value, (list, dict)):
        yield r"\[" if isinstance(value, list) else r"\{"
        for place, item in enumerate(value):
            if place:
                yield ","
            if isinstance(value, dict):
                yield rf"(?:{_quoted(item)}|{re.escape(item)})" if item.isidentifier() else _quoted(item)
                yield ":"
                item = value[item]
            yield from _written(item)
        yield r",?\s*\]" if isinstance(value, list) else r",?\s*\}"
    elif isinstance(value, str):
        yield _quoted(value)
    else:
        yield _CONSTANTS.get(str(value)) or re.escape(repr(value)) + ("0*" if isinstance(value, float) else "")


def _quoted(text: str) -> str:
    # Of several backslashes each may be escaped: spelled one by one, they could be told apart in ever so many ways
    runs = re.split(r"(\\{2,})", text)
    spelled = [rf"\\{{{len(r)},{2 * len(r)}}}" if r[:2] == 2 * "\\" else "".join(map(_spelled, r)) for r in runs]
    return f"(?:[\"'“]({''.join(spelled)}\\s*)[\"'”])"


def _spelled(character: str) -> str:
    if character.isascii():
        return _SPELLINGS.get(character) or re.escape(character)
    return rf"(?:{re.escape(character)}|\\u{ord(character):04x}|\\u{ord(character):04X})"


def _is_ambiguous(string: str | None) -> bool:
    """Whether a string, as it is written, may as well be several."""
    plain = re.sub(r"\\.", "", string or "", flags=re.DOTALL)
    return plain.count('"') % 2 == 1 or _BETWEEN_STRINGS.search(plain) is not None


def _numbered(text: str) -> list[str]:
    """The entries of a text that is nothing but lines numbered 1, 2, 3; none where it is anything else."""
    lines = [line for line in text.splitlines() if line.strip()]
    entries = []
    for number, line in enumerate(lines, 1):
        match = _ENTRY.fullmatch(unicodedata.normalize("NFKC", line[:4]) + line[4:])
        several_in_one = match and re.search(rf"\s{number + 1}[.)]\s", match[2].rstrip())
        if match is None or int(match[1]) != number or several_in_one:
            return []
        entries.append(match[2].rstrip())
    return entries


def _validated(value: Any, schema: type[Model]) -> Model:
    if isinstance(value, list) and len(schema.model_fields) == 1:
        value = dict.fromkeys(schema.model_fields, value)
    try:
        return schema.model_validate(value, by_alias=True, by_name=True)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise Unreadable(f"{place}: {message}" if place else message) from None


def _strict(node: dict[str, Any]) -> dict[str, Any]:
    # Under such a key, a dict is a field of that name
    left_out = ("title", "description", "default")
    node = {key: item for key, item in node.items() if key not in left_out or isinstance(item, dict)}
    if node.get("type") == "object":
        node |= {"required": list(node["properties"]), "additionalProperties": False}
    return node
