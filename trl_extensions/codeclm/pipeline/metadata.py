"""Metadata of instructions: what they are for, and which skills an answer takes (arXiv 2404.05875, section 3.1)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ...core.runs.jsonl import read_jsonl
from ...core.runs.report import write_atomically


_MOST_DRAWS = 50

_HEADER = """\
# Metadata for CodecLM: instructions are written for each of these. Edit freely: `use_case` says in a few words what
# people ask for, `skills` what it takes to answer, the most important first. `weight` may be left out; with
# `allocation: proportional` an entry gets instructions in proportion to it, and there is no other use for it.
"""


@dataclass(frozen=True)
class Metadata:
    """A use case and the skills it takes, in a few words each, the most important first."""

    use_case: str
    skills: tuple[str, ...]

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """The same for two that differ in case, white space, and the order of the skills at most."""
        return folded(self.use_case), tuple(sorted(map(folded, self.skills)))

    def as_json(self) -> dict[str, Any]:
        return {"use_case": self.use_case, "skills": list(self.skills)}


@dataclass(frozen=True)
class Origin:
    """Metadata to decode, how much weight it has, and the seeds it comes from."""

    metadata: Metadata
    weight: float = 1.0
    seeds: tuple[str, ...] = ()


_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    use_case: _Text
    skills: list[_Text] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


def load_metadata(path: str | os.PathLike, max_skills: int | None = None) -> list[Origin]:
    """Metadata that somebody wrote or edited: a list of `use_case`, `skills` (at most so many) and, if wanted,
    `weight`, as YAML, JSON or JSON lines. A `ValueError` names file and row."""
    path, origins = Path(path), list[Origin]()
    places: dict[Any, int] = {}
    for number, row in enumerate(_read_rows(path), start=1):
        where = f"{path}: row {number}"
        try:
            entry = _Entry.model_validate(row)
        except ValidationError as error:
            wrong = error.errors()[0]
            field = "`" + ".".join(map(str, wrong["loc"])) + "`: " if wrong["loc"] else ""
            form = "an entry has `use_case` (text), `skills` (a list of texts) and, if wanted, `weight` (above 0)"
            raise ValueError(f"{where}: {field}{wrong['msg']}, got {wrong['input']!r:.60}; {form}") from None
        if len(set(map(folded, entry.skills))) < (number_of := len(entry.skills)):
            raise ValueError(f"{where}: one of `skills` is there twice ({entry.skills}); remove one")
        if max_skills is not None and number_of > max_skills:
            raise ValueError(f"{where}: {number_of} `skills`, but `max_skills` is {max_skills}; remove or raise it")
        metadata = Metadata(one_line(entry.use_case), tuple(map(one_line, entry.skills)))
        earlier = places.setdefault(metadata.key, number)
        if earlier != number:
            raise ValueError(f"{path}: rows {earlier} and {number} are the same ({metadata.use_case!r}); delete one")
        origins.append(Origin(metadata, entry.weight))
    if not origins:
        raise ValueError(f"{path}: there is no metadata; write a list of entries with `use_case` and `skills`")
    return origins


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path, or write one with `trl-ext codeclm metadata`")
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({one_line(str(error))}); correct the file") from None
    if isinstance(document, dict) and list(document) == ["metadata"]:
        document = document["metadata"]
    if document is not None and not isinstance(document, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(document).__name__}; write `- use_case: ...`")
    return document or []


def write_metadata(path: str | os.PathLike, origins: Iterable[Origin]) -> None:
    """Write a YAML file for a person to edit; an earlier file is replaced. Weights other than 1 are written too."""
    import yaml

    rows = [own.metadata.as_json() | ({} if own.weight == 1 else {"weight": own.weight}) for own in origins]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _HEADER + "\n" + yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=119))


def merge_metadata(pairs: Iterable[tuple[Metadata, str]]) -> list[Origin]:
    """Put equal metadata of (metadata, seed) together, in order of the first; the weight is the number of seeds."""
    merged: dict[Any, tuple[Metadata, list[str]]] = {}
    for metadata, seed in pairs:
        merged.setdefault(metadata.key, (metadata, []))[1].append(seed)
    return [Origin(metadata, float(len(seeds)), tuple(seeds)) for metadata, seeds in merged.values()]


def allocate(weights: Sequence[float], total: int, how: str) -> list[int]:
    """How many of `total` instructions each metadata gets: "equal" parts, or "proportional" to its weight, above 0.

    By largest remainder; where remainders are equal, the earlier one gets more. No metadata is left without, as long
    as there are as many instructions as metadata.
    """
    weights = [1.0] * len(weights) if how == "equal" else list(weights)
    numbers = _largest_remainder(weights, total)
    if total >= len(weights):
        # Those that would get none get one; the others share what is left, until nobody is left without.
        none = set[int]()
        while fresh := {place for place, number in enumerate(numbers) if number == 0 and place not in none}:
            none |= fresh
            rest = [0.0 if place in none else weight for place, weight in enumerate(weights)]
            numbers = _largest_remainder(rest, total - len(none))
            numbers = [1 if place in none else number for place, number in enumerate(numbers)]
    return numbers


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    whole = sum(weights)
    quotas = [total * weight / whole for weight in weights]
    numbers = [int(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda place: (-round(quotas[place] - numbers[place], 9), place))
    for place in order[: total - sum(numbers)]:
        numbers[place] += 1
    return numbers


def sample_pairings(origins: Sequence[Origin], *, max_skills: int, seed: int = 0) -> list[Origin]:
    """The origins with their skills drawn anew from those of all, each as many as it had, up to `max_skills`; no two
    are the same, unless there are too few skills for that."""
    skills = {folded(skill): skill for own in reversed(origins) for skill in reversed(own.metadata.skills)}
    pool = sorted(skills.values())
    generator = random.Random(seed)
    drawn, keys = list[Origin](), set[Any]()
    for own in origins:
        size = min(len(own.metadata.skills), max_skills, len(pool))
        for _ in range(_MOST_DRAWS):
            candidate = Metadata(own.metadata.use_case, tuple(generator.sample(pool, size)))
            if candidate.key not in keys:
                break
        keys.add(candidate.key)
        drawn.append(Origin(candidate, own.weight, own.seeds))
    return drawn


def one_line(text: str) -> str:
    return " ".join(text.split())


def folded(text: str) -> str:
    return one_line(text).casefold()
