"""What becomes of one basic instruction: versions of it, answers to them, scores, and one that is kept, or none."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from ..config import CodecLMConfig
from .client import Rejected, StepClient
from .filters import InstructionFilters
from .metadata import Metadata
from .seeds import BasicInstruction
from .steps import ACTIONS, Answer, Evol, Rewrite, Rubric, Rubrics, Score, ScoreOne


class Pipeline:
    """Self-Rubrics and contrastive filtering (arXiv 2404.05875, sections 3.2 and 3.3) of basic instructions; `filters`
    say what a rewritten instruction must still be, whatever other instructions there are."""

    def __init__(self, client: StepClient, config: CodecLMConfig, filters: InstructionFilters, seed: int):
        self._client, self._config, self._filters, self._seed = client, config, filters, seed
        folder = config.prompt_folder
        self._rubrics, self._rewrite, self._evol = Rubrics(folder), Rewrite(folder), Evol(folder)
        self._answer, self._score, self._score_one = Answer(folder), Score(folder), ScoreOne(folder)
        self._rubrics_of: dict[Metadata, asyncio.Task[list[Rubric]]] = {}

    async def close(self) -> None:
        """Let go of rubrics that nobody waits for any more."""
        for task in self._rubrics_of.values():
            task.cancel()
        await asyncio.gather(*self._rubrics_of.values(), return_exceptions=True)

    async def run_item(self, basic: BasicInstruction) -> dict[str, Any]:
        """The whole history of a basic instruction, as a row of `items.jsonl`. Raises `Rejected` if a call failed that
        another run may make: then nothing is to be written."""
        by_gap = self._config.selection == "gap"
        rounds: list[dict[str, Any]] = []
        item: dict[str, Any] = {
            "id": basic.id,
            "metadata": basic.metadata.as_json(),
            "seed": basic.seed,
            "rounds": rounds,
            "outcome": "dropped",
            "reason": None,
            "raw": None,
            "winner": None,
            "iteration": None,
            "scoring": self._config.scoring if by_gap else None,
        }
        try:
            item |= await (self._by_gap if by_gap else self._unscored)(basic, rounds)
        except Rejected as error:
            if error.retryable:
                raise
            item |= {"outcome": "set_aside", "reason": str(error), "raw": error.raw}
        return item

    async def _by_gap(self, basic: BasicInstruction, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Rewrites until the scores of the two models are further apart than the threshold."""
        rounds.append({"instruction": basic.instruction, "action": None})
        for number in range(1, self._config.max_rounds + 1):
            await self._compare(f"{basic.id}/{number}", rounds[-1])
            gap = rounds[-1]["scores"]["gap"]
            if abs(gap) > self._config.gap_threshold:
                return {"outcome": "kept", "winner": "strong" if gap > 0 else "target", "iteration": number}
            if number < self._config.max_rounds and (reason := await self._rewrite_last(basic, rounds)):
                return {"reason": f"rewritten: {reason}"}
        return {"reason": "no gap"}

    async def _unscored(self, basic: BasicInstruction, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """A version drawn at random, or the last one, with the strong model's answer."""
        last = self._config.max_rounds if self._config.rewrite != "none" else 1
        if self._config.selection == "random":
            last = random.Random(f"{self._seed}/{basic.id}/version").randint(1, last)
        rounds.append({"instruction": basic.instruction, "action": None})
        while len(rounds) < last:
            if reason := await self._rewrite_last(basic, rounds):
                return {"reason": f"rewritten: {reason}"}
        answer, truncated = await self._answer_of("strong", f"{basic.id}/{last}", rounds[-1])
        rounds[-1] |= {"answers": {"strong": answer}, "truncated": {"strong": truncated}}
        return {"outcome": "kept", "winner": "strong", "iteration": last}

    async def _rewrite_last(self, basic: BasicInstruction, rounds: list[dict[str, Any]]) -> str | None:
        """Add the next version with the action that led to it; says why it is of no use, if it is not."""
        about, instruction = f"{basic.id}/{len(rounds) + 1}", rounds[-1]["instruction"]
        draw = random.Random(f"{self._seed}/{about}/action")
        values = {"instruction": instruction}
        if self._config.rewrite == "evol":
            step, action = self._evol, draw.choice(ACTIONS)
        else:
            step, action = self._rewrite, draw.choice(await self._rubrics_for(basic.metadata)).action
            values |= basic.metadata.as_json()
        rewritten, _ = await self._client.generate(step, about, action=action, **values)
        rounds.append({"instruction": rewritten, "action": action})
        return self._filters.check_alone(about, rewritten)

    async def _rubrics_for(self, metadata: Metadata) -> list[Rubric]:
        """The rubrics of metadata, asked for once."""
        if metadata not in self._rubrics_of:
            about = f"{metadata.use_case}/{'/'.join(metadata.skills)}"
            values = metadata.as_json() | {"number": self._config.num_rubrics}
            ask = self._client.generate(self._rubrics, about, **values)
            self._rubrics_of[metadata] = asyncio.create_task(ask)
        return (await asyncio.shield(self._rubrics_of[metadata]))[0]

    async def _compare(self, about: str, version: dict[str, Any]) -> None:
        """Both models' answers to a version and both orders of scores, added to its row as they come."""
        roles = ("strong", "target")
        results = dict(
            zip(roles, await _both(*(self._answer_of(role, about, version) for role in roles)), strict=True)
        )
        version["answers"] = {role: answer for role, (answer, _) in results.items()}
        version["truncated"] = {role: cut for role, (_, cut) in results.items()}
        await self.score(about, version)

    async def _answer_of(self, role: str, about: str, version: dict[str, Any]) -> tuple[str, bool]:
        return await self._client.generate(
            self._answer, f"{about}/{role}", role=role, instruction=version["instruction"]
        )

    async def score(self, about: str, version: dict[str, Any]) -> None:
        """Both orders of scores of a version's two answers, added to its row. Raises as `run_item`."""
        strong, target = version["answers"]["strong"], version["answers"]["target"]
        one, two = await _both(
            self._scores(f"{about}/1", instruction=version["instruction"], first=strong, second=target),
            self._scores(f"{about}/2", instruction=version["instruction"], first=target, second=strong),
        )
        version["orders"] = [[*one], [two[1], two[0]]]
        strong, target = (one[0] + two[1]) / 2, (one[1] + two[0]) / 2
        version["scores"] = {"strong": strong, "target": target, "gap": strong - target}

    async def _scores(self, about: str, **values: str) -> tuple[float, float]:
        if self._config.scoring == "text":
            return (await self._client.generate(self._score, about, role="scorer", **values))[0]
        step = self._score_one
        one, two = await _both(*(self._client.score(step, which=which, **values) for which in ("first", "second")))
        return one, two


async def _both(*coroutines: Any) -> list[Any]:
    """Results of all, side by side; the error of the first in order that failed, once all have ended.

    Which of two errors comes first in time must not decide what is written down.
    """
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, Rejected)):
        raise error
    return results
