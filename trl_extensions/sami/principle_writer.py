"""The principle writer: a model writes principles and antitheses for a task (SAMI, arXiv 2404.14313, section 3)."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from typing import Any

from trl_extensions.core.generation.replies import fenced_parts
from trl_extensions.core.generation.types import GenerationEngine, GenerationParams
from trl_extensions.core.runs.jsonl import JsonlWriter
from trl_extensions.sami.principles import Principle, parse_principles


logger = logging.getLogger(__name__)

_PROMPTS = files("trl_extensions.sami").joinpath("prompts")
_RETRY_TEMPERATURE = 0.7
_MAX_NAME_WORDS = 6

# What models call the three fields, in JSON and YAML answers as well as in labelled lines.
_LABELS = {
    "name": ("name", "principle name", "principle", "title"),
    "definition": ("definition", "description", "rule", "meaning", "statement", "instruction"),
    "antithesis": ("antithesis", "anti-thesis", "opposite rule", "opposite principle", "opposite", "contrary"),
}
_FIELD_OF = {label: field for field, labels in _LABELS.items() for label in labels}
_ANY_LABEL = "|".join(sorted(map(re.escape, _FIELD_OF), key=len, reverse=True))
_BULLET = re.compile(r"^[\s>#*_•–-]*(?:\(?\d+[.):]\s*)?[\s*_`#]*")
_LABELLED = re.compile(rf"^(?P<label>{_ANY_LABEL})(?:\s*#?\d+)?[\s*_`]*[:=–—-]+[\s*_`]*(?P<value>.*)$", re.IGNORECASE)
_INLINE_LABEL = re.compile(
    r"(?<=[.!?;,\s*])[\s(*_]*\b(?=(?:definition|anti-?thesis|opposite(?: rule| principle)?)[*_`]*:)", re.IGNORECASE
)


def write_principles(
    engine: GenerationEngine,
    task: str,
    num: int,
    *,
    params: GenerationParams | None = None,
    raw_path: str | os.PathLike | None = None,
    max_attempts: int | None = None,
) -> list[Principle]:
    """Ask a model for principles with antitheses until there are enough of them.

    The first question is asked with `params` as they are; the next ones name what is already there, with another seed
    and a temperature of at least 0.7, so that a model that failed once does not fail the same way again.

    Args:
        engine: Any engine; it is given chat messages.
        task: What the principles are for, in a few words.
        num: Number of principles to return, at least 1.
        params: Defaults to greedy decoding with up to 600 new tokens.
        raw_path: JSON-lines file to which every answer is appended, as the model gave it.
        max_attempts: Number of questions to ask at most. Defaults to `3 * num + 3`; a small model gives one each.

    Returns:
        `num` principles with distinct names.

    Raises:
        ValueError: The task is empty, `num` is below 1, or fewer than `num` principles could be read from the answers;
            the line says how many, and where the answers are.
    """
    if not task.strip():
        raise ValueError("`task` is empty; say in a few words what the principles are for")
    if num < 1:
        raise ValueError(f"`num` is {num}; ask for at least 1 principle")
    max_attempts = 3 * num + 3 if max_attempts is None else max_attempts
    params = params or GenerationParams(max_new_tokens=600)
    found: dict[str, Principle] = {}
    shown = [principle for _, principles in _examples() for principle in principles]
    with JsonlWriter(raw_path) if raw_path is not None else nullcontext() as raw:
        for attempt in range(max_attempts):
            prompt = writer_prompt(task, num - len(found), list(found))
            if attempt:
                temperature = max(params.temperature, _RETRY_TEMPERATURE)
                params = replace(params, seed=params.seed + 1, temperature=temperature)
            [(_, generation)] = engine.generate([prompt], params)
            before = len(found)
            for principle in parse_answer(generation.text):
                if _is_new(principle, [*found.values(), *shown]):
                    found[principle.name] = principle
            if raw is not None:
                raw.append({"prompt": prompt, "answer": generation.text, "parsed": len(found) - before})
            if len(found) >= num:
                return list(found.values())[:num]
            logger.info("principle writer: %d of %d principles after question %d", len(found), num, attempt + 1)
    where = f"the answers are in {raw_path}" if raw_path is not None else "give `raw_path` to keep the answers"
    raise ValueError(
        f"only {len(found)} of {num} principles could be read from {max_attempts} answers ({where}); use a stronger "
        "model, ask for fewer, or write the file by hand"
    )


def writer_prompt(task: str, num: int, names: Sequence[str] = ()) -> list[dict[str, str]]:
    """The chat messages that ask for `num` principles other than `names`, after worked examples as earlier turns."""
    messages = []
    for example, principles in _examples():
        messages.append(_request(example["task"], len(principles), example["names"]))
        messages.append({"role": "assistant", "content": "\n\n".join(map(_labelled, principles))})
    return [*messages, _request(" ".join(task.split()), num, names)]


def _request(task: str, num: int, names: Sequence[str]) -> dict[str, str]:
    from jinja2 import Template

    text = Template(_PROMPTS.joinpath("write_principles.jinja").read_text(encoding="utf-8"))
    return {"role": "user", "content": text.render(task=task, num=num, names=list(names))}


def _examples() -> list[tuple[dict[str, Any], list[Principle]]]:
    """The worked examples: task and names, and the principles written for them."""
    import yaml

    examples = yaml.safe_load(_PROMPTS.joinpath("principle_examples.yaml").read_text(encoding="utf-8"))
    return [
        (example, parse_principles({"principles": example["principles"]}, "principle_examples.yaml"))
        for example in examples
    ]


def _labelled(principle: Principle) -> str:
    return f"Name: {principle.name}\nDefinition: {principle.definition}\nAntithesis: {principle.antithesis}"


def _is_new(principle: Principle, others: Sequence[Principle]) -> bool:
    """Whether neither its name nor one of its instructions is there already."""
    names = {other.name.casefold() for other in others}
    rules = {rule.casefold() for other in others for rule in (other.definition, other.antithesis)}
    return principle.name.casefold() not in names and rules.isdisjoint(
        (principle.definition.casefold(), principle.antithesis.casefold())
    )


def parse_answer(answer: str) -> list[Principle]:
    """Read principles out of a model's answer.

    Understands JSON, YAML and labelled lines (`Name: ... Definition: ... Antithesis: ...`) with numbers, bullets, bold
    type, code fences, headings in place of names, and talk around them. Entries that lack a field are left out.

    Args:
        answer: The text of the answer.

    Returns:
        The principles in their order in the answer, possibly none. Names may repeat.
    """
    candidates = [*fenced_parts(answer), answer]
    readings = [*map(_json_entries, candidates), *map(_yaml_entries, candidates), _labelled_entries(answer)]
    return max(([p for entry in entries if (p := _principle(entry)) is not None] for entries in readings), key=len)


def _principle(entry: Any) -> Principle | None:
    """A principle from a mapping with any of the known labels, `None` if a field is missing or makes no sense."""
    if not isinstance(entry, dict):
        return None
    fields: dict[str, str] = {}
    for key, value in entry.items():
        field = _FIELD_OF.get(str(key).strip(" *_`").casefold().replace("_", " "))
        if field is not None and isinstance(value, str) and _clean(value):
            fields.setdefault(field, _clean(value))
    if "definition" not in fields and len(fields.get("name", "").split()) > _MAX_NAME_WORDS:
        fields["definition"] = fields.pop("name")  # the rule itself was given as "Principle: ..."
    if "name" not in fields and "definition" in fields:
        fields["name"] = " ".join(fields["definition"].split()[:_MAX_NAME_WORDS])
    fields["name"] = fields.get("name", "").rstrip(".:;,!")
    if len(fields["name"].split()) > _MAX_NAME_WORDS:
        return None
    try:
        return Principle(**fields)
    except (TypeError, ValueError):
        return None


def _clean(value: str) -> str:
    return " ".join(value.split()).strip(" *_`\"“”'")


def _json_entries(text: str) -> list[Any]:
    """The first JSON list or object in the text, as a list of entries."""
    decoder = json.JSONDecoder()
    for start in re.finditer(r"[\[{]", text):
        try:
            document, _ = decoder.raw_decode(text, start.start())
        except json.JSONDecodeError:
            continue
        entries = _entries(document)
        if any(isinstance(entry, dict) for entry in entries):
            return entries
    return []


def _yaml_entries(text: str) -> list[Any]:
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError:
        return []
    entries = _entries(document)
    # Labelled lines look like one mapping with repeated keys, of which YAML would keep the last.
    return [] if entries == [document] else entries


def _entries(document: Any) -> list[Any]:
    """Entries of a list, of the first list in a mapping, of a mapping from names to entries, or the one entry."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return []
    for value in document.values():
        if isinstance(value, list):
            return value
    if document and all(isinstance(value, dict) for value in document.values()):
        return [{"name": str(name), **value} for name, value in document.items()]
    return [document]


def _labelled_entries(text: str) -> list[dict[str, str]]:
    """Entries from labelled lines. A label that is filled already, or a name after other fields, begins a new one."""
    entries: list[dict[str, str]] = [{}]
    heading, last = "", None
    for line in _lines(text):
        if not line:
            last = None
            continue
        match = _LABELLED.match(line)
        if match is None:
            if last is not None:
                entries[-1][last] += " " + line
            else:
                heading = line
            continue
        field = _FIELD_OF[match["label"].casefold()]
        current = entries[-1]
        if field in current or (field == "name" and current):
            current = {}
            entries.append(current)
        if field == "definition" and "name" not in current and heading:
            current["name"], _, rest = heading.partition(":")
            heading = rest.strip()
        current[field] = match["value"]
        last = field
    return entries


def _lines(text: str) -> Iterator[str]:
    """Lines without bullets, numbers and bold type, each label at the start of its own line."""
    for line in text.replace("```", "").splitlines():
        for part in _INLINE_LABEL.sub("\n", line).split("\n"):
            yield _BULLET.sub("", part).strip()
