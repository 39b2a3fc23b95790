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
from .client import Rejected, StepClient, gather
from .filters import InstructionFilters
from .metadata import Metadata, Origin, allocate, merge_metadata, write_metadata
from .steps import Decode, Encode, Propose


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
    """Write a YAML file of metadata; calls are logged beside it, and none is made twice.

    Args:
        engine: The strong model.
        config: `seeds`, where there is no description, and how models are asked.
        output: The file; it must not exist.
        description: What the instructions should be like.
        number: How many to propose for a description.
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


class BasicInstructions:
    """Decodes metadata until there are as many basic instructions as asked for, or three waves have not made them.

    Args:
        client: Asks.
        config: How many, and how they are spread.
        filters: What is dropped at once; looked at in a fixed order, so that the same answers give the same rows.
        set_aside: Called with the id of each call whose reply cannot be read, and why.

    Attributes:
        drops: Instructions dropped, by reason.
        asked: Instructions wanted of each origin.
        failed: Calls that failed, which another run may make. What would follow from the others is not begun.
    """

    def __init__(self, client: StepClient, config: CodecLMConfig, filters: InstructionFilters, set_aside: SetAside):
        self._client, self._config, self._filters, self._set_aside = client, config, filters, set_aside
        self._step = Decode(config.prompt_folder)
        self.drops: Counter[str] = Counter()
        self.asked: list[int] = []
        self.failed = 0

    async def make(self, origins: Sequence[Origin]) -> list[BasicInstruction]:
        """The basic instructions, in the order of the origins."""
        weights = [origin.weight for origin in origins]
        self.asked = allocate(weights, self._config.num_instructions, self._config.allocation)
        made: list[list[BasicInstruction]] = [[] for _ in origins]
        for wave in range(_WAVES):
            calls = [
                (place, f"m{place:03d}/w{wave}/{number}", size)
                for place, wanted in enumerate(self.asked)
                for number, size in enumerate(_portions(wanted - len(made[place]), self._config.instructions_per_call))
            ]
            lists = await gather(partial(self._decode, origins[place].metadata, *call) for place, *call in calls)
            if self.failed:
                break
            for (place, _, _), instructions in zip(calls, lists, strict=True):
                for instruction in instructions:
                    self._take(place, origins[place], instruction, made[place])
        return [basic for own in made for basic in own]

    async def _decode(self, metadata: Metadata, about: str, number: int) -> list[str]:
        try:
            return (await self._client.generate(self._step, about, number=number, **metadata.as_json()))[0]
        except Rejected as error:
            self.failed += error.retryable
            self._set_aside(about, error)
            return []

    def _take(self, place: int, origin: Origin, instruction: str, made: list[BasicInstruction]) -> None:
        if len(made) == self.asked[place]:
            return
        name = f"m{place:03d}-i{len(made):04d}"
        reason = self._filters.check(name, instruction)
        if reason is not None:
            self.drops[reason] += 1
            return
        seed = origin.seeds[len(made) % len(origin.seeds)] if origin.seeds else None
        made.append(BasicInstruction(name, origin.metadata, seed, instruction))


def _portions(total: int, size: int) -> list[int]:
    full, rest = divmod(max(total, 0), size)
    return [size] * full + [rest] * bool(rest)
