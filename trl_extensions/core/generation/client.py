"""Many calls of language models at once: bounded per engine, logged, within a budget, none made twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType

from .calls import Call, CallLog, Reply
from .lanes import EndpointLane, LocalLane
from .types import GenerationEngine, GenerationParams, Prompt


_IN_A_ROW = 10
_LOCAL_AT_ONCE = 64  # within a budget of tokens
_PULSE = 0.5  # seconds
_WRONG_FOR_ALL = (401, 403, 404)


class BudgetSpent(Exception):  # noqa: N818 (nothing went wrong)
    """The next call would exceed a budget; what was made is on disk."""


class CallFailed(Exception):  # noqa: N818 (it is the call that did)
    """One call failed for good, others need not; the message is one line.

    Args:
        message: What happened.
        passing: Another time the same call may succeed: the server kept failing, rather than refused it.
    """

    def __init__(self, message: str, *, passing: bool):
        super().__init__(message)
        self.passing = passing


@dataclass
class Usage:
    """What was called since the caller was made.

    Args:
        calls: Calls made.
        reused: Calls found in the log instead.
        failed: Calls that failed for good.
        num_prompt_tokens, num_tokens: Tokens read and written.
        cost: By the engines' prices.
    """

    calls: int = 0
    reused: int = 0
    failed: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    cost: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall time since then."""
        return time.monotonic() - self.started


class Caller:
    """Makes calls for any number of coroutines of one event loop.

    An endpoint gets as many requests at once as its `concurrency` says. Engines in this process take turns, one batch
    at a time: calls that differ in nothing but prompt and seed run as one.

    Args:
        engines: By the role they have. One engine may have several.
        log: Calls that were made before are answered from it, and every finished one is added.
        prices: By role: of a million tokens read, and a million written.
        max_calls, max_tokens: Budgets, what is in the log included. Calls under way when one is reached are finished.

    Attributes:
        usage: What this caller has done.
    """

    def __init__(
        self,
        engines: Mapping[str, GenerationEngine],
        log: CallLog,
        *,
        prices: Mapping[str, tuple[float, float]] | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
    ):
        self.engines = dict(engines)
        self.usage = Usage()
        self._log = log
        self._prices = dict(prices or {})
        self._max_calls, self._max_tokens = max_calls, max_tokens
        self._begun = len(log)
        self._tokens_before = sum(map(_tokens_of, log.rows())) if max_tokens is not None else 0
        self._under_way: dict[str, asyncio.Future[Reply]] = {}
        self._failed_in_a_row: dict[str, int] = {}
        self._closed = threading.Event()
        self._lanes: dict[int, EndpointLane | LocalLane] = {}
        self._gates: dict[int, asyncio.Semaphore] = {}
        self._pulse: asyncio.TimerHandle | None = None

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the event loop now and then: Ctrl-C at the moment it falls asleep is heard only when it wakes up."""
        self._pulse = loop.call_later(_PULSE, self._beat, loop)

    async def __aenter__(self) -> Caller:
        loop = asyncio.get_running_loop()
        self._beat(loop)
        local = None
        for engine in self.engines.values():
            if hasattr(engine, "ask"):
                self._lanes.setdefault(id(engine), EndpointLane(engine, self._log, loop, self._closed))
            else:
                local = local or LocalLane(self._log, loop, self._closed)
                self._lanes[id(engine)] = local
            if self._max_tokens is not None:  # what a call costs is known when it is done: none may wait in a queue
                self._gates[id(engine)] = asyncio.Semaphore(getattr(engine, "concurrency", _LOCAL_AT_ONCE))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Answers under way are paid for: they are waited for, unless somebody is in a hurry, but after an error they
        # are not asked for again
        if error is not None and not isinstance(error, BudgetSpent):
            self._closed.set()
        try:
            if not isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)) and self._under_way:
                await asyncio.wait(list(self._under_way.values()))
        finally:
            self._closed.set()
            self._pulse.cancel()
            for lane in self._lanes.values():
                lane.close()

    async def call(
        self,
        role: str,
        step: str,
        prompt: Prompt,
        params: GenerationParams,
        options: tuple[str, ...] = (),
    ) -> Reply:
        """Ask the engine of a role, or look the answer up.

        Raises:
            BudgetSpent: Nothing was asked.
            CallFailed: This call cannot be answered: the server refused it, or kept failing; or the prompt does not
                fit into the model.
            EndpointError: No call can: the key or address is wrong, or ten calls in a row have failed.
            OSError: The log cannot be written.
        """
        engine = self.engines[role]
        call = Call(step, engine.name, prompt, params, options)
        key = call.key
        reply = self._log.find(call) if key not in self._under_way else None
        if reply is not None:
            self.usage.reused += 1
            return reply
        async with self._gates.get(id(engine), nullcontext()):
            future = self._under_way.get(key)
            if future is None:
                # Waiting for the gate, another coroutine may have asked the same
                reply = self._log.find(call) if self._gates else None
                if reply is not None:
                    return reply
                self._check_budget()
                self._begun += 1
                future = self._lanes[id(engine)].submit(engine, call)
                self._under_way[key] = future
                future.add_done_callback(lambda done: self._finish(key, role, done))
            try:
                return await asyncio.shield(future)
            except (ValueError, TypeError) as error:
                raise CallFailed(str(error), passing=False) from None
            except RuntimeError as error:
                raise self._judge_failure(error, engine.name) from None

    def _check_budget(self) -> None:
        if self._max_calls is not None and self._begun >= self._max_calls:
            raise BudgetSpent(f"the budget of {self._max_calls} calls is spent")
        used = self._tokens_before + self.usage.num_prompt_tokens + self.usage.num_tokens
        if self._max_tokens is not None and used >= self._max_tokens:
            raise BudgetSpent(f"the budget of {self._max_tokens} tokens is spent")

    def _finish(self, key: str, role: str, future: asyncio.Future[Reply]) -> None:
        del self._under_way[key]
        if future.cancelled():
            return
        name = self.engines[role].name
        error = future.exception()
        if error is not None:
            self.usage.failed += 1
            if isinstance(error, (ValueError, TypeError)):  # a prompt that this model cannot take: no fault of it
                return
            self._failed_in_a_row[name] = self._failed_in_a_row.get(name, 0) + 1
            return
        self._failed_in_a_row[name] = 0
        reply, usage = future.result(), self.usage
        read, written = self._prices.get(role, (0.0, 0.0))
        usage.calls += 1
        usage.num_prompt_tokens += reply.num_prompt_tokens
        usage.num_tokens += reply.num_tokens
        usage.cost += (reply.num_prompt_tokens * read + reply.num_tokens * written) / 1e6

    def _judge_failure(self, error: RuntimeError, engine: str) -> Exception:
        """The error of one call, or of all that would follow."""
        from .endpoint import EndpointError

        if not isinstance(error, EndpointError) or error.status in _WRONG_FOR_ALL:
            return error
        if self._failed_in_a_row.get(engine, 0) >= _IN_A_ROW:
            return EndpointError(
                f"{_IN_A_ROW} calls in a row have failed, the last one: {error}; finished ones are kept: the same "
                "command resumes once the server answers"
            )
        return CallFailed(str(error), passing=error.status is None)


def _tokens_of(row: dict) -> int:
    return row["reply"].get("num_tokens", 0) + row["reply"].get("num_prompt_tokens", 0)
