"""Where a run starts: seeds and their metadata, or metadata alone, and the basic instructions decoded from them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.generation.client import BudgetSpent, LLMClient, ResponseCache
from ...core.generation.types import GenerationEngine
from ...core.inputs import Query, Source, load_queries, load_rows
from ...core.runs.run import folder_lock
from ..config import CodecLMConfig
from .filters import InstructionFilters
from .metadata import Metadata, Origin, allocate, merge_metadata, write_metadata
from .steps import Decode, Encode, Propose, Rejected, Step, StepClient, gather


SetAside = Callable[[str, Rejected], None]
"""Is told what a rejected question was about, and why."""

NO_METADATA = "no metadata could be read out of the replies: the model is too weak; write the `metadata` yourself"
_PROPOSED_AT_ONCE = 10
_WAVES = 3


def load_seeds(source: Source, column: str | None = None, limit: int | None = None, **options: Any) -> list[Query]:
    """Seed instructions, as `core.inputs.load_queries`, with the column `instruction` before others."""
    rows = load_rows(source, options.get("split", "train"))
    if column is None and len(rows) and "instruction" in rows[0]:
        column = "instruction"
    return load_queries(source, column=column, limit=limit, **options)


def seeds_of(config: CodecLMConfig) -> list[Query]:
    """The seeds a configuration names."""
    options = {"pattern": config.prompt_pattern, "split": config.prompt_split}
    return load_seeds(config.prompts or "", config.prompt_column, config.num_prompts, **options)


def _asking(
    client: StepClient, step: Step, about: str, set_aside: SetAside, **values: Any
) -> Callable[[], Awaitable[Any]]:
    """A job for `gather`: what the strong model says, or None where that is rejected."""

    async def ask() -> Any:
        try:
            return (await client.generate(step, about, **values))[0]
        except Rejected as error:
            set_aside(about, error)
            return None

    return ask


async def encode_seeds(
    client: StepClient, config: CodecLMConfig, seeds: Sequence[Query], set_aside: SetAside
) -> list[Origin]:
    """The metadata of seeds, equal ones merged; none if not one seed could be encoded."""
    step, size = Encode(config.prompt_folder), config.max_skills
    found: list[Metadata | None] = await gather(
        _asking(client, step, seed.id, set_aside, instruction=seed.text, max_skills=size) for seed in seeds
    )
    pairs = [(metadata, seed.text) for metadata, seed in zip(found, seeds, strict=True) if metadata is not None]
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
    """Write a YAML file of metadata, of the seeds of `config` or proposed for a description by the strong model, to
    `output`, which must not exist; calls are kept beside it, and none is made twice. Returns how many were written,
    and how many replies could not be read.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already, perhaps edited: give another `output`, or delete it.")
    if not description and not config.prompts:
        raise ValueError("nothing to start from: give a `description` of the instructions, or `prompts`.")
    rejected: list[Rejected] = []

    def set_aside(about: str, error: Rejected) -> None:
        rejected.append(error)

    async def make() -> list[Origin]:
        limits: dict[str, Any] = {"max_calls": config.max_calls, "max_tokens": config.max_tokens}
        with ResponseCache(output.with_name(f"{output.stem}.calls.sqlite")) as cache:
            async with LLMClient({"strong": engine}, cache, **limits) as llm:
                client = StepClient(llm, config, seed)
                if description:
                    return await _propose(client, config, description, number, set_aside)
                return await encode_seeds(client, config, seeds_of(config), set_aside)

    with folder_lock(output.parent):
        try:
            found = asyncio.run(make())
        except BudgetSpent as error:
            raise ValueError(f"{error} before all was asked; the same command with a larger one goes on.") from None
        if failed := [error for error in rejected if error.retryable]:
            raise ValueError(f"{len(failed)} calls failed, at last: {failed[-1]}; the same command makes them again.")
        if not found:
            raise ValueError(NO_METADATA)
        write_metadata(output, found)
    return len(found), len(rejected)


async def _propose(
    client: StepClient, config: CodecLMConfig, description: str, number: int, set_aside: SetAside
) -> list[Origin]:
    step, found = Propose(config.prompt_folder), list[Metadata]()
    values: dict[str, Any] = {"description": description, "max_skills": config.max_skills}
    values["number"] = min(number, _PROPOSED_AT_ONCE)
    for wave in range(_WAVES):
        calls = -(-(number - len(found)) // _PROPOSED_AT_ONCE)
        lists = await gather(_asking(client, step, f"w{wave}/{call}", set_aside, **values) for call in range(calls))
        pairs = [(metadata, "") for metadata in [*found, *(own for some in lists for own in some or ())]]
        found = [merged.metadata for merged in merge_metadata(pairs)][:number]
        if len(found) == number:
            break
    return [Origin(metadata) for metadata in found]


@dataclass(frozen=True)
class BasicInstruction:
    """A basic instruction: its id `m<metadata>-i<number>`, what it was decoded from, a seed with that metadata, where
    there are any, and its text."""

    id: str
    metadata: Metadata
    seed: str | None
    instruction: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> BasicInstruction:
        metadata = Metadata(row["metadata"]["use_case"], tuple(row["metadata"]["skills"]))
        return cls(row["id"], metadata, row["seed"], row["instruction"])

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"metadata": self.metadata.as_json()}


async def decode_basics(
    client: StepClient,
    config: CodecLMConfig,
    origins: Sequence[Origin],
    filters: InstructionFilters,
    set_aside: SetAside,
) -> tuple[list[BasicInstruction], list[int], Counter[str]]:
    """Decode metadata until there are as many basic instructions as asked for, or three waves have not made them.

    Returns them, how many were asked for of each origin, and how many were dropped, by reason. Replies are filtered in
    a fixed order, so that the same answers give the same rows. After calls that failed, which another run may make,
    what would follow from the others is not begun.
    """
    step, drops, failed = Decode(config.prompt_folder), Counter[str](), list[Rejected]()
    asked = allocate([origin.weight for origin in origins], config.num_instructions, config.allocation)
    made: list[list[BasicInstruction]] = [[] for _ in origins]

    def rejected(about: str, error: Rejected) -> None:
        failed.extend([error] if error.retryable else [])
        set_aside(about, error)

    def job(place: int, about: str, number: int) -> Callable[[], Awaitable[list[str] | None]]:
        return _asking(client, step, about, rejected, number=number, **origins[place].metadata.as_json())

    for wave in range(_WAVES):
        calls = [
            (place, f"m{place:03d}/w{wave}/{number}", size)
            for place, wanted in enumerate(asked)
            for number, size in enumerate(_portions(wanted - len(made[place]), config.instructions_per_call))
        ]
        lists = await gather(job(*call) for call in calls)
        if failed:
            break
        for (place, _, _), instructions in zip(calls, lists, strict=True):
            origin, own = origins[place], made[place]
            for instruction in instructions or ():
                id = f"m{place:03d}-i{len(own):04d}"
                if reason := filters.check(id, instruction):
                    drops[reason] += 1
                    continue
                seed = origin.seeds[len(own) % len(origin.seeds)] if origin.seeds else None
                own.append(BasicInstruction(id, origin.metadata, seed, instruction))
    return [basic for own in made for basic in own], asked, drops


def _portions(total: int, size: int) -> list[int]:
    full, rest = divmod(total, size)
    return [size] * full + [rest] * bool(rest)
