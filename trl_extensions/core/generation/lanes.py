"""Threads that make the calls of `core.caller`: many for a server, one for all models of this process.

They are daemons, so that a program that was interrupted ends at once instead of waiting for a slow server.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from .calls import Call, CallLog, Reply
from .types import GenerationEngine


_MOST_AT_ONCE = 512
_SETTLING = 0.02  # seconds in which calls that are about to come may join a batch


class EndpointLane:
    """Up to `engine.concurrency` threads, each with one request at a time."""

    def __init__(self, engine: Any, log: CallLog, loop: asyncio.AbstractEventLoop, closed: threading.Event):
        self._engine, self._log, self._loop, self._closed = engine, log, loop, closed
        self._queue: SimpleQueue[tuple[Call, asyncio.Future[Reply]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._open = 0

    def submit(self, engine: GenerationEngine, call: Call) -> asyncio.Future[Reply]:
        """Queue a call; the future has its reply once that is in the log."""
        future = self._loop.create_future()
        self._open += 1
        future.add_done_callback(self._one_less)
        self._queue.put((call, future))
        if len(self._threads) < min(self._open, self._engine.concurrency):
            self._threads.append(_start(self._work))
        return future

    def close(self) -> None:
        """Let the threads end."""
        for _ in self._threads:
            self._queue.put(None)

    def _one_less(self, future: asyncio.Future) -> None:
        self._open -= 1

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            call, future = item
            if self._closed.is_set():
                _cancel(self._loop, future)
                continue
            try:
                reply = self._ask(call)
                self._log.add(call, reply)
            except Exception as error:  # whoever awaits the call gets it
                _resolve(self._loop, future, error=error)
            else:
                _resolve(self._loop, future, reply)

    def _ask(self, call: Call) -> Reply:
        if call.options:
            cost, logprobs = self._engine.weigh(call.prompt, call.options, self._closed)
            return replace(Reply.of(cost), logprobs=tuple(logprobs))
        return Reply.of(self._engine.ask(call.prompt, call.params, call.params.seed, self._closed))


class LocalLane:
    """One thread for all engines of this process, which would only slow each other down side by side."""

    def __init__(self, log: CallLog, loop: asyncio.AbstractEventLoop, closed: threading.Event):
        self._log, self._loop, self._closed = log, loop, closed
        self._queue: SimpleQueue[tuple[GenerationEngine, Call, asyncio.Future[Reply]] | None] = SimpleQueue()
        self._thread = _start(self._work)

    def submit(self, engine: GenerationEngine, call: Call) -> asyncio.Future[Reply]:
        """Queue a call; the future has its reply once that is in the log."""
        future = self._loop.create_future()
        self._queue.put((engine, call, future))
        return future

    def close(self) -> None:
        """Let the thread end once its batch is done."""
        self._queue.put(None)

    def _work(self) -> None:
        waiting: dict[Any, list] = defaultdict(list)
        while True:
            for item in self._arrivals(block=not any(waiting.values())):
                if item is None:
                    return
                engine, call, future = item
                params = replace(call.params, seed=0)
                waiting[id(engine), params, call.options].append((engine, call, future))
            group = max(waiting, key=lambda key: len(waiting[key]))
            batch, waiting[group] = waiting[group][:_MOST_AT_ONCE], waiting[group][_MOST_AT_ONCE:]
            self._run(batch)

    def _arrivals(self, block: bool) -> Iterator[Any]:
        if block:
            yield self._queue.get()
        time.sleep(_SETTLING)
        with suppress(Empty):
            while True:
                yield self._queue.get_nowait()

    def _run(self, batch: Sequence[tuple[GenerationEngine, Call, asyncio.Future[Reply]]]) -> None:
        engine, calls = batch[0][0], [call for _, call, _ in batch]
        futures = {place: future for place, (_, _, future) in enumerate(batch)}
        if self._closed.is_set():
            _cancel(self._loop, *futures.values())
            return
        try:
            for place, reply in _replies(engine, calls):
                self._log.add(calls[place], reply)
                _resolve(self._loop, futures.pop(place), reply)
                if self._closed.is_set():
                    _cancel(self._loop, *futures.values())
                    return
        except (ValueError, TypeError) as error:
            if len(batch) == 1:
                _resolve(self._loop, batch[0][2], error=error)
                return
            # One prompt that does not fit into the model is no reason to refuse the others: halved, it is soon alone
            rest = [batch[place] for place in futures]
            middle = (len(rest) + 1) // 2
            for part in filter(None, (rest[:middle], rest[middle:])):
                self._run(part)
        except Exception as error:
            for future in futures.values():
                _resolve(self._loop, future, error=error)


def _replies(engine: GenerationEngine, calls: Sequence[Call]) -> Iterator[tuple[int, Reply]]:
    prompts, options = [call.prompt for call in calls], calls[0].options
    if options:
        for place, cost, logprobs in engine.option_logprobs(prompts, options):
            yield place, replace(Reply.of(cost), logprobs=tuple(logprobs))
    else:
        for place, generation in engine.generate(prompts, calls[0].params, [call.params.seed for call in calls]):
            yield place, Reply.of(generation)


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="calls", daemon=True)
    thread.start()
    return thread


def _resolve(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Reply],
    reply: Reply | None = None,
    error: Exception | None = None,
) -> None:
    """Hand a result over to the event loop, unless nobody waits for it any more."""

    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(reply)
        else:
            future.set_exception(error)

    with suppress(RuntimeError):  # the loop is closed: an interrupted program is on its way out
        loop.call_soon_threadsafe(settle)


def _cancel(loop: asyncio.AbstractEventLoop, *futures: asyncio.Future[Reply]) -> None:
    """Tell the event loop of calls that will not be made, so that nobody waits for them for ever."""
    with suppress(RuntimeError):
        for future in futures:
            loop.call_soon_threadsafe(future.cancel)
