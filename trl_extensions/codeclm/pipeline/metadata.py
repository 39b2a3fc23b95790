"""Metadata of instructions: what they are for, and which skills an answer takes (arXiv 2404.05875, section 3.1)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.runs.report import write_atomically


_MOST_DRAWS = 50
FIELDS = ("use_case", "skills", "weight")

_HEADER = """\
# Metadata for CodecLM: instructions are written for each of these. Edit freely: `use_case` says in a few words what
# people ask for, `skills` what it takes to answer, the most important first. `weight` may be left out; with
# `allocation: proportional` an entry gets instructions in proportion to it, and there is no other use for it.
"""


@dataclass(frozen=True)
class Metadata:
    """A use case and the skills it takes.

    Args:
        use_case: What the instruction is for, in a few words.
        skills: What it takes to answer, in a few words each, the most important first.
    """

    use_case: str
    skills: tuple[str, ...]

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What two have in common that differ in case, white space, and the order of the skills at most."""
        return _folded(self.use_case), tuple(sorted(map(_folded, self.skills)))


@dataclass(frozen=True)
class MergedMetadata:
    """Metadata that several seeds share.

    Args:
        metadata: As it was met first.
        seeds: Ids of the seeds it came from, in their order.
    """

    metadata: Metadata
    seeds: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.seeds)


def load_metadata(path: str | os.PathLike, max_skills: int | None = None) -> list[tuple[Metadata, float]]:
    """Read metadata that somebody wrote or edited.

    Args:
        path: A YAML file with a list of `use_case`, `skills` (a list) and, if wanted, `weight`; or the same as JSON,
            or as JSON lines.
        max_skills: Most skills of an entry.

    Returns:
        Metadata with weights, 1 where there is none, in the order of the file.

    Raises:
        ValueError: One line that names the file, the row (counted from 1), what is wrong with it, and the remedy.
    """
    path = Path(path)
    rows: list[tuple[Metadata, float]] = []
    places: dict[Any, int] = {}
    for number, row in enumerate(_read_rows(path), start=1):
        metadata, weight = _read_row(row, f"{path}: row {number}", max_skills)
        earlier = places.setdefault(metadata.key, number)
        if earlier != number:
            raise ValueError(
                f"{path}: rows {earlier} and {number} are the same metadata ({metadata.use_case!r}); delete one and "
                "give the other a `weight` if it should count for more"
            )
        rows.append((metadata, weight))
    if not rows:
        raise ValueError(f"{path}: there is no metadata; write a list of entries with `use_case` and `skills`")
    return rows


def write_metadata(path: str | os.PathLike, metadata: Iterable[tuple[Metadata, float] | Metadata]) -> None:
    """Write a YAML file for a person to edit; an earlier file is replaced. Weights other than 1 are written too."""
    import yaml

    rows = []
    for entry in metadata:
        entry, weight = entry if isinstance(entry, tuple) else (entry, 1)
        row: dict[str, Any] = {"use_case": entry.use_case, "skills": list(entry.skills)}
        if weight != 1:
            row["weight"] = int(weight) if weight == int(weight) else weight
        rows.append(row)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=119)
    write_atomically(path, _HEADER + "\n" + text)


def merge_metadata(pairs: Iterable[tuple[Metadata, str]]) -> list[MergedMetadata]:
    """Put equal metadata together, in the order in which each was met first.

    Args:
        pairs: Metadata, each with the id of the seed that it was made of. Case, white space and the order of skills
            make no difference.
    """
    merged: dict[Any, tuple[Metadata, list[str]]] = {}
    for metadata, seed in pairs:
        merged.setdefault(metadata.key, (metadata, []))[1].append(seed)
    return [MergedMetadata(metadata, tuple(seeds)) for metadata, seeds in merged.values()]


def allocate(counts: Sequence[float], total: int, how: Literal["equal", "proportional"]) -> list[int]:
    """How many of `total` instructions each metadata gets.

    By largest remainder; where remainders are equal, the earlier one gets more. No metadata is left without, as long
    as there are as many instructions as metadata.

    Args:
        counts: Seeds or weights of each metadata, above 0.
        total: What the numbers sum to.
        how: In equal parts, or in proportion to `counts`.

    Raises:
        ValueError: There are no counts, one is not above 0, or `how` is unknown.
    """
    if how not in ("equal", "proportional"):
        raise ValueError(f"instructions are allocated `equal` or `proportional`, not {how!r}")
    if not counts or any(not count > 0 or count == float("inf") for count in counts):
        raise ValueError(
            f"there must be metadata, each with a count above 0, to allocate to; got {list(counts)!r:.80}"
        )
    if total < 0:
        raise ValueError(f"the number of instructions must be 0 or more, got {total}")
    weights = [1.0] * len(counts) if how == "equal" else list(counts)
    numbers = _largest_remainder(weights, total)
    if total >= len(counts):
        # Those that would get none get one; the others share what is left, until nobody is left without.
        none: set[int] = set()
        while fresh := {place for place, number in enumerate(numbers) if number == 0 and place not in none}:
            none |= fresh
            rest = [0.0 if place in none else weight for place, weight in enumerate(weights)]
            numbers = _largest_remainder(rest, total - len(none))
            numbers = [1 if place in none else number for place, number in enumerate(numbers)]
    return numbers


def sample_pairings(
    metadata: Sequence[Metadata], number: int | None = None, *, max_skills: int, seed: int = 0
) -> list[Metadata]:
    """Pair use cases with skills drawn from those of all use cases.

    Args:
        metadata: Where the use cases and skills come from.
        number: How many to return: use cases are gone through again if there are fewer; default: each once.
        max_skills: Most skills. A use case gets as many as it had, if that is not more.
        seed: What the draw depends on, beside `metadata`.

    Returns:
        `number` metadata, in the order of the use cases. No skill is in one of them twice, and no two of them are the
        same, unless there are too few skills for that.
    """
    skills = {_folded(skill): skill for entry in reversed(metadata) for skill in reversed(entry.skills)}
    pool = sorted(skills.values())
    generator = random.Random(seed)
    drawn: list[Metadata] = []
    keys: set[Any] = set()
    number = len(metadata) if number is None else number
    for place in range(number if metadata else 0):
        entry = metadata[place % len(metadata)]
        size = min(len(entry.skills), max_skills, len(pool))
        for _ in range(_MOST_DRAWS):
            candidate = Metadata(entry.use_case, tuple(generator.sample(pool, size)))
            if candidate.key not in keys:
                break
        keys.add(candidate.key)
        drawn.append(candidate)
    return drawn


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    whole = sum(weights)
    quotas = [total * weight / whole for weight in weights]
    numbers = [int(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda place: (-round(quotas[place] - numbers[place], 9), place))
    for place in order[: total - sum(numbers)]:
        numbers[place] += 1
    return numbers


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path, or write one with `trl-ext codeclm metadata`")
    if path.suffix == ".jsonl":
        from ...core.runs.jsonl import read_jsonl

        return read_jsonl(path)
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())}); correct the file") from None
    if isinstance(document, dict) and list(document) == ["metadata"]:
        document = document["metadata"]
    if document is not None and not isinstance(document, list):
        raise ValueError(
            f"{path}: expected a list of entries, got {type(document).__name__}; begin each with `- use_case:`"
        )
    return document or []


def _read_row(row: Any, where: str, max_skills: int | None) -> tuple[Metadata, float]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected `use_case` and `skills`, got {row!r:.80}")
    if unknown := [key for key in row if key not in FIELDS]:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; remove it, the fields are {', '.join(FIELDS)}")
    use_case, skills, weight = row.get("use_case"), row.get("skills"), row.get("weight", 1)
    if not isinstance(use_case, str) or not use_case.strip():
        what = "empty" if use_case is None or isinstance(use_case, str) else f"{use_case!r:.40}, not text"
        raise ValueError(f"{where}: `use_case` is {what}; say in a few words what people ask for")
    where = f"{where} ({_line(use_case)!r})"
    if isinstance(skills, str):
        raise ValueError(f"{where}: `skills` is one text; write a list, such as [{skills!r:.60}]")
    if not isinstance(skills, list) or not skills:
        raise ValueError(f"{where}: there are no `skills`; name at least one that an answer takes")
    for skill in skills:
        if not isinstance(skill, str) or not skill.strip():
            raise ValueError(
                f"{where}: the skill {skill!r} is {'no text' if skill else 'empty'}; put it in quotes or remove it"
            )
    twice = [skill for place, skill in enumerate(skills) if _folded(skill) in map(_folded, skills[:place])]
    if twice:
        raise ValueError(f"{where}: the skill {twice[0]!r} is there twice; remove one")
    if max_skills is not None and len(skills) > max_skills:
        raise ValueError(f"{where}: {len(skills)} skills, but `max_skills` is {max_skills}; remove some or raise it")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"{where}: `weight` is {weight!r}; it must be a number above 0")
    return Metadata(_line(use_case), tuple(map(_line, skills))), weight


def _line(text: str) -> str:
    return " ".join(text.split())


def _folded(text: str) -> str:
    return _line(text).casefold()
