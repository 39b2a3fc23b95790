"""Principles, the constitutions built from them, and a model that drafts them (SAMI, arXiv 2404.14313, section 3).

A principle is a behaviour with its opposite. A constitution picks one of the two for every principle and lists the
picks in a shuffled order; SAMI contrasts responses sampled under different constitutions of one query.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..core.generation.ask import ask_until_read
from ..core.generation.types import GenerationEngine, GenerationParams
from ..core.runs.jsonl import JsonlWriter
from ..core.runs.report import write_atomically
from .checks import PrincipleCheck


_HEADER = """\
# Principles for SAMI. Edit freely: each entry needs a short unique `name`, a `definition` (the behaviour you want) and
# an `antithesis` (its opposite, as clear an instruction as the definition). Training contrasts the two. Either may be
# a list of texts that say the same in other words; one is drawn each time.
# After editing, check the file with: trl-ext principles --check {file}
"""
_PROMPTS = files("trl_extensions.sami").joinpath("prompts")
_RETRY_TEMPERATURE, _MAX_NAME_WORDS = 1.0, 6
# "Helpful and helpful" has 12 different runs of four characters of 16, prose over 90 % of its own
_LEAST_DISTINCT, _ALIKE = 0.8, 0.6


def _one_line(text: str) -> str:
    return " ".join(text.split())


Line = Annotated[str, AfterValidator(_one_line), Field(min_length=1)]
if TYPE_CHECKING:
    Wording = str | tuple[str, ...]
else:
    Wording = Annotated[
        tuple[Line, ...],
        Field(min_length=1),
        BeforeValidator(lambda given: given if isinstance(given, (list, tuple)) else (given,)),
        AfterValidator(lambda lines: lines[0] if len(lines) == 1 else lines),
    ]


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Principle:
    """A behaviour and its opposite, each an instruction in one line, under a short unique name; checked when made.

    `definition` and `antithesis` may each be several texts that say the same, of which one is drawn each time."""

    name: Line
    definition: Wording
    antithesis: Wording
    check: PrincipleCheck | None = None

    @model_validator(mode="after")
    def _differ(self) -> Self:
        opposites = {text.casefold() for text in self.wordings(False)}
        if any(text.casefold() in opposites for text in self.wordings(True)):
            raise ValueError("`definition` and `antithesis` are the same; write the opposite as the antithesis")
        return self

    def wordings(self, chosen: bool) -> tuple[str, ...]:
        """The texts of the definition, if that is `chosen`, or of the antithesis."""
        own = self.definition if chosen else self.antithesis
        return (own,) if isinstance(own, str) else own

    def as_dict(self) -> dict[str, Any]:
        """As in the YAML file: without a `check` where there is none, lists for tuples."""
        return _given(asdict(self))


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _given(own) for name, own in value.items() if own is not None and own is not False}
    return list(value) if isinstance(value, tuple) else value


class _File(BaseModel, extra="forbid"):
    principles: Annotated[list[Principle], Field(min_length=1)]

    @field_validator("principles")
    @classmethod
    def _have_names_of_their_own(cls, principles: list[Principle]) -> list[Principle]:
        names = [principle.name.casefold() for principle in principles]
        for number, name in enumerate(names, start=1):
            if (first := names.index(name) + 1) < number:
                raise ValueError(f"principle {number}: `name` is taken by principle {first}; rename one")
        return principles


@dataclass(frozen=True)
class Constitution:
    """One choice per principle: the chosen instructions as numbered lines in shuffled order (`text`), and by principle
    name whether the definition was chosen, not the antithesis (`choices`)."""

    text: str
    choices: dict[str, bool]

    @property
    def label(self) -> str:
        return constitution_label(self.choices)


def constitution_label(choices: Mapping[str, bool]) -> str:
    """The choices in short, sorted by name: `{"friendly": False, "concise": True}` -> `"+concise −friendly"`."""
    return " ".join(f"{'+' if choices[name] else '−'}{name}" for name in sorted(choices))


def sample_constitutions(
    principles: Sequence[Principle], num: int, *, seed: int, key: str, purpose: str = "sample", pairs: str = "random"
) -> list[Constitution]:
    """Draw C = `num` constitutions with different choices (section 3 of the paper builds two a query this way).

    Every set of `num` distinct choice assignments is equally likely (`pairs="random"`), or every set that holds the
    assignment of all definitions, which then comes first (`"desired"`). The choices depend on the run's `seed` and
    the `key`, usually the query's id, only: queries can come in any order. The order of the principles, each
    constitution's own, and their wording are drawn anew for every `purpose`. Responses are sampled under one draw and
    scored under another, so that nothing but the choices can tell constitutions apart.

    Raises:
        ValueError: `num` is below 2, there are too few principles for `num` different choices, or two have one name.
    """
    if num < 2:
        raise ValueError(f"`num` is {num}; SAMI contrasts constitutions, so at least 2 a query are needed")
    if 2 ** len(principles) < num:
        needed = (num - 1).bit_length()
        raise ValueError(f"{num} different constitutions need at least {needed} principles, got {len(principles)}")
    if len({principle.name for principle in principles}) < len(principles):
        raise ValueError("two principles have the same name; rename one")
    rng = random.Random(f"{seed}:{key}")
    # Rejecting repeats keeps every set of assignments equally likely and never lists all 2**P of them
    assignments: dict[int, None] = {2 ** len(principles) - 1: None} if pairs == "desired" else {}
    while len(assignments) < num:
        assignments.setdefault(rng.getrandbits(len(principles)))
    rng = random.Random(f"{seed}:{key}:{purpose}")
    constitutions = []
    for bits in assignments:
        choices = {principle.name: bool(bits >> index & 1) for index, principle in enumerate(principles)}
        order = list(principles)
        rng.shuffle(order)
        picks = [rng.choice(own.wordings(choices[own.name])) for own in order]
        text = "\n".join(f"{number}. {pick}" for number, pick in enumerate(picks, start=1))
        constitutions.append(Constitution(text, choices))
    return constitutions


def parse_principles(document: Any, source: str) -> list[Principle]:
    """Validate a loaded `{"principles": [{"name", "definition", "antithesis"}, ...]}`.

    Raises:
        ValueError: One line naming the source, the principle (counted from 1), the field and the remedy.
    """
    try:
        return _File.model_validate(document).principles
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        names = [f"`{part}`" for part in first["loc"] if isinstance(part, str)]
        number = next((part for part in first["loc"] if isinstance(part, int)), None)
        place = names if number is None else [names[0], f"principle {number + 1}", *names[1:]]
        where = ": ".join([source, *(place[1:] if len(place) > 1 else place)])
        form = "the file has the one key `principles`, a list of entries `name`, `definition` and `antithesis`"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')} ({form})") from None


def load_principles(path: str | os.PathLike) -> list[Principle]:
    """Read a YAML file of principles, in file order; errors as `parse_principles`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with `trl-ext principles --task ... --output {path}`")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML; quote special characters ({_one_line(str(error))})") from None
    return parse_principles(document, str(path))


def save_principles(path: str | os.PathLike, principles: Sequence[Principle], *, task: str | None = None) -> None:
    """Write principles, checked first, as YAML under a comment that invites people to edit them and names the task."""
    path = Path(path)
    document = {"principles": [principle.as_dict() for principle in principles]}
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
    engine: GenerationEngine, task: str, num: int, *, params: GenerationParams, raw_path: str | os.PathLike
) -> list[Principle]:
    """Ask a model for `num` principles for a task, with distinct names, until there are enough of them.

    The first question is asked with `params` as they are; the next ones name what is already there, with another seed
    and a temperature of at least 1, so that a model that failed once does not fail the same way again. Each answer is
    appended, as it came, to the JSON-lines file `raw_path`. A `ValueError` says if `3 * num + 3` of them gave too few
    principles that mean something.
    """
    found: list[Principle] = []
    attempts = 3 * num + 3
    with JsonlWriter(raw_path) as raw:
        for attempt in range(attempts):
            prompt = writer_prompt(task, num - len(found), [principle.name for principle in found])
            if attempt:
                temperature = max(params.temperature, _RETRY_TEMPERATURE)
                params = replace(params, seed=params.seed + 1, temperature=temperature)
            # The next question is asked in any case, in other words and with another seed: one try is enough
            [answer] = ask_until_read(engine, [prompt], params, Drafts, tries=1, step="principles")
            before = len(found)
            for draft in answer.value.principles if answer.value is not None else ():
                _add_new(found, draft)
            raw.append({"prompt": prompt, "answer": answer.raw[-1], "parsed": len(found) - before})
            if len(found) >= num:
                return found[:num]
    read = f"only {len(found)} of {num} principles could be read from {attempts} answers (they are in {raw_path})"
    other = "others are unreadable, repeat themselves or one another, or are their own opposite"
    raise ValueError(f"{read}; {other}: use a larger model, ask for fewer, or write the file by hand")


def _add_new(found: list[Principle], draft: _Draft) -> None:
    """Add a draft that is a principle, with a name that is no sentence, and repeats neither itself, nor another, nor a
    worked example."""
    try:
        principle = Principle(draft.name.strip(" .:;,!"), draft.definition, draft.antithesis)
    except ValueError:
        return
    others = [*found, *(principle for example in _examples() for principle in example["principles"])]
    taken = {text for other in others for text in _texts(other)}
    own, opposite, known = draft.definition, draft.antithesis, [text for one in found for text in one.wordings(True)]
    repeats = any(len({*runs}) < _LEAST_DISTINCT * len(runs) for runs in map(_runs, (own, opposite)))
    if len(principle.name.split()) > _MAX_NAME_WORDS or _texts(principle) & taken or repeats:
        return
    if _words(own) != _words(opposite) and not any(_are_alike(own, text) for text in known):
        found.append(principle)


def _words(text: str) -> list[str]:
    return sorted(re.findall(r"\w+", text.casefold()))


def _runs(text: str) -> list[str]:
    """All runs of four characters, punctuation aside, which tell a repetition in every script."""
    plain = " ".join(re.findall(r"\w+", text.casefold()))
    return [plain[start : start + 4] for start in range(max(1, len(plain) - 3))]


def _are_alike(a: str, b: str) -> bool:
    first, second = {*_runs(a)}, {*_runs(b)}
    return _words(a) == _words(b) or len(first & second) > _ALIKE * len(first | second)


def _texts(principle: Principle) -> set[str]:
    return {text.casefold() for text in (principle.name, *principle.wordings(True), *principle.wordings(False))}


def writer_prompt(task: str, num: int, names: Sequence[str] = ()) -> list[dict[str, str]]:
    """The chat messages that ask for `num` principles other than `names`, after worked examples as earlier turns."""
    from jinja2 import Template

    question = Template(_PROMPTS.joinpath("write_principles.jinja").read_text(encoding="utf-8"))
    messages = []
    for example in _examples():
        answer = {"principles": [principle.as_dict() for principle in example["principles"]]}
        messages += [
            {"role": "user", "content": question.render(example, num=len(example["principles"]))},
            {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False)},
        ]
    return [*messages, {"role": "user", "content": question.render(task=_one_line(task), num=num, names=names)}]


def _examples() -> list[dict[str, Any]]:
    """The worked examples: `task`, `names` that are there already, and `principles`."""
    examples = yaml.safe_load(_PROMPTS.joinpath("principle_examples.yaml").read_text(encoding="utf-8"))
    return [own | {"principles": [Principle(**principle) for principle in own["principles"]]} for own in examples]
