"""What becomes of one basic instruction: versions of it, answers to them, scores, and one that is kept, or none."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

from ..config import CodecLMConfig
from .asking import Asker, SetAside
from .filters import InstructionFilters
from .metadata import Metadata
from .start import Basic
from .steps import Answer, Evol, Rewrite, Rubric, Rubrics, Score, ScoreOne


class Chains:
    """Self-Rubrics and contrastive filtering (arXiv 2404.05875, sections 3.2 and 3.3) of basic instructions.

    Args:
        asker: Asks.
        config: How instructions are rewritten, scored and selected.
        filters: What a rewritten instruction must still be, whatever other instructions there are.
        seed: Of the run.
    """

    def __init__(self, asker: Asker, config: CodecLMConfig, filters: InstructionFilters, seed: int):
        self._asker, self._config, self._filters, self._seed = asker, config, filters, seed
        folder = config.prompt_folder
        self._rubrics, self._rewrite, self._evol = Rubrics(folder), Rewrite(folder), Evol(folder)
        self._answer, self._score, self._score_one = Answer(folder), Score(folder), ScoreOne(folder)
        self._rubrics_of: dict[Metadata, asyncio.Task[list[Rubric]]] = {}

    async def close(self) -> None:
        """Let go of rubrics that nobody waits for any more."""
        for task in self._rubrics_of.values():
            task.cancel()
        await asyncio.gather(*self._rubrics_of.values(), return_exceptions=True)

    async def follow(self, basic: Basic) -> dict[str, Any]:
        """The whole history of a basic instruction, as a row of `items.jsonl`.

        Raises:
            SetAside: A call failed, which another run may make; nothing is to be written.
            BudgetSpent, EndpointError, OSError: See `core.caller.Caller.call`.
        """
        config = self._config
        rounds: list[dict[str, Any]] = []
        item: dict[str, Any] = {
            "id": basic.id,
            "metadata": {"use_case": basic.metadata.use_case, "skills": list(basic.metadata.skills)},
            "seed": basic.seed,
            "rounds": rounds,
            "outcome": "dropped",
            "reason": None,
            "raw": None,
            "winner": None,
            "iteration": None,
            "scoring": config.scoring if config.selection == "gap" else None,
        }
        try:
            follow = self._by_gap if config.selection == "gap" else self._unscored
            item |= await follow(basic, rounds)
        except SetAside as error:
            if error.passing:
                raise
            item |= {"outcome": "set_aside", "reason": str(error), "raw": error.raw}
        return item

    async def _by_gap(self, basic: Basic, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Rewrites until the scores of the two models are further apart than the threshold."""
        instruction, action = basic.instruction, None
        for number in range(1, self._config.max_rounds + 1):
            rounds.append({"instruction": instruction, "action": action})
            await self._compare(f"{basic.id}/{number}", rounds[-1])
            gap = rounds[-1]["scores"]["gap"]
            if abs(gap) > self._config.gap_threshold:
                return {"outcome": "kept", "winner": "strong" if gap > 0 else "target", "iteration": number}
            if number < self._config.max_rounds:
                instruction, action, reason = await self._next(basic, instruction, number)
                if reason is not None:
                    rounds.append({"instruction": instruction, "action": action})
                    return {"reason": f"rewritten: {reason}"}
        return {"reason": "no gap"}

    async def _unscored(self, basic: Basic, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """A version drawn at random, or the last one, with the strong model's answer."""
        versions = self._config.max_rounds if self._config.rewrite != "none" else 1
        last = versions
        if self._config.selection == "random":
            last = random.Random(f"{self._seed}/{basic.id}/version").randint(1, versions)
        instruction, action = basic.instruction, None
        for number in range(1, last + 1):
            rounds.append({"instruction": instruction, "action": action})
            if number < last:
                instruction, action, reason = await self._next(basic, instruction, number)
                if reason is not None:
                    rounds.append({"instruction": instruction, "action": action})
                    return {"reason": f"rewritten: {reason}"}
        answer, truncated = await self._ask_for_answer("strong", f"{basic.id}/{last}", instruction)
        rounds[-1] |= {"answers": {"strong": answer}, "truncated": {"strong": truncated}}
        return {"outcome": "kept", "winner": "strong", "iteration": last}

    async def _next(self, basic: Basic, instruction: str, number: int) -> tuple[str, str, str | None]:
        """The next version, the action that led to it, and why it is of no use, if it is not."""
        about = f"{basic.id}/{number + 1}"
        draw = random.Random(f"{self._seed}/{about}/action")
        if self._config.rewrite == "evol":
            action = draw.choice(self._evol.ACTIONS)
            step, messages = self._evol, self._evol.messages(instruction, action)
        else:
            action = draw.choice(await self._rubrics_for(basic.metadata)).action
            step, messages = self._rewrite, self._rewrite.messages(basic.metadata, instruction, action)
        parse = partial(step.parse, instruction=instruction, action=action)
        rewritten = await self._asker.write(step, about, messages, parse)
        return rewritten, action, self._filters.check_alone(about, rewritten)

    async def _rubrics_for(self, metadata: Metadata) -> list[Rubric]:
        """The rubrics of metadata, asked for once."""
        task = self._rubrics_of.get(metadata)
        if task is None:
            number = self._config.num_rubrics
            task = asyncio.create_task(
                self._asker.write(
                    self._rubrics,
                    f"{metadata.use_case}/{'/'.join(metadata.skills)}",
                    self._rubrics.messages(metadata, number),
                    partial(self._rubrics.parse, number=number),
                )
            )
            self._rubrics_of[metadata] = task
        return await asyncio.shield(task)

    async def _compare(self, about: str, version: dict[str, Any]) -> None:
        """Both models' answers to a version and both orders of scores, added to its row as they come."""
        instruction = version["instruction"]
        roles = ("strong", "target")
        results = await _both(*(self._ask_for_answer(role, about, instruction) for role in roles))
        answers = {role: answer for role, (answer, _) in zip(roles, results, strict=True)}
        version["answers"] = answers
        version["truncated"] = {role: cut for role, (_, cut) in zip(roles, results, strict=True)}
        await self.score(about, version)

    async def score(self, about: str, version: dict[str, Any]) -> None:
        """Both orders of scores of a version's two answers, added to its row. Raises as `follow`."""
        instruction, answers = version["instruction"], version["answers"]
        score = self._score_by_text if self._config.scoring == "text" else self._score_by_logprobs
        one, two = await _both(
            score(f"{about}/1", instruction, answers["strong"], answers["target"]),
            score(f"{about}/2", instruction, answers["target"], answers["strong"]),
        )
        version["orders"] = [[*one], [two[1], two[0]]]
        strong, target = (one[0] + two[1]) / 2, (one[1] + two[0]) / 2
        version["scores"] = {"strong": strong, "target": target, "gap": strong - target}

    async def _ask_for_answer(self, role: str, about: str, instruction: str) -> tuple[str, bool]:
        return await self._asker.answer(
            role, self._answer, about, self._answer.messages(instruction), self._answer.parse
        )

    async def _score_by_text(self, about: str, instruction: str, first: str, second: str) -> tuple[float, float]:
        messages = self._score.messages(instruction, first, second)
        return await self._asker.score(self._score, about, messages, self._score.parse)

    async def _score_by_logprobs(self, about: str, instruction: str, first: str, second: str) -> tuple[float, float]:
        step = self._score_one
        one, two = await _both(
            self._asker.weigh(step, step.messages(instruction, first, second, "first"), step.parse),
            self._asker.weigh(step, step.messages(instruction, first, second, "second"), step.parse),
        )
        return one[0], two[0]


async def _both(*coroutines: Any) -> list[Any]:
    """Results of all, side by side; the error of the first in order that failed, once all have ended.

    Which of two errors comes first in time must not decide what is written down.
    """
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, SetAside):
            raise result
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
