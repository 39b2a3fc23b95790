"""A reply that should be one instruction, rewritten: what is the instruction in it, and whether it is one."""

from __future__ import annotations

import re

from ...core.generation.replies import Unreadable, without_thoughts
from .reply_json import json_values
from .reply_text import (
    NEW_LABEL,
    clean_instruction,
    count_words,
    is_preamble,
    is_refusal,
    is_remark,
    normal,
    object_instruction,
)


_TAG = re.compile(r"<(/?)(?:new[ _-]|rewritten[ _-]|old[ _-])?(?:instruction|prompt)>", re.IGNORECASE)
_WHOLE_FENCE = re.compile(
    r"(?P<mark>`{3,})(?:text|markdown|md|txt|plaintext)?[ \t]*\n(?P<inside>.*)\n(?P=mark)", re.DOTALL
)
_ANSWERED = re.compile(
    r"[\s#*_>]*(?:(?:sample|example|possible|model|your|the)[ \t]+)?(?:answer|response|solution|antwort|lösung|"
    r"réponse|respuesta|solución|risposta|resposta|ответ|решение|答案|回答|解答|답변)[ \t#*_]*[:：]",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"(?:`{3}|def \w+\(|class \w+[(:]|import \w|from \w+ import|#include|#!/|public (?:class|static)|function \w+\(|"
    r"<!doctype|<html|SELECT\s)"
)
_ANSWER_OPENING = re.compile(
    r"(?:the (?:correct )?answer (?:is|to)|to (?:solve|answer) this|as an ai\b|(?:yes|no)[,.]\s|dear (?!assistant)|"
    r"once upon a time|certainly|sure[,!]|of course|step 1\b|here(?:['’]s| is| are)\b)",
    re.IGNORECASE,
)
_ABOUT = re.compile(
    r"\b(?:the|this) (?:old|new|original|given|rewritten|previous) (?:instruction|prompt)\b|#(?:given|rewritten) "
    r"prompt#",
    re.IGNORECASE,
)
_LONGEST_GROWTH, _LONGEST_EXTRA = 3, 250


def read_instruction(text: str, instruction: str, action: str = "", *, truncated: bool = False) -> str:
    """Read the instruction that was to be made of another.

    Args:
        text: The reply.
        instruction: The instruction that was to be rewritten.
        action: What was to be done to it.
        truncated: The token limit cut the reply off.

    Raises:
        Unreadable: There is no new instruction: nothing, only its beginning, the old one, the action, a remark about
            the two, a refusal, or what looks like an answer.
    """
    body = without_thoughts(text).strip()
    if not body:
        raise Unreadable("the reply is empty")
    if is_refusal(body):
        raise Unreadable("a refusal and nothing else")
    new, ended = _extract(body)
    if truncated and not ended:
        raise Unreadable("cut off by the token limit")
    new = clean_instruction(new)
    if not normal(new):
        raise Unreadable("there is no new instruction")
    if normal(new) == normal(instruction):
        raise Unreadable("unchanged")
    if action and normal(new) == normal(action):
        raise Unreadable("the change was repeated instead of made")
    if _ABOUT.search(new) and not _ABOUT.search(instruction):
        raise Unreadable("it talks about the old instruction")
    _check_no_answer(new, instruction)
    return new


def _extract(body: str) -> tuple[str, bool]:
    """The part of the reply that should be the instruction, and whether something stands behind it."""
    if values := json_values(body):
        return object_instruction(values[0]), True
    length = len(body)
    if labels := list(NEW_LABEL.finditer(body)):
        body = body[labels[0].end() :]
    else:
        parts = body.split("\n", 1)
        if len(parts) > 1 and is_preamble(parts[0]):
            body = parts[1]
    tags = list(_TAG.finditer(body))
    if tags and not tags[-1][1]:
        body = body[tags[-1].end() :]
    elif len(tags) > 1:
        return body[tags[-2].end() : tags[-1].start()], True
    elif tags:
        body = body[: tags[-1].start()]
    body = body.strip()
    if whole := _WHOLE_FENCE.fullmatch(body):
        return whole["inside"], True
    kept = _without_talk(body)
    return kept, len(kept) < len(body) and length > 0


def _without_talk(body: str) -> str:
    """Without paragraphs behind the instruction that talk about it or answer it."""
    paragraphs = re.split(
        r"(\n\s*\n|\n(?=[ \t]*[*_#]*(?:explanation|changes|reasoning|rationale|note|answer|response|"
        r"solution)[*_]*\s*:))",
        body,
        flags=re.I,
    )
    for index in range(2, len(paragraphs), 2):
        paragraph = paragraphs[index].strip()
        if re.fullmatch(r"[-*_=]{3,}.*", paragraph, re.DOTALL) or is_remark(paragraph) or _ANSWERED.match(paragraph):
            inside_code = "".join(paragraphs[:index]).count("```") % 2
            if not inside_code:
                return "".join(paragraphs[:index]).strip()
    return body


def _check_no_answer(new: str, instruction: str) -> None:
    for pattern in (_CODE, _ANSWER_OPENING):
        if pattern.match(new) and not pattern.match(instruction):
            raise Unreadable("it looks like an answer, not like an instruction")
    limit = _LONGEST_GROWTH * count_words(instruction) + _LONGEST_EXTRA
    if count_words(new) > limit:
        raise Unreadable(
            f"{count_words(new)} words are too many for an instruction made of {count_words(instruction)}"
        )
