"""Where a run starts: seeds and their metadata, or metadata alone, and the basic instructions decoded from them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...core.generation.client import BudgetSpent, LLMClient, ResponseCache
from ...core.generation.types import GenerationEngine
from ...core.inputs import Query, load_queries, read_rows
from ...core.runs.run import folder_lock
from ..config import CodecLMConfig
from .filters import InstructionFilters
from .metadata import Metadata, Origin, allocate, merge_metadata, write_metadata
from .steps import Decode, Encode, Propose, Rejected, StepClient, gather


SetAside = Callable[[str, Rejected], None]
"""Is told what a rejected question was about, and why."""

_PROPOSED_AT_ONCE = 10
_WAVES = 3


def load_seeds(source: str | os.PathLike, column: str | None = None, limit: int | None = None) -> list[Query]:
    """Seed instructions, the examples of a user's requests: as `core.inputs.load_queries`, with the column
    `instruction` before others, and chats with their first turn of the user."""
    if column is None and "instruction" in next(read_rows(source), {}):
        column = "instruction"
    return load_queries(source, column=column, limit=limit)


# Metadata


async def encode_seeds(
    client: StepClient, config: CodecLMConfig, seeds: Sequence[Query], set_aside: SetAside
) -> list[Origin]:
    """The metadata of seeds, equal ones merged. Raises `ValueError` if not one seed could be encoded."""
    step = Encode(config.prompt_folder)

    async def encode(seed: Query) -> Metadata | None:
        try:
            return (await client.generate(step, seed.id, instruction=seed.text, max_skills=config.max_skills))[0]
        except Rejected as error:
            set_aside(seed.id, error)
            return None

    found = await gather(partial(encode, seed) for seed in seeds)
    pairs = [(metadata, seed.text) for metadata, seed in zip(found, seeds, strict=True) if metadata is not None]
    if not pairs:
        raise ValueError(
            f"not one of {len(seeds)} seeds could be encoded into metadata (see set_aside.jsonl): the strong model is "
            "too weak for it, or the endpoint fails; write the metadata yourself and give them as `metadata`."
        )
    return merge_metadata(pairs)


def make_metadata(
    engine: GenerationEngine,
    config: CodecLMConfig,
    output: str | os.PathLike,
    *,
    description: str | None = None,
    number: int = 20,
    seed: int = 42,
) -> tuple[int, int]:
    """Write a YAML file of metadata; calls are kept beside it, and none is made twice.

    Args:
        engine: The strong model.
        config: `seeds`, where there is no description, and how models are asked.
        output: The file; it must not exist.
        description, number: What the instructions should be like, and how many metadata to propose for that.
        seed: Of the calls.

    Returns:
        How many were written, and how many replies could not be read.

    Raises:
        ValueError: The file exists, there is nothing to start from, or no reply could be read.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already, perhaps edited: give another `output`, or delete it.")
    if not description and not config.seeds:
        raise ValueError("nothing to start from: give a `description` of the instructions, or `seeds`.")
    rejected: list[Rejected] = []

    async def make() -> list[Origin]:
        limits = {"max_calls": config.max_calls, "max_tokens": config.max_tokens}
        with ResponseCache(output.with_name(f"{output.stem}.calls.sqlite")) as cache:
            async with LLMClient({"strong": engine}, cache, **limits) as llm:
                client = StepClient(llm, config, seed)
                if description:
                    return await _propose(client, config, description, number, rejected)
                seeds = load_seeds(config.seeds, config.seed_column, config.num_seeds)
                return await encode_seeds(client, config, seeds, lambda about, error: rejected.append(error))

    with folder_lock(output.parent):
        try:
            found = asyncio.run(make())
        except BudgetSpent as error:
            raise ValueError(f"{error} before all was asked; the same command with a larger one goes on.") from None
        if failed := [error for error in rejected if error.retryable]:
            raise ValueError(
                f"{len(failed)} calls have failed, the last one: {failed[-1]}; the same command makes them again."
            )
        write_metadata(output, found)
    return len(found), len(rejected)


async def _propose(
    client: StepClient, config: CodecLMConfig, description: str, number: int, rejected: list[Rejected]
) -> list[Origin]:
    step, size = Propose(config.prompt_folder), min(number, _PROPOSED_AT_ONCE)

    async def ask(about: str) -> list[Metadata]:
        try:
            values = {"description": description, "number": size, "max_skills": config.max_skills}
            return (await client.generate(step, about, **values))[0]
        except Rejected as error:
            rejected.append(error)
            return []

    found: list[Metadata] = []
    for wave in range(_WAVES):
        calls = -(-(number - len(found)) // _PROPOSED_AT_ONCE)
        lists = await gather(partial(ask, f"w{wave}/{call}") for call in range(calls))
        pairs = [(metadata, "") for metadata in [*found, *(own for some in lists for own in some)]]
        found = [merged.metadata for merged in merge_metadata(pairs)][:number]
        if len(found) == number:
            break
    if not found:
        raise ValueError(
            f"no metadata could be read out of {len(rejected)} replies: the strong model is too weak for it; write "
            "the file yourself, see the docs."
        )
    return [Origin(metadata) for metadata in found]


# Basic instructions


@dataclass(frozen=True)
class BasicInstruction:
    """A basic instruction: its id `m<metadata>-i<number>`, what it was decoded from, a seed with that metadata, where
    there are any, and its text."""

    id: str
    metadata: Metadata
    seed: str | None
    instruction: str


@dataclass(frozen=True)
class Basics:
    """Basic instructions in the order of their origins, how many were asked for of each origin, and how many were
    dropped, by reason."""

    made: list[BasicInstruction]
    asked: list[int]
    drops: Counter[str]


async def decode_basics(
    client: StepClient,
    config: CodecLMConfig,
    origins: Sequence[Origin],
    filters: InstructionFilters,
    set_aside: SetAside,
) -> Basics:
    """Decode metadata until there are as many basic instructions as asked for, or three waves have not made them.

    Replies are filtered in a fixed order, so that the same answers give the same rows. After calls that failed, which
    another run may make, what would follow from the others is not begun.
    """
    step, drops, failed = Decode(config.prompt_folder), Counter(), []
    asked = allocate([origin.weight for origin in origins], config.num_instructions, config.allocation)
    made: list[list[BasicInstruction]] = [[] for _ in origins]

    async def decode(place: int, about: str, number: int) -> list[str]:
        try:
            return (await client.generate(step, about, number=number, **origins[place].metadata.as_json()))[0]
        except Rejected as error:
            failed.extend([error] if error.retryable else [])
            set_aside(about, error)
            return []

    for wave in range(_WAVES):
        calls = [
            (place, f"m{place:03d}/w{wave}/{number}", size)
            for place, wanted in enumerate(asked)
            for number, size in enumerate(_portions(wanted - len(made[place]), config.instructions_per_call))
        ]
        lists = await gather(partial(decode, *call) for call in calls)
        if failed:
            break
        for (place, _, _), instructions in zip(calls, lists, strict=True):
            origin, own = origins[place], made[place]
            for instruction in instructions:
                id = f"m{place:03d}-i{len(own):04d}"
                if reason := filters.check(id, instruction):
                    drops[reason] += 1
                    continue
                seed = origin.seeds[len(own) % len(origin.seeds)] if origin.seeds else None
                own.append(BasicInstruction(id, origin.metadata, seed, instruction))
    return Basics([basic for own in made for basic in own], asked, drops)


def _portions(total: int, size: int) -> list[int]:
    full, rest = divmod(total, size)
    return [size] * full + [rest] * bool(rest)
