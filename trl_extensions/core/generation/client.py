"""Many calls of language models at once: bounded per engine, within a budget, kept on disk and so made once."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..runs.jsonl import encode_row, parse_row
from .endpoint import EndpointError
from .types import Generation, GenerationEngine, GenerationParams, Prompt


logger = logging.getLogger(__name__)

_IN_A_ROW = 10  # failures after which no call can be answered
_LOCAL_AT_ONCE, _MOST_IN_A_BATCH = 64, 512  # calls of models in this process, the former within a budget of tokens
_SETTLING, _PULSE = 0.02, 0.5  # seconds in which calls that are about to come may join a batch; between wake-ups
_GRACE = 30.0  # seconds for answers under way after an error
_WRONG_FOR_ALL = (301, 302, 303, 307, 308, 401, 402, 403, 404)


class BudgetSpent(Exception):  # noqa: N818 (nothing went wrong)
    """The next call would exceed a budget; what was made is on disk."""


class CallFailed(Exception):  # noqa: N818 (it is the call that did)
    """One call failed for good, others need not. `retryable`: the server kept failing rather than refused it."""

    def __init__(self, message: str, *, retryable: bool):
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True)
class Request:
    """A question to a language model, asked in a `step` of that name; its parameters' seed tells equal ones apart.
    With options, what is asked for is the log-probability, in nats, that the answer begins with each of them."""

    step: str
    engine: str
    prompt: Prompt
    params: GenerationParams
    options: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits that stand for all of it."""
        content = [self.step, self.engine, self.prompt, self.params.as_dict(), self.options]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:32]


@dataclass(frozen=True)
class Response:
    """What came back: a text ("" to a request with options, which gets `logprobs`, one for each, in nats), "stop" or
    "length" where it was cut off, and tokens written and read; `estimated` where the server did not count them."""

    text: str = ""
    finish_reason: str = "stop"
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    logprobs: tuple[float, ...] | None = None
    estimated: bool = False

    @classmethod
    def of(cls, generation: Generation, logprobs: Sequence[float] | None = None) -> Response:
        """What an engine gave."""
        # Half a surrogate pair cannot be written: the run that reads it back must not see another text than this one
        text = generation.text.encode("utf-8", errors="replace").decode("utf-8")
        tokens = generation.num_tokens, generation.num_prompt_tokens
        return cls(text, generation.finish_reason, *tokens, None if logprobs is None else tuple(logprobs))


class ResponseCache:
    """The finished calls of a run, in an SQLite file that threads and processes may share.

    Each is a row of the table `calls`: its key, and JSON with `key`, `step`, `engine`, `prompt`, `params`, `reply`
    and, if any, `options`. The lines of a file `<stem>.jsonl` of earlier versions beside it are taken over once.
    `OSError`, with the path, where the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._naming_the_file():
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._ask("PRAGMA page_size=16384")  # several calls to a page: half the size on disk
            for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"):
                self._ask(statement)
            if not self._ask("PRAGMA user_version")[0]:
                self._ask("CREATE TABLE calls (id INTEGER PRIMARY KEY, key TEXT UNIQUE, row TEXT)")
                self._take_over(self.path.with_suffix(".jsonl"))
                self._ask("PRAGMA user_version=1")
            self._ask("COMMIT")

    def __len__(self) -> int:
        return int(self._ask("SELECT count(*) FROM calls")[0])

    @property
    def num_tokens(self) -> int:
        """Tokens read and written by all calls."""
        totals = [f"total(json_extract(row, '$.reply.{name}'))" for name in ("num_tokens", "num_prompt_tokens")]
        return int(self._ask(f"SELECT {' + '.join(totals)} FROM calls")[0])

    def find(self, request: Request) -> Response | None:
        """The response to a call that was made before; None if it was not."""
        found = self._ask("SELECT row FROM calls WHERE key = ?", request.key)
        if found is None:
            return None
        values = json.loads(found[0])["reply"]
        if "logprobs" in values:
            values["logprobs"] = tuple(float("-inf") if value is None else value for value in values["logprobs"])
        return Response(**values)

    def add(self, request: Request, response: Response) -> None:
        """Write a finished call; it has left this process when this returns. `OSError` if the disk is full or gone."""
        row: dict[str, Any] = {"key": request.key, "step": request.step, "engine": request.engine}
        row |= {"prompt": request.prompt, "params": request.params.as_dict()}
        row |= {"options": request.options} if request.options else {}
        row["reply"] = {name: value for name, value in vars(response).items() if value not in (None, False)}
        if response.logprobs is not None:  # JSON has no infinity
            row["reply"]["logprobs"] = [None if value == float("-inf") else value for value in response.logprobs]
        self._ask("INSERT OR IGNORE INTO calls (key, row) VALUES (?, ?)", request.key, encode_row(row).decode())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every call with its reply, in the order they were finished in."""
        with self._naming_the_file():
            yield from (json.loads(row) for (row,) in self._database.execute("SELECT row FROM calls ORDER BY id"))

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        self._database.close()

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, statement: str, *values: str) -> Any:
        with self._naming_the_file():
            return self._database.execute(statement, values).fetchone()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise ValueError(f"{self.path} is closed ({error})") from None
        except sqlite3.DatabaseError as error:
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(self.path)) from error

    def _take_over(self, path: Path) -> None:
        if path.is_file():
            with open(path, "rb") as lines:
                rows = (row for row in map(parse_row, lines) if row is not None and {"key", "reply"} <= row.keys())
                values = ((row["key"], encode_row(row).decode()) for row in rows)
                self._database.executemany("INSERT OR IGNORE INTO calls (key, row) VALUES (?, ?)", values)
            logger.info("%s: took over the calls of %s", self.path, path.name)


@dataclass
class Usage:
    """Calls made, found in the cache instead and failed for good; tokens; cost by the engines' prices; and calls whose
    tokens were `estimated`, since the server does not count them."""

    calls: int = 0
    cache_hits: int = 0
    failed: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    cost: float = 0.0
    estimated: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class LLMClient:
    """Makes calls for any number of coroutines of one event loop, and counts them in `usage`.

    An endpoint gets as many requests at once as its `concurrency` says. Engines in this process take turns, one batch
    at a time: calls that differ in nothing but prompt and seed run as one.

    Args:
        engines: By the role they have. One engine may have several.
        cache: Calls that were made before are answered from it, and every finished one is added.
        prices: By role: of a million tokens read, and a million written.
        max_calls, max_tokens: Budgets, with what is in the cache. Calls under way when one is reached are finished.
        count_tokens: Where a server does not. Default: a quarter of the bytes.
    """

    def __init__(
        self,
        engines: Mapping[str, GenerationEngine],
        cache: ResponseCache,
        *,
        prices: Mapping[str, tuple[float, float]] | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        count_tokens: Callable[[str], int] | None = None,
    ):
        self.engines = dict(engines)
        self.usage = Usage()
        self._cache = cache
        self._prices = prices or {}
        self._max_calls, self._max_tokens = max_calls, max_tokens
        self._count_tokens = count_tokens or (lambda text: -(-len(text.encode("utf-8", errors="replace")) // 4))
        self._begun = len(cache)
        self._tokens_before = cache.num_tokens if max_tokens is not None else 0
        self._under_way: dict[str, asyncio.Task[Response]] = {}
        self._in_flight: set[str] = set()  # requests to servers, which are worth waiting for
        self._failed_in_a_row: Counter[str] = Counter()
        self._asking: dict[int, tuple[Any, Any]] = {}  # by engine: what bounds requests, and what makes one
        self._open = AsyncExitStack()

    async def __aenter__(self) -> LLMClient:
        self._open.callback(asyncio.create_task(_beat()).cancel)
        worker: _LocalWorker | None = None
        for engine in {id(engine): engine for engine in self.engines.values()}.values():
            if hasattr(engine, "session"):
                server: Any = engine
                ask = await self._open.enter_async_context(server.session())
                self._asking[id(engine)] = asyncio.Semaphore(server.concurrency), ask
                continue
            if worker is None:
                worker = _LocalWorker()
                self._open.callback(worker.close)
            # What a call costs is known when it is done: within a budget of tokens none may wait in a queue
            gate = nullcontext() if self._max_tokens is None else asyncio.Semaphore(_LOCAL_AT_ONCE)
            self._asking[id(engine)] = gate, partial(worker.ask, engine)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Answers under way are paid for: they are waited for, unless somebody is in a hurry, but after an error only
        # for a while, and nothing more is asked
        hurry = isinstance(error, (KeyboardInterrupt, asyncio.CancelledError))
        failed = error is not None and not isinstance(error, BudgetSpent)
        async with self._open:
            for key, task in self._under_way.items():
                if failed and (hurry or key not in self._in_flight):
                    task.cancel()
            tasks = list(self._under_way.values())
            try:
                if tasks:
                    await asyncio.wait(tasks, timeout=_GRACE if failed else None)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def call(
        self, role: str, step: str, prompt: Prompt, params: GenerationParams, options: tuple[str, ...] = ()
    ) -> Response:
        """Ask the engine of a role, or look the answer up.

        Raises:
            BudgetSpent: Nothing was asked.
            CallFailed: This call cannot be answered: the server refused it, broke it off or kept failing; or the
                prompt does not fit into the model.
            EndpointError: No call can: the key or address is wrong, or ten calls in a row have failed.
            OSError: The cache cannot be written.
        """
        name = self.engines[role].name
        request = Request(step, name, prompt, params, options)
        task = self._under_way.get(request.key)
        if task is None:
            if (response := self._cache.find(request)) is not None:
                self.usage.cache_hits += 1
                return response
            task = self._under_way[request.key] = asyncio.create_task(self._make(role, request))
            task.add_done_callback(partial(self._forget, request.key))
        try:
            return await asyncio.shield(task)
        except (ValueError, TypeError) as error:
            raise CallFailed(str(error), retryable=False) from None
        except EndpointError as error:
            if error.status in _WRONG_FOR_ALL:
                raise
            if self._failed_in_a_row[name] >= _IN_A_ROW:
                words = f"{_IN_A_ROW} calls in a row have failed, the last one: {error}"
                raise EndpointError(f"{words}; the same command resumes once the server answers") from None
            raise CallFailed(str(error), retryable=error.status is None) from None

    async def _make(self, role: str, request: Request) -> Response:
        engine = self.engines[role]
        gate, ask = self._asking[id(engine)]
        async with gate:
            self._check_budget()
            self._begun += 1
            if hasattr(engine, "session"):
                self._in_flight.add(request.key)
            try:
                answer = await ask(request.prompt, request.params, request.params.seed, request.options)
            except Exception as error:
                self.usage.failed += 1
                # A prompt that this model cannot take, or an answer that its server broke off, is no sign of trouble
                if not isinstance(error, (ValueError, TypeError)) and getattr(error, "partial", None) is None:
                    self._failed_in_a_row[request.engine] += 1
                raise
            self._failed_in_a_row[request.engine] = 0
            response = self._counted(role, request, Response.of(*answer))
            self._cache.add(request, response)
            return response

    def _forget(self, key: str, task: asyncio.Task[Response]) -> None:
        del self._under_way[key]
        self._in_flight.discard(key)
        if not task.cancelled():
            task.exception()  # nobody may be left to hear it

    def _check_budget(self) -> None:
        if self._max_calls is not None and self._begun >= self._max_calls:
            raise BudgetSpent(f"the budget of {self._max_calls} calls is spent")
        used = self._tokens_before + self.usage.num_prompt_tokens + self.usage.num_tokens
        if self._max_tokens is not None and used >= self._max_tokens:
            some = f", {self.usage.estimated} calls estimated" if self.usage.estimated else ""
            raise BudgetSpent(f"the budget of {self._max_tokens} tokens is spent{some}")

    def _counted(self, role: str, request: Request, response: Response) -> Response:
        """With the tokens that the server did not count, added to the usage."""
        usage, count = self.usage, self._count_tokens
        if not response.num_tokens and not response.num_prompt_tokens:
            prompt = request.prompt
            read = sum(map(count, [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]))
            written = 1 if request.options else count(response.text)
            response = replace(response, num_tokens=written, num_prompt_tokens=read, estimated=True)
        prices = self._prices.get(role, (0.0, 0.0))
        usage.calls += 1
        usage.estimated += response.estimated
        usage.num_prompt_tokens += response.num_prompt_tokens
        usage.num_tokens += response.num_tokens
        usage.cost += (response.num_prompt_tokens * prices[0] + response.num_tokens * prices[1]) / 1e6
        return response


async def _beat() -> None:
    """Ctrl-C at the moment the event loop falls asleep is heard only when it wakes up."""
    while True:
        await asyncio.sleep(_PULSE)


class _LocalWorker:
    """One thread for all models of this process, which would only slow each other down side by side. A daemon, so
    that a program that was interrupted ends at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="calls", daemon=True).start()

    async def ask(
        self, engine: GenerationEngine, prompt: Prompt, params: GenerationParams, seed: int, options: Sequence[str]
    ) -> tuple[Any, ...]:
        """A generation and, with options, their log-probabilities."""
        future = self._loop.create_future()
        self._queue.put(((id(engine), replace(params, seed=0), options), (engine, prompt, seed, future)))
        return await future

    def close(self) -> None:
        """Let the thread end after the answer it is at."""
        self._closed.set()
        self._queue.put(None)

    def _work(self) -> None:
        groups: defaultdict[Any, list[tuple[Any, ...]]] = defaultdict(list)
        while True:
            items = [] if groups else [self._queue.get()]
            time.sleep(_SETTLING)
            while not self._queue.empty():
                items.append(self._queue.get())
            if self._closed.is_set():
                return
            for group, call in items:
                groups[group].append(call)
            largest = max(groups, key=lambda group: len(groups[group]))
            batch, rest = groups[largest][:_MOST_IN_A_BATCH], groups.pop(largest)[_MOST_IN_A_BATCH:]
            groups |= {largest: rest} if rest else {}
            self._run(batch, *largest[1:])

    def _run(self, batch: Sequence[tuple[Any, ...]], params: GenerationParams, options: Sequence[str]) -> None:
        (engine, *_), prompts, seeds, futures = zip(*batch, strict=True)
        missing = dict(enumerate(batch))
        try:
            made: Any = (
                engine.option_logprobs(prompts, options) if options else engine.generate(prompts, params, seeds)
            )
            for place, *answer in made:
                del missing[place]
                self._settle(futures[place], answer)
                if self._closed.is_set():
                    return
        except (ValueError, TypeError) as error:
            if len(batch) == 1:
                return self._settle(futures[0], error)
            # One prompt that does not fit into the model is no reason to refuse the others: halved, it is soon alone
            rest, middle = list(missing.values()), (len(missing) + 1) // 2
            for part in filter(None, (rest[:middle], rest[middle:])):
                self._run(part, params, options)
        except Exception as error:
            for place in missing:
                self._settle(futures[place], error)

    def _settle(self, future: asyncio.Future[Any], result: Any) -> None:
        """Hand a result over to the event loop, unless nobody waits for it any more."""
        settle = future.set_exception if isinstance(result, Exception) else future.set_result
        with suppress(RuntimeError):  # the loop is closed: an interrupted program is on its way out
            self._loop.call_soon_threadsafe(lambda: future.done() or settle(result))
