"""One step of the codec: asked, read, asked once more if it cannot be read, and rejected after that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from ...core.generation.ask import ask_client
from ...core.generation.client import CallFailed, LLMClient, Response
from ...core.generation.replies import Unreadable
from ...core.generation.types import GenerationParams, request_seed
from ..config import CodecLMConfig
from .steps import SCALE, ScoreOne, Step, again


T = TypeVar("T")

_AT_ONCE = 1024


class Rejected(Exception):  # noqa: N818 (it is a row that is)
    """What was asked twice in vain: the step, why its replies cannot be read or the call failed, and the replies as
    they came. `retryable`: the server failed rather than the reply, and another run may be luckier."""

    def __init__(self, step: str, reason: str, raw: list[str], *, retryable: bool = False):
        super().__init__(f"{step}: {reason}")
        self.step, self.reason, self.raw, self.retryable = step, reason, raw, retryable


class StepClient:
    """Asks the engines of a run, each question with a seed that follows from what it is about; `answered` is called
    with every response that has come."""

    def __init__(
        self,
        client: LLMClient,
        config: CodecLMConfig,
        seed: int,
        answered: Callable[[Response], None] = lambda response: None,
    ):
        self._client, self._config, self._seed, self._answered = client, config, seed, answered

    async def generate(self, step: Step, about: str, *, role: str = "strong", **values: Any) -> tuple[Any, bool]:
        """Ask the engine of a role.

        Args:
            about: What it is asked about, such as an id; another one is another sample.
            values: For the prompt.

        Returns:
            What the reply says, and whether the token limit cut it off.

        Raises:
            Rejected: Neither of two replies can be read, or the call failed.
            BudgetSpent, EndpointError, OSError: See `LLMClient.call`.
        """
        config, responses = self._config, []
        params = GenerationParams(
            getattr(config, step.limit),
            getattr(config, step.temperature),
            config.top_p,
            # Also where nothing is drawn: two servers may serve different models under one name
            seed=request_seed(self._seed, f"{about}/{step.name}"),
        )

        def answered(response: Response) -> None:
            responses.append(response)
            self._answered(response)

        try:
            answer = await ask_client(
                self._client, role, step.messages(**values), params, step.schema, step=step.name, finished=answered,
                read=partial(step.parse, **values), again=partial(again, step=step, folder=config.prompt_folder),
            )  # fmt: skip
        except CallFailed as error:
            raw = [response.text for response in responses]
            raise Rejected(step.name, str(error), raw, retryable=error.retryable) from None
        reason, finished = answer.reason, responses[-1].finish_reason
        if finished not in ("stop", "length"):  # a filter, or a failure behind the server: half an answer at best
            reason = f"the server ended it: {finished}"
        elif reason and finished == "length":
            reason += f"; `{step.limit}` is {params.max_new_tokens}"
        if reason:
            raise Rejected(step.name, reason, list(answer.raw))
        return answer.value, finished == "length"

    async def score(self, step: ScoreOne, **values: Any) -> float:
        """The score by the scorer's probabilities of the ten digits. Raises as `generate`, without asking again."""
        try:
            params = GenerationParams(1)
            response = await self._client.call("scorer", step.name, step.messages(**values), params, SCALE)
            self._answered(response)
            return step.expected(response.logprobs)
        except CallFailed as error:
            raise Rejected(step.name, str(error), [], retryable=error.retryable) from None
        except Unreadable as error:
            raise Rejected(step.name, str(error), []) from None


async def gather(jobs: Iterable[Callable[[], Awaitable[T]]], at_once: int = _AT_ONCE) -> list[T]:
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
            for _ in range(at_once):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[place] for place in range(len(results))]
