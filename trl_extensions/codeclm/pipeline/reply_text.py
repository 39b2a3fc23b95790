"""What surrounds an instruction in a reply: talk, labels, titles, quotation marks; and replies that refuse."""

from __future__ import annotations

import re
import unicodedata
from typing import Any


INSTRUCTION_WORDS = (
    r"(?:instructions?|prompts?|tasks?|questions?|requests?|queries|query|examples?|exercises?|problems?|scenarios?|"
    r"anweisung|aufgabe|frage|anfrage|beispiel|consigne|tâche|exemple|demande|instrucci[oó]n|tarea|pregunta|ejemplo|"
    r"instru[cç][aã]o|tarefa|pergunta|exemplo|istruzione|compito|domanda|esempio|instructie|opdracht|vraag|"
    r"polecenie|zadanie|инструкция|задание|задача|вопрос|запрос|пример|指示|指令|任务|任務|问题|問題|示例|例|タスク|"
    r"質問|지시|지시문|과제|질문|예시|talimat|görev|soru|تعليمات|مهمة|سؤال|निर्देश|कार्य|प्रश्न)"
)
_NEW_WORDS = (
    r"(?:the[ \t]+)?(?:new|rewritten|revised|updated|modified|improved|harder|final|rephrased|neue|überarbeitete|"
    r"nouvelle?|nueva?|nova?|nuova|nieuwe|nowe|новая|новое|yeni|新しい|新的?|改写后的|새로운|새)"
)
_INSTRUCTION_KEYS = ("instruction", "new_instruction", "rewritten_instruction", "prompt", "task", "question", "text")

_LABEL = re.compile(
    rf"[\s#>*_`]*(?:{_NEW_WORDS}\s*)?{INSTRUCTION_WORDS}(?:[ \t]*\#?\d+)?[\s#*_`]*[:：][\s*_`]*", re.IGNORECASE
)
NEW_LABEL = re.compile(
    rf"^[ \t#>*_`]*(?:{_NEW_WORDS}\s*)(?:{INSTRUCTION_WORDS}|version|anweisung)[ \t#*_`]*(?:[:：][ \t*_`]*|$)",
    re.IGNORECASE | re.MULTILINE,
)
_TITLE = re.compile(r"(?P<mark>\*\*|__)(?P<title>[^*_\n]{2,60}?)(?::(?P=mark)|(?P=mark)[ \t]*[:–—-])[ \t]*(?=\S)")
_PREAMBLE = re.compile(
    r"(?:sure|certainly|of course|absolutely|ok(?:ay)?|great|alright|understood|yes|here(?:['’]s| is| are)|below|"
    r"the following|these are|this is|i['’]ve|i have|i can|let['’]s|natürlich|gerne?|hier (?:sind|ist)|bien sûr|"
    r"voici|claro|por supuesto|aquí|aqui est|certo|ecco|natuurlijk|hier zijn|oczywiście|oto|конечно|вот|当然|好的|"
    r"以下|もちろん|はい|물론|다음은|tabii|elbette|işte)(?!\w*[,;]? (?:if|when|how)\b)",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"(?:let me know|i hope|hope (?:this|these|that)|feel free|please (?:let me|note|feel)|would you like|if you "
    r"(?:need|want|would|have|['’]d)|note(?: that)?\b[:,]?|these (?:instructions?|prompts?|tasks?|questions?|"
    r"examples?|are|cover|should|will)|each (?:of these|instruction|prompt|one)|all (?:of )?these|this (?:new |"
    r"rewritten |revised |updated |version)\w*|this (?:instruction|prompt|list) (?:is|now|will|should|can|requires|"
    r"adds|asks|has|covers)|(?:in |by )?(?:this|the) (?:new|rewritten|revised|updated|modified)\b|i (?:have |['’]ve "
    r")?(?:added|changed|made|kept|rewrote|rewritten|included)|(?:explanation|changes(?: made)?|reasoning|rationale|"
    r"why)\s*:|good luck|enjoy|happy to|diese (?:anweisungen|aufgaben|beispiele)|ich hoffe|lass (?:es )?mich|"
    r"j['’]espère|n['’]hésitez|ces (?:instructions|consignes)|espero que|estas instrucciones|estas instruções|spero "
    r"che|queste istruzioni|надеюсь|эти (?:инструкции|задания)|希望|这些指令|这些指示|以上|これらの|이 지시|도움이)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:(?:i['’]?m|i am|we are|we['’]re)(?: \w+)? sorry|sorry|i (?:do )?apologi[sz]e|my apologies|unfortunately|as "
    r"an ai\b|as a (?:large )?language model|i (?:can['’]?t|cannot|can not|won['’]?t|will not|must decline|do not "
    r"feel|don['’]t feel)|i['’]?m (?:unable|not able|not comfortable|just an ai|an ai)|i am (?:unable|not able|not "
    r"comfortable|an ai)|es tut mir leid|tut mir leid|ich kann (?:dir |ihnen )?(?:dabei |das |nicht)|je suis "
    r"désolée?|désolée?|je ne (?:peux|suis)|lo siento|no puedo|mi dispiace|non posso|desculpe|sinto muito|não posso|"
    r"не могу|к сожалению|извините|很抱歉|抱歉|对不起|我无法|我不能|申し訳|죄송)",
    re.IGNORECASE,
)
_UNABLE = re.compile(
    r"can['’]?t|cannot|can not|unable|not able|won['’]?t|will not|not comfortable|decline|against my|don['’]t have|"
    r"do not have|kann|nicht|ne peux|ne suis|no puedo|non posso|não posso|не могу|无法|不能|できません|できかねます|"
    r"없습니다|an ai\b|language model",
    re.IGNORECASE,
)
_MOST_REFUSING_WORDS = 60
_PLACEHOLDER = re.compile(
    rf"[\W_]*(?:(?:{_NEW_WORDS}[ \t]*)?{INSTRUCTION_WORDS}[ \t]*\d*|your \w+|text|insert .{{0,30}}|n/?a|none)?[\W_]*",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "‘": "’", "'": "'", "「": "」", "『": "』", "`": "`", "”": "”"}


def normal(text: str) -> str:
    """A text to be compared: without case, punctuation, and differences of width and white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    if not any(character.isalnum() for character in plain):
        return ""
    return " ".join(re.findall(r"[^\W_]+|[+*/=<>^%-]", plain))


def count_words(text: str) -> int:
    """Words; two characters of a script without spaces count as one."""
    spaceless = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff]")
    return len(spaceless.sub(" ", text).split()) + len(spaceless.findall(text)) // 2


def is_preamble(text: str) -> bool:
    """Whether a text does nothing but announce what follows."""
    line = text.strip(" \t*_#`")
    if not line or len(line.splitlines()) > 3:
        return False
    ends = line.endswith((":", "：", "!", ".", "。", "！"))
    return ends and _PREAMBLE.match(line) is not None


def is_remark(text: str) -> bool:
    """Whether a paragraph talks about the instructions before it."""
    return _REMARK.match(text.strip(" \t*_#`(（[")) is not None


def is_refusal(text: str) -> bool:
    """Whether a reply says that it will not do it, and nothing else."""
    plain = " ".join(text.split()).strip(" *_\"'“”")
    if not _REFUSAL.match(plain) or not _UNABLE.search(plain):
        return False
    return count_words(plain) <= _MOST_REFUSING_WORDS and "```" not in text


def object_instruction(value: Any) -> str:
    """The instruction that a JSON value holds, with its `input` if it has one; empty if there is none."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    fields = {str(key).strip().casefold().replace(" ", "_"): item for key, item in value.items()}
    text = next((fields[key] for key in _INSTRUCTION_KEYS if isinstance(fields.get(key), str)), None)
    if text is None:
        text = next((item for item in fields.values() if isinstance(item, str)), "")
    extra = fields.get("input")
    return f"{text}\n\n{extra}" if isinstance(extra, str) and normal(extra) and extra != text else text


def clean_instruction(text: str) -> str:
    """An instruction without label, title, emphasis and quotation marks around it; empty if it is a placeholder."""
    before = None
    text = text.strip()
    while text != before:
        before = text
        label = _LABEL.match(text)
        if label and text[label.end() :].strip():
            text = text[label.end() :].strip()
        text = _without_title(text)
        text = _without_emphasis(text)
        text = _without_quotes(text)
    return "" if _PLACEHOLDER.fullmatch(text) else text


def _without_title(text: str) -> str:
    """Without a title in bold type and a colon before the instruction; one that is part of a sentence stays."""
    match = _TITLE.match(text)
    if match is None:
        return text
    words = [word for word in match["title"].split() if len(word) > 3]
    rest = text[match.end() :]
    is_title = len(match["title"].split()) <= 6 and all(not word[0].islower() for word in words)
    if is_title and count_words(rest) > max(3, len(match["title"].split())):
        return rest.strip()
    return text


def _without_emphasis(text: str) -> str:
    for mark in ("***", "**", "__", "*", "_"):
        inner = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark) and mark not in inner:
            return inner.strip() if inner.strip() and inner == inner.strip() else text
    return text


def _without_quotes(text: str) -> str:
    text_alone = text.rstrip(",;") if text[-2:-1] in _QUOTES.values() else text
    closing = _QUOTES.get(text_alone[:1])
    inner = text_alone[1:-1]
    if (
        closing
        and len(text_alone) > 2
        and text_alone.endswith(closing)
        and closing not in inner
        and text_alone[0] not in inner
    ):
        return inner.strip()
    return text
