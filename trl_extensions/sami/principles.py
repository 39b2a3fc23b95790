"""Principles, and the constitutions built from them (SAMI, arXiv 2404.14313, section 3).

A principle is a behaviour with its opposite. A constitution picks one of the two for every principle and lists the
picks in a shuffled order; SAMI contrasts responses sampled under different constitutions of one query.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FIELDS = ("name", "definition", "antithesis")

_HEADER = """\
# Principles for SAMI. Edit freely: each entry needs a short unique `name`, a `definition` (the behaviour you want) and
# an `antithesis` (its opposite, as clear an instruction as the definition). Training contrasts the two.
# After editing, check the file with: trl-ext principles --check {file}
"""


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Principle:
    """A behaviour and its opposite.

    Args:
        name (`str`):
            Short unique name, used in labels and reports.
        definition (`str`):
            The instruction that asks for the behaviour.
        antithesis (`str`):
            The instruction that asks for the opposite.

    Raises:
        `TypeError`: a field is not text. `ValueError`: a field is empty, or the two instructions are the same.
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
        if _one_line(self.definition).casefold() == _one_line(self.antithesis).casefold():
            raise ValueError("`definition` and `antithesis` are the same; write the opposite as the antithesis")


@dataclass(frozen=True)
class Constitution:
    """One choice of definition or antithesis per principle.

    Args:
        text (`str`):
            The chosen instructions as numbered lines, `"1. ...\\n2. ..."`, in shuffled order.
        choices (`dict[str, bool]`):
            Principle name -> `True` where the definition was chosen, `False` where the antithesis was.
    """

    text: str
    choices: dict[str, bool]

    @property
    def label(self) -> str:
        """The choices in short, sorted by name: `"+concise −friendly"`."""
        return constitution_label(self.choices)


def constitution_label(choices: Mapping[str, bool]) -> str:
    """The choices in short, sorted by name: `{"friendly": False, "concise": True}` -> `"+concise −friendly"`."""
    return " ".join(f"{'+' if choices[name] else '−'}{name}" for name in sorted(choices))


def _parse_principle(entry: Any, where: str) -> Principle:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with `name`, `definition` and `antithesis`, got {entry!r}")
    name = entry.get("name")
    if isinstance(name, str) and name.strip():
        where = f"{where} ({_one_line(name)!r})"
    unknown = [key for key in entry if key not in FIELDS]
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; remove it, the fields are {', '.join(FIELDS)}")
    for field in FIELDS:
        if field not in entry or entry[field] is None:
            raise ValueError(f"{where}: `{field}` is missing; add `{field}: <one sentence>`")
    try:
        return Principle(**{field: _strip(entry[field]) for field in FIELDS})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _strip(value: Any) -> Any:
    return _one_line(value) if isinstance(value, str) else value


def parse_principles(document: Any, source: str) -> list[Principle]:
    """Validate a loaded document `{"principles": [{"name", "definition", "antithesis"}, ...]}`.

    Args:
        document (`Any`):
            What the YAML file holds.
        source (`str`):
            The file's name, for the error messages.

    Raises:
        `ValueError`: one line naming the source, the principle (counted from 1), the field and the remedy.
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


def load_principles(path: str | os.PathLike) -> list[Principle]:
    """Read and validate a YAML file of principles.

    Args:
        path (`str` or `os.PathLike`):
            A file of the form `principles: [{name: ..., definition: ..., antithesis: ...}, ...]`.

    Returns:
        `list[Principle]`: in file order; white space inside a field is collapsed to single spaces.

    Raises:
        `ValueError`: one line naming the file, the principle, the field and the remedy.
    """
    import yaml

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
        path (`str` or `os.PathLike`):
            Where to write; parent folders are made, an existing file is replaced in one step.
        principles (`Sequence[Principle]`):
            At least one; validated like a file that is read.
        task (`str`, *optional*):
            The task they were written for, kept as a comment.
    """
    import yaml

    path = Path(path)
    document = {"principles": [{field: getattr(principle, field) for field in FIELDS} for principle in principles]}
    parse_principles(document, str(path))
    header = _HEADER.format(file=path.name)
    if task:
        header += f"# Task: {_one_line(task)}\n"
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(header + "\n" + body, encoding="utf-8")
    os.replace(partial, path)


def _numbered(principles: Sequence[Principle], choices: Mapping[str, bool]) -> str:
    picks = [_one_line(p.definition if choices[p.name] else p.antithesis) for p in principles]
    return "\n".join(f"{number}. {pick}" for number, pick in enumerate(picks, start=1))


def sample_constitutions(principles: Sequence[Principle], num: int, *, seed: int, key: str) -> list[Constitution]:
    """Draw constitutions with different choices (section 3 of the paper builds two a query this way).

    Every set of `num` distinct choice assignments is equally likely, and each constitution has its own random order.
    The draw depends on `(seed, key)` only, so queries can be visited in any order, or again after a restart.

    Args:
        principles (`Sequence[Principle]`):
            P principles; P must satisfy `2**P >= num`.
        num (`int`):
            Number of constitutions C, at least 2.
        seed (`int`):
            Seed of the run.
        key (`str`):
            What the draw is for, usually the query's id.

    Returns:
        `list[Constitution]`: C constitutions.

    Raises:
        `ValueError`: `num` is below 2, or there are too few principles for `num` different choices.
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
    # Rejecting repeats keeps every set of assignments equally likely and never lists all 2**P of them.
    assignments: dict[int, None] = {}
    while len(assignments) < num:
        assignments.setdefault(rng.getrandbits(len(principles)))
    constitutions = []
    for bits in assignments:
        choices = {principle.name: bool(bits >> index & 1) for index, principle in enumerate(principles)}
        order = list(principles)
        rng.shuffle(order)
        constitutions.append(Constitution(text=_numbered(order, choices), choices=choices))
    return constitutions
