"""Metadata for a person to edit: of seeds, or proposed for a description of what is wanted."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from ...core.generation.calls import CallLog
from ...core.generation.client import BudgetSpent, Caller
from ...core.generation.types import GenerationEngine
from ..config import CodecLMConfig
from .asking import Asker, SetAside
from .metadata import Metadata, merge_metadata, write_metadata
from .seeds import load_seeds
from .start import encode_seeds, gather
from .steps import Encode, Propose


_AT_ONCE = 10
_WAVES = 3


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
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output.with_name(f"{output.stem}.lock"), timeout=0):
            found, unread = asyncio.run(_make(engine, config, output, description, number, seed))
            write_metadata(output, found)
    except Timeout:
        raise ValueError(
            f"{output} is being written by another process: wait for it, or give another `output`."
        ) from None
    except BudgetSpent as error:
        raise ValueError(f"{error} before all was asked; the same command with a larger one goes on.") from None
    return len(found), unread


async def _make(engine, config, output, description, number, seed) -> tuple[list[tuple[Metadata, float]], int]:
    aside: list[SetAside] = []
    limits = {"max_calls": config.max_calls, "max_tokens": config.max_tokens}
    with CallLog(output.with_name(f"{output.stem}.calls.jsonl")) as log:
        async with Caller({"strong": engine}, log, **limits) as caller:
            asker = Asker(caller, config, seed)
            if not description:
                seeds = load_seeds(config.seeds, config.seed_column, config.num_seeds)
                step = Encode(config.prompt_folder, max_skills=config.max_skills)
                origins = await encode_seeds(asker, step, seeds, lambda about, error: aside.append(error))
                found = [(origin.metadata, origin.weight) for origin in origins]
            else:
                found = await _propose(asker, config, description, number, aside)
    if failed := sum(error.passing for error in aside):
        raise ValueError(f"{failed} calls have failed, the last one: {aside[-1]}; the same command makes them again.")
    return found, len(aside)


async def _propose(
    asker: Asker, config: CodecLMConfig, description: str, number: int, aside: list[SetAside]
) -> list[tuple[Metadata, float]]:
    step = Propose(config.prompt_folder, max_skills=config.max_skills)

    async def ask(about: str, size: int) -> list[Metadata]:
        try:
            messages = step.messages(description, size)
            return await asker.write(step, about, messages, partial(step.parse, number=size))
        except SetAside as error:
            aside.append(error)
            return []

    found: list[Metadata] = []
    for wave in range(_WAVES):
        calls = -(-(number - len(found)) // _AT_ONCE)
        lists = await gather(partial(ask, f"w{wave}/{call}", min(number, _AT_ONCE)) for call in range(calls))
        pairs = [(metadata, "") for metadata in [*found, *(own for some in lists for own in some)]]
        found = [merged.metadata for merged in merge_metadata(pairs)][:number]
        if len(found) == number:
            break
    if not found:
        raise ValueError(
            f"no metadata could be read out of {len(aside)} replies: the strong model is too weak for it; write the "
            "file yourself, see the docs."
        )
    return [(metadata, 1.0) for metadata in found]
