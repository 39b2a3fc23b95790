"""One question of the codec: asked, read, asked once more if it cannot be read, and set aside after that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ...core.generation.client import Caller, CallFailed
from ...core.generation.replies import Unreadable
from ...core.generation.types import GenerationParams, request_seed
from ...core.judge.replies import SCALE
from ..config import CodecLMConfig
from .steps import Messages, again


_RETRY_TEMPERATURE = 0.7


class SetAside(Exception):  # noqa: N818 (it is a row that is)
    """What was asked twice in vain.

    Args:
        step: Name of the step.
        reason: Why its replies cannot be read, or the call failed.
        raw: The replies, as they came.
        passing: The server failed rather than the reply: another run may be luckier.
    """

    def __init__(self, step: str, reason: str, raw: list[str], *, passing: bool = False):
        super().__init__(f"{step}: {reason}")
        self.step, self.reason, self.raw, self.passing = step, reason, raw, passing


class Step(Protocol):
    """What is asked and how it is called."""

    name: str


class Asker:
    """Asks the engines of a run, each question with a seed that follows from what it is about.

    Args:
        caller: Makes the calls.
        config: Temperatures, limits and the user's prompts.
        seed: Of the run.
        heard: Called whenever an answer has come.
    """

    def __init__(self, caller: Caller, config: CodecLMConfig, seed: int, heard: Callable[[], None] = lambda: None):
        self._caller = caller
        self._heard = heard
        self._config = config
        self._seed = seed

    async def write(self, step: Step, about: str, messages: Messages, parse: Callable[..., Any]) -> Any:
        """What the strong model writes, but answers.

        Args:
            step: Whose question it is.
            about: What it is asked about, such as an id; another one is another sample.
            messages: The question.
            parse: From the text of the reply and `truncated=` to the result; raises `Unreadable`.

        Raises:
            SetAside: Neither of two replies can be read, or the call failed.
            BudgetSpent, EndpointError, OSError: See `Caller.call`.
        """
        config = self._config
        params = self._params(config.max_new_tokens, config.temperature)
        return (await self._ask("strong", step, about, messages, params, parse))[0]

    async def answer(self, role: str, step: Step, about: str, messages: Messages, parse: Callable[..., Any]) -> Any:
        """The answer of the strong or the target model, and whether it was cut off. Raises as `write`."""
        config = self._config
        params = self._params(config.max_answer_tokens, config.answer_temperature)
        return await self._ask(role, step, f"{about}/{role}", messages, params, parse)

    async def score(self, step: Step, about: str, messages: Messages, parse: Callable[..., Any]) -> Any:
        """What the scorer writes. Raises as `write`."""
        config = self._config
        params = self._params(config.max_score_tokens, config.score_temperature)
        return (await self._ask("scorer", step, about, messages, params, parse))[0]

    async def weigh(self, step: Step, messages: Messages, parse: Callable[..., Any]) -> Any:
        """What the scorer's probabilities of the ten digits say. Raises as `write`; there is nothing to ask again."""
        try:
            reply = await self._caller.call("scorer", step.name, messages, GenerationParams(1), SCALE)
            self._heard()
            return parse(reply.logprobs)
        except CallFailed as error:
            raise SetAside(step.name, str(error), [], passing=error.passing) from None
        except Unreadable as error:
            raise SetAside(step.name, str(error), []) from None

    async def _ask(
        self,
        role: str,
        step: Step,
        about: str,
        messages: Messages,
        params: Callable[[str, bool], GenerationParams],
        parse: Callable[..., Any],
    ) -> tuple[Any, bool]:
        raw: list[str] = []
        question, name = messages, step.name
        while True:
            try:
                reply = await self._caller.call(role, name, question, params(f"{about}/{name}", bool(raw)))
            except CallFailed as error:
                raise SetAside(step.name, str(error), raw, passing=error.passing) from None
            self._heard()
            truncated = reply.finish_reason == "length"
            try:
                return parse(reply.text, truncated=truncated), truncated
            except Unreadable as error:
                raw.append(reply.text)
                if len(raw) == 2:
                    raise SetAside(step.name, str(error), raw) from None
                question = again(messages, reply.text, error, self._config.prompt_folder)
                name = f"{step.name}:again"

    def _params(self, max_new_tokens: int, temperature: float) -> Callable[[str, bool], GenerationParams]:
        def params(name: str, retry: bool) -> GenerationParams:
            own = max(temperature, _RETRY_TEMPERATURE) if retry else temperature
            # Also where nothing is drawn: two servers may serve different models under one name
            return GenerationParams(max_new_tokens, own, self._config.top_p, seed=request_seed(self._seed, name))

        return params
