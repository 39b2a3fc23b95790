"""Where a run starts from: metadata of seeds, or written by the user, and the basic instructions decoded from them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..config import CodecLMConfig
from .asking import Asker, SetAside
from .filters import InstructionFilters
from .metadata import Metadata, allocate, merge_metadata, sample_pairings
from .seeds import Seed
from .steps import Decode, Encode


T = TypeVar("T")

_WAVES = 3
_AT_ONCE = 1024


@dataclass(frozen=True)
class Basic:
    """A basic instruction.

    Args:
        id: `m<metadata>-i<number>`.
        metadata: What it was decoded from.
        seed: A seed with that metadata, where there are any.
        instruction: Its text.
    """

    id: str
    metadata: Metadata
    seed: str | None
    instruction: str


@dataclass(frozen=True)
class Origin:
    """Metadata to decode, how much weight it has, and the seeds it comes from."""

    metadata: Metadata
    weight: float
    seeds: tuple[str, ...] = ()


async def encode_seeds(
    asker: Asker, step: Encode, seeds: Sequence[Seed], set_aside: Callable[[str, SetAside], None]
) -> list[Origin]:
    """The metadata of seeds, equal ones merged.

    Args:
        asker: Asks.
        step: How.
        seeds: What is encoded.
        set_aside: Called with the id of each seed whose metadata cannot be read, and why.

    Raises:
        ValueError: Not one seed could be encoded.
    """

    async def encode(seed: Seed) -> Metadata | None:
        try:
            return await asker.write(step, seed.id, step.messages(seed.text), step.parse)
        except SetAside as error:
            set_aside(seed.id, error)
            return None

    found = await gather(partial(encode, seed) for seed in seeds)
    pairs = [(metadata, seed.text) for metadata, seed in zip(found, seeds, strict=True) if metadata is not None]
    if not pairs:
        raise ValueError(
            f"not one of {len(seeds)} seeds could be encoded into metadata (see set_aside.jsonl): the strong model is "
            "too weak for it, or the endpoint fails; write the metadata yourself and give them as `metadata`."
        )
    return [Origin(merged.metadata, float(merged.count), tuple(merged.seeds)) for merged in merge_metadata(pairs)]


def pair(origins: Sequence[Origin], config: CodecLMConfig, seed: int) -> list[Origin]:
    """The origins as they are, or with skills drawn from all skills."""
    if config.pairing == "encoded":
        return list(origins)
    drawn = sample_pairings([origin.metadata for origin in origins], max_skills=config.max_skills, seed=seed)
    return [Origin(own, origin.weight, origin.seeds) for own, origin in zip(drawn, origins, strict=True)]


class BasicInstructions:
    """Decodes metadata until there are as many basic instructions as asked for, or three waves have not made them.

    Args:
        asker: Asks.
        step: How.
        config: How many, and how they are spread.
        filters: What is dropped at once; looked at in a fixed order, so that the same answers give the same rows.
        set_aside: Called with the id of each call whose reply cannot be read, and why.

    Attributes:
        drops: Instructions dropped, by reason.
        asked: Instructions wanted of each origin.
        failed: Calls that failed, which another run may make. What would follow from the others is not begun.
    """

    def __init__(
        self,
        asker: Asker,
        step: Decode,
        config: CodecLMConfig,
        filters: InstructionFilters,
        set_aside: Callable[[str, SetAside], None],
    ):
        self._asker, self._step, self._config = asker, step, config
        self._filters, self._set_aside = filters, set_aside
        self.drops: Counter[str] = Counter()
        self.asked: list[int] = []
        self.failed = 0

    async def make(self, origins: Sequence[Origin]) -> list[Basic]:
        """The basic instructions, in the order of the origins."""
        weights = [origin.weight for origin in origins]
        self.asked = allocate(weights, self._config.num_instructions, self._config.allocation)
        made: list[list[Basic]] = [[] for _ in origins]
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
            return await self._asker.write(
                self._step, about, self._step.messages(metadata, number), partial(self._step.parse, number=number)
            )
        except SetAside as error:
            self.failed += error.passing
            self._set_aside(about, error)
            return []

    def _take(self, place: int, origin: Origin, instruction: str, made: list[Basic]) -> None:
        if len(made) == self.asked[place]:
            return
        name = f"m{place:03d}-i{len(made):04d}"
        reason = self._filters.check(name, instruction)
        if reason is not None:
            self.drops[reason] += 1
            return
        seed = origin.seeds[len(made) % len(origin.seeds)] if origin.seeds else None
        made.append(Basic(name, origin.metadata, seed, instruction))


def _portions(total: int, size: int) -> list[int]:
    full, rest = divmod(max(total, 0), size)
    return [size] * full + [rest] * bool(rest)


async def gather(jobs: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Results in order, a bounded number of jobs at once; the first error ends them all.

    As errors of one's own making are caught with `except`, not `except*`, the group's first one is raised by itself.
    """
    waiting = enumerate(jobs)
    results: dict[int, Any] = {}

    async def work() -> None:
        for place, job in waiting:
            results[place] = await job()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[place] for place in range(len(results))]
