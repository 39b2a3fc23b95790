"""Replies that name a use case and its skills, or rubrics and their actions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...core.generation.replies import Unreadable
from .reply_fields import Labels, read_records
from .reply_text import clean_instruction, count_words, normal


MAX_USE_CASE_WORDS = 12
MAX_SKILL_WORDS = 6

_METADATA = Labels(
    first=r"use[ -]?cases?|tasks?|purpose|category|anwendungsf(?:all|älle)|verwendungszweck|einsatzzweck|aufgabe|"
    r"cas d['’]\s?(?:utilisation|usage)|casos? de uso|casos? d['’]?\s?(?:uso|utilizzo)|gebruiksscenario|toepassing|"
    r"przypadek użycia|zastosowanie|вариант(?:ы)? использования|сценари(?:й|и) использования|применение|"
    r"用例|使用场景|使用場景|应用场景|應用場景|用途|场景|ユースケース|사용 ?사례|용도|حالة الاستخدام|"
    r"kullanım (?:durumu|alanı)|उपयोग",
    second=r"skills?|abilities|competenc(?:y|ies)|fähigkeit(?:en)?|kompetenz(?:en)?|fertigkeit(?:en)?|compétences?|"
    r"aptitudes?|habilidad(?:es)?|competencias?|competências?|competenz[ae]|abilità|vaardighe(?:id|den)|"
    r"umiejętności|навыки?|умения|技能|能力|スキル|技術|기술|능력|역량|المهارات|beceri(?:ler)?|कौशल",
    short=True,
)
_RUBRICS = Labels(
    first=r"rubrics?|crit[eè]ri(?:on|a|um|en|o|os)|aspects?|kriteri(?:um|en)|bewertungskriterium|rubrik(?:en)?|"
    r"rubriques?|critères?|rúbricas?|rubricas?|critérios?|kryterium|критери[йи]|рубрика|评分标准|标准|標準|準則|"
    r"ルーブリック|基準|루브릭|기준|kriter",
    second=r"actions?|aktion(?:en)?|maßnahmen?|handlung(?:en)?|acción|acciones|ação|ações|azion[ei]|acties?|"
    r"działani[ae]|действи[ея]|动作|動作|行动|行動|操作|アクション|행동|조치|eylem",
    short=False,
)
_EMPTY = re.compile(
    r"[\W_]*(?:none|n/?a|nil|no (?:special |specific |particular )?skills?.*|keine|aucune|ninguna|нет|无|無|なし|없음|"
    r"a few words|(?:skill|use case|rubric|action|fähigkeit)[ \t]*(?:\d+|one|two|three)?)?[\W_]*",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"[.;:。；：]\s|[(（]|,\s(?:such as|including|e\.g|i\.e|for example|where|which)\b|\s[-–—]\s|\n"
)
_SEPARATOR = re.compile(r"\s*(?:[,;|、，；]|\s[/·•]\s)\s*")
_AND = re.compile(r"^(?:and|und|et|y|e|en|i|и|以及|和)\s+")
_INLINE_NUMBER = re.compile(r"(?:^|(?<=[\s,;]))\(?\d{1,2}[.):](?=\s)")


def read_metadata(text: str, *, truncated: bool = False, several: bool = False) -> list[tuple[str, tuple[str, ...]]]:
    """Read use cases with their skills.

    They are told by labels in a number of languages, or else by their order.

    Args:
        text: The reply.
        truncated: The token limit cut it off: what it ends in is left out.
        several: Whether a list of them was asked for; then entries that cannot be read are left out.

    Returns:
        At least one pair; skills are distinct.

    Raises:
        Unreadable: None can be read.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    reason = None
    for first, second in read_records(text, _METADATA, truncated=truncated, several=several):
        try:
            use_case = _use_case(first[0])
            found.setdefault(normal(use_case), (use_case, _skills(second)))
        except Unreadable as error:
            reason = reason or error
            if not several and not found:
                break
    if not found:
        raise reason or Unreadable("there are no use case and skills")
    return list(found.values())


def read_rubrics(text: str, *, truncated: bool = False) -> list[tuple[str, str]]:
    """Read rubrics with their actions; a rubric without one is left out, and so is an action that was there before.

    Raises:
        Unreadable: There is none.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for first, second in read_records(text, _RUBRICS, truncated=truncated, several=True):
        rubric, action = clean_instruction(" ".join(first)), clean_instruction(second[0])
        if not _EMPTY.fullmatch(rubric) and not _EMPTY.fullmatch(action) and normal(action) != normal(rubric):
            pairs.setdefault(normal(action), (rubric, action))
    if not pairs:
        raise Unreadable("there is no rubric with an action")
    return list(pairs.values())


def _use_case(text: str) -> str:
    text = _plain(text)
    if count_words(text) > MAX_USE_CASE_WORDS:  # perhaps it is a name and an explanation
        text = _EXPLANATION.split(text, maxsplit=1)[0].strip()
    text = text.rstrip(".。;,:： ")
    if _EMPTY.fullmatch(text):
        raise Unreadable("there is no use case")
    if count_words(text) > MAX_USE_CASE_WORDS:
        raise Unreadable(f"the use case has {count_words(text)} words; at most {MAX_USE_CASE_WORDS} will do")
    return text


def _skills(items: Sequence[str]) -> tuple[str, ...]:
    """Distinct skills out of lists with commas, numbers or one a line."""
    found: dict[str, str] = {}
    for item in items:
        names = _INLINE_NUMBER.sub(",", _explained(item.strip().strip("[]")))
        for part in _SEPARATOR.split(re.sub(r"\s*[(（][^()（）]*(?:[)）]|$)", "", names)):
            skill = _AND.sub("", _plain(part)).rstrip(".。")
            if not _EMPTY.fullmatch(skill) and count_words(skill) <= MAX_SKILL_WORDS:
                found.setdefault(normal(skill), skill)
    if not found:
        raise Unreadable(f"there is no skill of at most {MAX_SKILL_WORDS} words")
    return tuple(found.values())


def _explained(item: str) -> str:
    """The name alone of a skill with an explanation: `Empathy: to feel with others`."""
    name = re.split(r"[*_]*[:：][*_]*\s|\s[–—-]\s", item, maxsplit=1)[0]
    return name if name.strip(" *_") and "," not in name else item


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" *_`\"“”„'‘’<>[]{}「」«»")
