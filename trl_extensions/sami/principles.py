"""Principles, the constitutions built from them, and a model that drafts them (SAMI, arXiv 2404.14313, section 3).

A principle is a behaviour with its opposite. A constitution picks one of the two for every principle and lists the
picks in a shuffled order; SAMI contrasts responses sampled under different constitutions of one query.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ..core.generation.ask import ask_until_read
from ..core.generation.types import GenerationEngine, GenerationParams
from ..core.runs.jsonl import JsonlWriter
from ..core.runs.report import write_atomically


logger = logging.getLogger(__name__)

FIELDS = ("name", "definition", "antithesis")
_HEADER = """\
# Principles for SAMI. Edit freely: each entry needs a short unique `name`, a `definition` (the behaviour you want) and
# an `antithesis` (its opposite, as clear an instruction as the definition). Training contrasts the two.
# After editing, check the file with: trl-ext principles --check {file}
"""
_PROMPTS = files("trl_extensions.sami").joinpath("prompts")
# So that a small model does not give what it gave before
_RETRY_TEMPERATURE = 1.0
_MAX_NAME_WORDS = 6


@dataclass(frozen=True)
class Principle:
    """A behaviour and its opposite, each an instruction in one line, under a short unique name.

    Raises:
        TypeError: A field is not text.
        ValueError: A field is empty, or the two instructions are the same.
    """

    name: str
    definition: str
    antithesis: str

    def __post_init__(self):
        for field in FIELDS:
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"`{field}` must be text, got {value!r}; put it in quotes")
            if not value.strip():
                raise ValueError(f"`{field}` is empty; write one sentence")
            object.__setattr__(self, field, _one_line(value))
        if self.definition.casefold() == self.antithesis.casefold():
            raise ValueError("`definition` and `antithesis` are the same; write the opposite as the antithesis")


@dataclass(frozen=True)
class Constitution:
    """One choice of definition or antithesis per principle.

    Args:
        text: The chosen instructions as numbered lines, `"1. ...\\n2. ..."`, in shuffled order.
        choices: Principle name -> True where the definition was chosen, False where the antithesis was.
    """

    text: str
    choices: dict[str, bool]

    @property
    def label(self) -> str:
        """See `constitution_label`."""
        return constitution_label(self.choices)


def constitution_label(choices: Mapping[str, bool]) -> str:
    """The choices in short, sorted by name: `{"friendly": False, "concise": True}` -> `"+concise −friendly"`."""
    return " ".join(f"{'+' if choices[name] else '−'}{name}" for name in sorted(choices))


def sample_constitutions(principles: Sequence[Principle], num: int, *, seed: int, key: str) -> list[Constitution]:
    """Draw constitutions with different choices (section 3 of the paper builds two a query this way).

    Every set of `num` distinct choice assignments is equally likely, and each constitution has its own random order.
    The draw depends on `(seed, key)` only, so queries can be visited in any order, or again after a restart.

    Args:
        principles: P principles; P must satisfy `2**P >= num`.
        num: Number of constitutions C, at least 2.
        seed: Seed of the run.
        key: What the draw is for, usually the query's id.

    Raises:
        ValueError: `num` is below 2, there are too few principles for `num` different choices, or two have one name.
    """
    if num < 2:
        raise ValueError(f"`num` is {num}; SAMI contrasts constitutions, so at least 2 a query are needed")
    if 2 ** len(principles) < num:
        raise ValueError(
            f"{num} different constitutions need at least {(num - 1).bit_length()} principles, got {len(principles)}; "
            f"add principles or ask for at most {2 ** len(principles)} constitutions"
        )
    if len({principle.name for principle in principles}) < len(principles):
        raise ValueError("two principles have the same name; rename one")
    rng = random.Random(f"{seed}:{key}")
    # Rejecting repeats keeps every set of assignments equally likely and never lists all 2**P of them
    assignments: dict[int, None] = {}
    while len(assignments) < num:
        assignments.setdefault(rng.getrandbits(len(principles)))
    constitutions = []
    for bits in assignments:
        choices = {principle.name: bool(bits >> index & 1) for index, principle in enumerate(principles)}
        order = list(principles)
        rng.shuffle(order)
        picks = [own.definition if choices[own.name] else own.antithesis for own in order]
        text = "\n".join(f"{number}. {pick}" for number, pick in enumerate(picks, start=1))
        constitutions.append(Constitution(text, choices))
    return constitutions


def parse_principles(document: Any, source: str) -> list[Principle]:
    """Validate a loaded document `{"principles": [{"name", "definition", "antithesis"}, ...]}`.

    Raises:
        ValueError: One line naming the source, the principle (counted from 1), the field and the remedy.
    """
    if not isinstance(document, dict):
        raise ValueError(
            f"{source}: expected a mapping with the key `principles`, got {type(document).__name__}; start the file "
            "with `principles:`"
        )
    unknown = [key for key in document if key != "principles"]
    if unknown:
        raise ValueError(f"{source}: unknown key {unknown[0]!r}; remove it, the only top-level key is `principles`")
    entries = document.get("principles")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{source}: `principles` must be a list of at least one principle; add `- name: ...`")
    principles: list[Principle] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries, start=1):
        principle = _parse_principle(entry, f"{source}: principle {index}")
        first = seen.setdefault(principle.name.casefold(), index)
        if first != index:
            raise ValueError(
                f"{source}: principle {index} ({principle.name!r}): `name` is already used by principle {first}; "
                "rename one"
            )
        principles.append(principle)
    return principles


def _parse_principle(entry: Any, where: str) -> Principle:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with `name`, `definition` and `antithesis`, got {entry!r}")
    if isinstance(entry.get("name"), str) and entry["name"].strip():
        where = f"{where} ({_one_line(entry['name'])!r})"
    unknown = [key for key in entry if key not in FIELDS]
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; remove it, the fields are {', '.join(FIELDS)}")
    for field in FIELDS:
        if entry.get(field) is None:
            raise ValueError(f"{where}: `{field}` is missing; add `{field}: <one sentence>`")
    try:
        return Principle(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def load_principles(path: str | os.PathLike) -> list[Principle]:
    """Read a YAML file `principles: [{name: ..., definition: ..., antithesis: ...}, ...]`, in file order.

    Raises:
        ValueError: One line naming the file, the principle, the field and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with `trl-ext principles --task ... --output {path}`")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not valid YAML; put values with special characters in quotes ({_one_line(str(error))})"
        ) from None
    return parse_principles(document, str(path))


def save_principles(path: str | os.PathLike, principles: Sequence[Principle], *, task: str | None = None) -> None:
    """Write principles as YAML, under a comment that invites a person to edit them.

    Args:
        path: Where to write; parent folders are made, an existing file is replaced in one step.
        principles: At least one; validated like a file that is read.
        task: The task they were written for, kept as a comment.
    """
    path = Path(path)
    document = {"principles": [vars(principle) for principle in principles]}
    parse_principles(document, str(path))
    header = _HEADER.format(file=path.name) + (f"# Task: {_one_line(task)}\n" if task else "")
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{header}\n{body}")


class _Draft(BaseModel):
    name: str
    definition: str
    antithesis: str


class Drafts(BaseModel):
    """What the principle writer answers with."""

    principles: list[_Draft]


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
    and a temperature of at least 1, so that a model that failed once does not fail the same way again.

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
    found: list[Principle] = []
    shown = [principle for _, principles in _examples() for principle in principles]
    with JsonlWriter(raw_path) if raw_path is not None else nullcontext() as raw:
        for attempt in range(max_attempts):
            prompt = writer_prompt(task, num - len(found), [principle.name for principle in found])
            if attempt:
                temperature = max(params.temperature, _RETRY_TEMPERATURE)
                params = replace(params, seed=params.seed + 1, temperature=temperature)
            # The next question is asked in any case, in other words and with another seed: one try is enough
            [answer] = ask_until_read(engine, [prompt], params, Drafts, tries=1, step="principles")
            before = len(found)
            for draft in answer.value.principles if answer.value is not None else ():
                principle = _checked(draft)
                if principle is not None and _is_new(principle, [*found, *shown]):
                    found.append(principle)
            if raw is not None:
                raw.append({"prompt": prompt, "answer": answer.raw[-1], "parsed": len(found) - before})
            if len(found) >= num:
                return found[:num]
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
        answer = json.dumps({"principles": [vars(principle) for principle in principles]}, ensure_ascii=False)
        messages.append(_request(example["task"], len(principles), example["names"]))
        messages.append({"role": "assistant", "content": answer})
    return [*messages, _request(_one_line(task), num, names)]


def _request(task: str, num: int, names: Sequence[str]) -> dict[str, str]:
    from jinja2 import Template

    text = Template(_PROMPTS.joinpath("write_principles.jinja").read_text(encoding="utf-8"))
    return {"role": "user", "content": text.render(task=task, num=num, names=list(names))}


def _examples() -> list[tuple[dict[str, Any], list[Principle]]]:
    """The worked examples: task and names, and the principles written for them."""
    examples = yaml.safe_load(_PROMPTS.joinpath("principle_examples.yaml").read_text(encoding="utf-8"))
    source = "principle_examples.yaml"
    return [(example, parse_principles({"principles": example["principles"]}, source)) for example in examples]


def _checked(draft: _Draft) -> Principle | None:
    """The principle of a draft; None if a field is empty, the rules are the same, or the name is a whole sentence."""
    name = draft.name.strip(" .:;,!")
    try:
        return Principle(name, draft.definition, draft.antithesis) if len(name.split()) <= _MAX_NAME_WORDS else None
    except ValueError:
        return None


def _is_new(principle: Principle, others: Sequence[Principle]) -> bool:
    """Whether neither its name nor one of its instructions is there already."""
    names = {other.name.casefold() for other in others}
    rules = {rule.casefold() for other in others for rule in (other.definition, other.antithesis)}
    own = (principle.definition.casefold(), principle.antithesis.casefold())
    return principle.name.casefold() not in names and rules.isdisjoint(own)


def _one_line(text: str) -> str:
    return " ".join(text.split())
