import asyncio
import errno
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager

import pytest

from trl_extensions.core.generation.client import BudgetSpent, CallFailed, LLMClient, Request, Response, ResponseCache
from trl_extensions.core.generation.endpoint import EndpointError
from trl_extensions.core.generation.types import Generation, GenerationParams


PARAMS = GenerationParams(max_new_tokens=8)


class Server:
    """An endpoint in this process: answers `echo: <prompt>` of 3 tokens to prompts of 2, or does what `script` says.

    `script` maps a prompt to exceptions to be raised, one a request, before normal answers come.
    """

    def __init__(self, name="endpoint:m", concurrency=4):
        self.name, self.concurrency = name, concurrency
        self.script, self.asked = {}, []
        self.in_flight = self.most_in_flight = 0
        self.gate = None  # a barrier: answers come once that many requests are in flight
        self.held = None  # an event: no answers before it

    @asynccontextmanager
    async def session(self):
        yield self.ask

    async def ask(self, prompt, params, seed, options=()):
        self.asked.append(prompt)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async with asyncio.timeout(60):
                if self.gate is not None:
                    await self.gate.wait()
                while self.held is not None and not self.held.is_set():
                    await asyncio.sleep(0.001)
            if self.script.get(prompt):
                raise self.script[prompt].pop(0)
            await asyncio.sleep(0)
            if options:
                weights = [-float(place) for place in range(len(options) - 1)] + [-math.inf]
                return Generation("", "length", 1, 2), weights
            return Generation(f"echo: {prompt}", "stop", 3, 2), None
        finally:
            self.in_flight -= 1


class Local:
    """A model in this process: refuses a batch with a prompt that is too long, as TransformersEngine does."""

    def __init__(self, name="transformers:m", alive=None):
        self.name, self.batches = name, []
        self.alive = alive if alive is not None else [0, 0]  # running now, most at once

    def generate(self, prompts, params, seeds=None):
        self._check(prompts)
        return self._answers(list(prompts), params, list(seeds))

    def option_logprobs(self, prompts, options):
        self._check(prompts)
        self.batches.append((list(prompts), tuple(options), None))
        for place in reversed(range(len(prompts))):
            yield place, Generation("", "length", 1, 2), [-0.5] * len(options)

    def _check(self, prompts):
        for place, prompt in enumerate(prompts):
            if "too long" in prompt:
                raise ValueError(f"prompt {place} has 999 tokens")

    def _answers(self, prompts, params, seeds):
        self.alive[0] += 1
        self.alive[1] = max(self.alive)
        self.batches.append((prompts, params, seeds))
        for place in reversed(range(len(prompts))):
            yield place, Generation(f"{self.name} {prompts[place]} {seeds[place]}", "stop", 3, 2)
        self.alive[0] -= 1


def run(path, engines, work, **options):
    """What `work(client)` returns, and the client."""

    async def main():
        with ResponseCache(path) as cache:
            async with LLMClient(engines, cache, **options) as client:
                return await work(client), client

    return asyncio.run(main())


async def ask(client, *prompts, role="strong", params=PARAMS, **options):
    """Replies, or errors, in order."""
    calls = (client.call(role, "step", prompt, params, **options) for prompt in prompts)
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calls.sqlite"


def logged(path):
    with ResponseCache(path) as cache:
        return [row["prompt"] for row in cache.rows()]


# Endpoints


def test_replies_and_usage(path):
    server = Server()
    replies, client = run(path, {"strong": server}, lambda client: ask(client, *"abc"))
    assert replies == [Response(f"echo: {prompt}", "stop", 3, 2) for prompt in "abc"]
    usage = client.usage
    assert (usage.calls, usage.cache_hits, usage.failed, usage.num_prompt_tokens, usage.num_tokens) == (3, 0, 0, 6, 9)
    assert sorted(logged(path)) == ["a", "b", "c"]


def test_as_many_in_flight_as_asked_and_no_more(path):
    """Answers come only when four requests wait: fewer in flight would hang, more would show."""
    server = Server(concurrency=4)
    server.gate = asyncio.Barrier(4)
    replies, _ = run(path, {"strong": server}, lambda client: ask(client, *map(str, range(40))))
    assert [reply.text for reply in replies] == [f"echo: {number}" for number in range(40)]
    assert server.most_in_flight == 4


def test_each_endpoint_has_its_own_bound(path):
    """Two endpoints are full at the same time: all five requests must be in flight before one is answered."""
    big, small = Server("endpoint:big", 3), Server("endpoint:small", 2)
    big.gate = small.gate = asyncio.Barrier(5)

    async def work(client):
        return await asyncio.gather(ask(client, *"abc"), ask(client, *"de", role="target"))

    run(path, {"strong": big, "target": small}, work)
    assert (big.most_in_flight, small.most_in_flight) == (3, 2)


def test_one_engine_in_two_roles_has_one_bound(path):
    server = Server(concurrency=2)
    server.gate = asyncio.Barrier(2)

    async def work(client):
        return await asyncio.gather(ask(client, *"abcd"), ask(client, *"efgh", role="scorer"))

    run(path, {"strong": server, "scorer": server}, work)
    assert server.most_in_flight == 2 and sorted(server.asked) == list("abcdefgh")


def test_equal_calls_under_way_are_made_once(path):
    server = Server()
    replies, client = run(path, {"strong": server, "scorer": server}, lambda client: ask(client, *"aaabb"))
    assert sorted(server.asked) == ["a", "b"]
    assert [reply.text for reply in replies] == ["echo: a"] * 3 + ["echo: b"] * 2
    assert client.usage.calls == 2 and sorted(logged(path)) == ["a", "b"]


@pytest.mark.parametrize("error", [EndpointError("down"), EndpointError("no", 400), ValueError("plain text")])
def test_equal_calls_under_way_fail_alike(path, error):
    server = Server()
    server.script["a"] = [error]
    replies, client = run(path, {"strong": server}, lambda client: ask(client, *"aaa"))
    assert [type(reply) for reply in replies] == [CallFailed] * 3 and len({str(reply) for reply in replies}) == 1
    assert [reply.retryable for reply in replies] == [error.args == ("down",)] * 3
    assert server.asked == ["a"] and client.usage.failed == 1


def test_a_cancelled_one_of_equal_calls_leaves_the_other(path):
    server = Server()
    server.held = threading.Event()

    async def work(client):
        first, second = (asyncio.create_task(client.call("strong", "step", "a", PARAMS)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        server.held.set()
        return await second

    reply, _ = run(path, {"strong": server}, work)
    assert reply.text == "echo: a" and server.asked == ["a"]


def test_made_before_is_looked_up(path):
    run(path, {"strong": Server()}, lambda client: ask(client, *"ab"))
    server = Server()
    replies, client = run(path, {"strong": server}, lambda client: ask(client, *"abc"))
    assert server.asked == ["c"]
    assert [reply.text for reply in replies] == ["echo: a", "echo: b", "echo: c"]
    assert (client.usage.calls, client.usage.cache_hits) == (1, 2)
    other = Server("endpoint:other")
    run(path, {"strong": other}, lambda client: ask(client, "a"))
    assert other.asked == ["a"], "another engine's answer is another answer"


def test_options(path):
    server = Server()
    options = {"options": ("1", "2", "3")}
    (reply,), _ = run(path, {"strong": server}, lambda client: ask(client, "a", **options))
    assert reply == Response("", "length", 1, 2, (0.0, -1.0, -math.inf))
    (again,), client = run(path, {"strong": server}, lambda client: ask(client, "a", **options))
    assert again == reply and client.usage.cache_hits == 1 and server.asked == ["a"]


def test_prices(path):
    """Four calls of 2 tokens read and 3 written: 8 and 12 tokens at 10 and 100 a million, and one at 1 and 2."""
    engines = {"strong": Server(), "target": Server("endpoint:t")}

    async def work(client):
        await asyncio.gather(ask(client, *"abcd"), ask(client, "e", role="target"))

    _, client = run(path, engines, work, prices={"strong": (10.0, 100.0), "target": (1.0, 2.0)})
    assert client.usage.cost == pytest.approx((8 * 10 + 12 * 100 + 2 * 1 + 3 * 2) / 1e6, rel=1e-12)


# Failures


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (422, False), (None, True)])
def test_one_call_fails(path, status, retryable):
    server = Server()
    server.script["b"] = [EndpointError("not that one", status)]
    replies, client = run(path, {"strong": server}, lambda client: ask(client, *"abc"))
    assert isinstance(replies[1], CallFailed) and replies[1].retryable is retryable
    assert str(replies[1]) == "not that one"
    assert [replies[0].text, replies[2].text] == ["echo: a", "echo: c"]
    assert (client.usage.calls, client.usage.failed) == (2, 1) and sorted(logged(path)) == ["a", "c"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_address_is_fatal(path, status):
    server = Server()
    server.script["a"] = [EndpointError("no", status)]
    with pytest.raises(EndpointError, match="no") as caught:
        run(path, {"strong": server}, lambda client: client.call("strong", "step", "a", PARAMS))
    assert caught.value.status == status


def test_ten_failures_in_a_row_are_fatal(path):
    """One after the other: nine single failures, a success, nine again, and then the tenth in a row."""
    server = Server(concurrency=1)
    fails = [f"bad {n}" for n in range(9)], [f"worse {n}" for n in range(10)]
    for prompt in (*fails[0], *fails[1]):
        server.script[prompt] = [EndpointError("busy")]

    async def work(client):
        results = []
        for prompt in (*fails[0], "good", *fails[1]):
            results += await ask(client, prompt)
        return results

    results, _ = run(path, {"strong": server}, work)
    kinds = [type(result) for result in results]
    assert kinds == [CallFailed] * 9 + [Response] + [CallFailed] * 9 + [EndpointError]
    assert "10 calls in a row have failed" in str(results[-1]) and "\n" not in str(results[-1])


def test_success_of_one_engine_does_not_hide_that_another_is_down(path):
    down, up = Server("endpoint:down"), Server("endpoint:up")
    down.script = {str(n): [EndpointError("busy")] for n in range(10)}

    async def work(client):
        results = []
        for number in range(10):
            results += await ask(client, str(number))
            await ask(client, str(number), role="target")
        return results

    results, _ = run(path, {"strong": down, "target": up}, work)
    assert [type(result) for result in results] == [CallFailed] * 9 + [EndpointError]


def test_a_fatal_error_ends_a_crowd(path):
    """A thousand calls wait when one of four in flight says that the key is wrong: the other three are waited for, and
    of those that wait a few are asked at most."""

    class Slow(Server):
        async def ask(self, prompt, params, seed, options=()):
            if prompt == "2":
                self.asked.append(prompt)
                raise EndpointError("wrong key", 401)
            await asyncio.sleep(1)  # the error is there long before, on a busy machine too
            return await super().ask(prompt, params, seed, options)

    server = Slow(concurrency=4)

    async def work(client):
        async with asyncio.TaskGroup() as group:
            for number in range(1000):
                group.create_task(client.call("strong", "step", str(number), PARAMS))

    with pytest.raises(ExceptionGroup, match="unhandled") as caught:
        run(path, {"strong": server}, lambda client: asyncio.wait_for(work(client), 60))
    assert [error.status for error in caught.value.exceptions] == [401]
    assert {"0", "1", "2", "3"} <= set(server.asked) and len(server.asked) <= 5
    assert set(logged(path)) == set(server.asked) - {"2"}, "answers under way are paid for"


def test_a_fatal_error_ends_a_crowd_of_local_calls(path):
    class Broken(Local):
        def _answers(self, prompts, params, seeds):
            raise RuntimeError("out of memory")

    async def work(client):
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                params = GenerationParams(max_new_tokens=1 + number % 3)
                group.create_task(client.call("strong", "step", str(number), params))

    with pytest.raises(ExceptionGroup) as caught:
        run(path, {"strong": Broken()}, lambda client: asyncio.wait_for(work(client), 60))
    assert all(str(error) == "out of memory" for error in caught.value.exceptions)


def test_full_disk_is_fatal(path):
    async def work(client):
        await ask(client, "a")
        client._cache._database.execute("PRAGMA max_page_count = 1")  # no page more than there are
        await client.call("strong", "step", "b" * 100_000, PARAMS)

    for engine in (Server(), Local()):
        with pytest.raises(OSError, match=r"full.*calls\.sqlite") as caught:
            run(path, {"strong": engine}, work)
        assert caught.value.errno == errno.ENOSPC
        assert logged(path) == ["a"], "what was written is whole"
        path.unlink()


# Budgets


def test_budget_of_calls_is_exact(path):
    server = Server(concurrency=2)
    results, _ = run(path, {"strong": server}, lambda client: ask(client, *map(str, range(10))), max_calls=4)
    assert [type(result) for result in results] == [Response] * 4 + [BudgetSpent] * 6
    assert "budget of 4 calls" in str(results[-1]) and len(server.asked) == 4 and len(logged(path)) == 4
    # What is in the log costs nothing, and a larger budget goes on
    for budget, asked in ((4, 0), (7, 3), (None, 3)):
        server = Server()
        results, _ = run(path, {"strong": server}, lambda client: ask(client, *map(str, range(10))), max_calls=budget)
        assert len(server.asked) == asked
        assert sum(isinstance(result, Response) for result in results) == (budget or 10)


def test_calls_under_way_are_finished_when_the_budget_is_spent(path):
    """The budget's exception leaves the block while three requests are in flight; all three are in the log."""
    server = Server(concurrency=4)
    server.held = threading.Event()

    async def work(client):
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(one(client, str(number)))

    async def one(client, prompt):
        try:
            await client.call("strong", "step", prompt, PARAMS)
        except BudgetSpent:
            server.held.set()
            raise

    async def main():
        with ResponseCache(path) as cache:
            async with LLMClient({"strong": server}, cache, max_calls=3) as client:
                try:
                    await work(client)
                except* BudgetSpent as errors:
                    spent = errors.exceptions[0]
                raise spent

    with pytest.raises(BudgetSpent):
        asyncio.run(main())
    assert sorted(logged(path)) == ["0", "1", "2"] == sorted(server.asked)


def test_budget_of_tokens(path):
    """Five tokens a call: three calls reach 15, so a budget of 11 to 15 stops the fourth."""

    async def one_by_one(client):
        return [result for number in range(6) for result in await ask(client, str(number))]

    results, _ = run(path, {"strong": Server()}, one_by_one, max_tokens=11)
    assert [type(result) for result in results] == [Response] * 3 + [BudgetSpent] * 3
    assert "budget of 11 tokens" in str(results[-1])
    for budget, made in ((15, 0), (16, 1), (100, 2)):  # of which 15, 15 and 20 are spent before
        results, client = run(path, {"strong": Server()}, one_by_one, max_tokens=budget)
        assert client.usage.calls == made


def test_tokens_are_counted_here_where_the_server_does_not(path):
    """3 words read and 4 written by the given counter: seven a call, of which a budget of 8 allows two."""

    class Silent(Server):
        async def ask(self, prompt, params, seed, options=()):
            return Generation("one two three four", "stop", 0, 0), [0.0] if options else None

    async def one_by_one(client):
        return [result for number in range(4) for result in await ask(client, f"{number} a b")]

    own = {"max_tokens": 8, "count_tokens": lambda text: len(text.split())}
    results, client = run(path, {"strong": Silent()}, one_by_one, **own)
    assert [type(result) for result in results] == [Response] * 2 + [BudgetSpent] * 2
    assert results[0] == Response("one two three four", "stop", 4, 3, estimated=True)
    assert (client.usage.estimated, client.usage.num_prompt_tokens, client.usage.num_tokens) == (2, 6, 8)
    assert "estimated" in str(results[-1])
    again, client = run(path, {"strong": Silent()}, one_by_one, **own)
    assert [type(result) for result in again] == [Response] * 2 + [BudgetSpent] * 2 and client.usage.calls == 0
    # Without a counter: a quarter of the bytes, 18 / 4 and 5 / 4 rounded up; a choice is one token
    (result,), _ = run(path.with_name("other"), {"strong": Silent()}, lambda client: ask(client, "0 a b"))
    assert (result.num_tokens, result.num_prompt_tokens) == (5, 2)
    (result,), _ = run(path.with_name("other"), {"strong": Silent()}, lambda c: ask(c, "0 a b", options=("A",)))
    assert (result.num_tokens, result.num_prompt_tokens) == (1, 2)


def test_an_answer_the_server_broke_off_fails_alone(path):
    """Eleven in a row are no sign of a server in trouble: it has answered."""
    server = Server(concurrency=1)
    partial = Generation("half", "length", 3, 2)
    server.script = {str(n): [EndpointError("content_filter", 200, partial)] for n in range(11)}
    results, _ = run(path, {"strong": server}, lambda client: ask(client, *map(str, range(12))))
    assert [type(result) for result in results] == [CallFailed] * 11 + [Response]
    assert not any(result.retryable for result in results[:11]) and logged(path) == ["11"]


# Models in this process


def test_local_calls_that_differ_in_prompt_and_seed_run_as_one(path):
    local = Local()

    async def work(client):
        hot = [GenerationParams(max_new_tokens=8, temperature=0.7, seed=seed) for seed in range(30)]
        cold = [GenerationParams(max_new_tokens=9, temperature=0.7, seed=seed) for seed in range(5)]
        calls = [client.call("strong", "step", f"p{own.seed % 3}", own) for own in (*hot, *cold)]
        return await asyncio.gather(*calls)

    replies, _ = run(path, {"strong": local}, work)
    expected = [f"transformers:m p{seed % 3} {seed}" for seed in (*range(30), *range(5))]
    assert [reply.text for reply in replies] == expected
    assert sorted(len(prompts) for prompts, _, _ in local.batches) == [5, 30]
    assert all(params.seed == 0 or params.seed in seeds for _, params, seeds in local.batches)


def test_local_engines_take_turns(path):
    alive = [0, 0]
    engines = {"strong": Local("a", alive), "target": Local("b", alive)}

    async def work(client):
        return await asyncio.gather(*(ask(client, *map(str, range(20)), role=role) for role in engines))

    first, second = run(path, engines, work)[0]
    assert [reply.text for reply in first] == [f"a {n} 0" for n in range(20)]
    assert [reply.text for reply in second] == [f"b {n} 0" for n in range(20)]
    assert alive[1] == 1


def test_local_options_are_batches_of_their_own(path):
    local = Local()

    async def work(client):
        return await asyncio.gather(ask(client, *"ab"), ask(client, *"ab", options=("1", "2")))

    (texts, weights), _ = run(path, {"strong": local}, work)
    assert [reply.text for reply in texts] == ["transformers:m a 0", "transformers:m b 0"]
    assert [reply.logprobs for reply in weights] == [(-0.5, -0.5)] * 2
    assert sorted(len(prompts) for prompts, *_ in local.batches) == [2, 2]


def test_a_prompt_too_long_fails_alone(path):
    local = Local()
    prompts = [f"{number}" for number in range(64)]
    prompts[20] = "too long"
    results, _ = run(path, {"strong": local}, lambda client: ask(client, *prompts))
    assert isinstance(results.pop(20), CallFailed)
    assert [reply.text for reply in results] == [f"transformers:m {p} 0" for p in prompts if p != "too long"]
    # By halves: the others are answered in a handful of batches, not one by one
    assert sorted(len(own) for own, *_ in local.batches) == [1, 2, 4, 8, 16, 32]


def test_a_prompt_too_long_is_told(path):
    (failed,), _ = run(path, {"strong": Local()}, lambda client: ask(client, "too long"))
    assert isinstance(failed, CallFailed) and not failed.retryable and "has 999 tokens" in str(failed)


def test_local_and_endpoint_side_by_side(path):
    """The endpoint answers only once the local model has: neither waits for the other's turn."""
    server, local = Server(concurrency=2), Local()
    server.held = threading.Event()

    async def work(client):
        waiting = asyncio.create_task(ask(client, *"ab"))
        replies = await ask(client, *"ab", role="target")
        server.held.set()
        return await waiting, replies

    (far, near), _ = run(path, {"strong": server, "target": local}, work)
    assert [reply.text for reply in (*far, *near)] == [
        "echo: a",
        "echo: b",
        "transformers:m a 0",
        "transformers:m b 0",
    ]


# Interruption


def test_cancellation_does_not_wait_for_a_slow_server(path):
    """As Ctrl-C does: the main task is cancelled while the server holds four requests, and more are queued."""
    server = Server(concurrency=4)
    server.held = asyncio.Event()

    async def main():
        task = asyncio.create_task(session())
        while server.in_flight < 4:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and not server.in_flight
        server.held.set()
        await asyncio.sleep(0.01)

    async def session():
        with ResponseCache(path) as cache:
            async with LLMClient({"strong": server}, cache) as client:
                await ask(client, *map(str, range(20)))

    asyncio.run(main())
    assert len(server.asked) == 4, "what was queued is not asked any more"
    assert logged(path) == [], "the cache was closed in good order"


def test_threads_end_with_the_client(path):
    before = set(threading.enumerate())
    run(path, {"strong": Server(), "target": Local()}, lambda client: ask(client, *"abc"))
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not set(threading.enumerate()) - before


def test_leaving_may_be_interrupted_and_nothing_runs_on(path):
    server = Server()
    server.held = threading.Event()

    async def leave_early():
        with ResponseCache(path) as cache:
            async with LLMClient({"strong": server}, cache) as client:
                asking = asyncio.create_task(ask(client, "slow"))
                while not server.in_flight:
                    await asyncio.sleep(0.01)
            await asking

    async def main():
        leaving = asyncio.create_task(leave_early())
        while not server.in_flight:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # it waits for the answer now
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()} and not server.in_flight
        server.held.set()

    asyncio.run(main())


# The cache


def request(prompt="hi", step="encode", engine="endpoint:m", options=(), **params):
    return Request(step, engine, prompt, GenerationParams(**params), options)


def chat(text):
    return [{"role": "user", "content": text}]


ROUND_TRIPS = {
    "text": (request("hi"), Response("there", "stop", 3, 5)),
    "chat": (request(chat("hi"), temperature=0.7, seed=4, stop=("END", "\n")), Response("cut", "length", 9, 0)),
    "options": (request(options=("7", "8")), Response("", "length", 1, 4, (-0.25, -math.inf))),
    "unicode": (request(chat("日本 🦊 \u2028 \x00"), step="é"), Response('"q"\nlines \u2029 \r\n 🦊', "stop", 1, 1)),
    "half a surrogate pair": (request("half \ud83d pair"), Response("fine", "stop", 1, 1)),
    "estimated": (request("e", schema='{"type": "object"}'), Response("{}", "stop", 1, 1, estimated=True)),
}


@pytest.mark.parametrize("name", list(ROUND_TRIPS))
def test_what_was_added_is_found(path, name):
    made, response = ROUND_TRIPS[name]
    with ResponseCache(path) as cache:
        assert cache.find(made) is None and len(cache) == cache.num_tokens == 0
        cache.add(made, response)
        assert cache.find(made) == response and len(cache) == 1
    with ResponseCache(path) as cache:
        assert cache.find(made) == response and len(cache) == 1
        assert cache.num_tokens == response.num_tokens + response.num_prompt_tokens
        (row,) = cache.rows()
    assert (row["key"], row["step"], row["engine"]) == (made.key, made.step, made.engine)
    assert ("options" in row) == bool(made.options) and row["params"]["seed"] == made.params.seed


def test_the_key_stands_for_all_of_a_request():
    different = [
        request(), request("ho"), request(chat("hi")), request(step="decode"), request(engine="endpoint:n"),
        request(options=("7",)), request(options=("7", "8")), request(seed=1), request(temperature=0.5),
        request(top_p=0.5), request(max_new_tokens=9), request(stop=("x",)), request(schema="{}"),
    ]  # fmt: skip
    assert len({own.key for own in different}) == len(different)
    assert all(len(own.key) == 32 and int(own.key, 16) >= 0 for own in different)
    assert request(chat("hi")).key == request(chat("hi")).key


def test_keys_without_a_schema_are_those_of_earlier_versions():
    """Or no call of an old file would be found again: the digest of what was hashed before there were schemas."""
    params = {"max_new_tokens": 350, "temperature": 0.0, "top_p": 1.0, "stop": (), "seed": 0}
    content = json.dumps(["encode", "endpoint:m", "hi", params, ()], sort_keys=True)
    assert request().key == hashlib.sha256(content.encode()).hexdigest()[:32]


def test_a_response_is_the_same_before_and_after_the_cache(path):
    """Half a surrogate pair, which a file cannot hold: a run that was killed must not go on with another text."""
    response = Response.of(Generation("half \ud83d pair", "stop", 3, 2))
    with ResponseCache(path) as cache:
        cache.add(request(), response)
        assert cache.find(request()) == response


def test_lines_of_an_earlier_version_are_taken_over_once(path):
    old = path.with_suffix(".jsonl")
    rows = []
    for number in range(5):
        own = request(str(number), seed=number)
        reply = {"text": f"reply {number}", "finish_reason": "stop", "num_tokens": 2, "num_prompt_tokens": 1}
        row = {"key": own.key, "step": own.step, "engine": own.engine, "prompt": own.prompt}
        rows.append({**row, "params": {"seed": number}, "reply": reply})
    weights = request("w", options=("A", "B"))
    rows.append({"key": weights.key, "step": "s", "options": ["A", "B"], "reply": {"logprobs": [-0.5, None]}})
    lines = [json.dumps(row) for row in rows]
    lines[3] = lines[3][:40]
    old.write_text("\n".join(lines) + "\n" + lines[0][:-10])  # one line is broken, and the last was cut short
    for _ in range(2):
        with ResponseCache(path) as cache:
            found = [cache.find(request(str(number), seed=number)) for number in range(5)]
            assert found == [Response(f"reply {n}", "stop", 2, 1) if n != 3 else None for n in range(5)]
            assert cache.find(weights) == Response(logprobs=(-0.5, -math.inf))
            assert [row.get("prompt") for row in cache.rows()] == ["0", "1", "2", "4", None] and len(cache) == 5
            assert cache.num_tokens == 12
        old.write_text(json.dumps(rows[3]) + "\n")


def test_threads_and_processes_share_a_cache(path):
    program = f"""
from tests.core.generation.test_client import fill
fill({str(path)!r}, 9)
"""
    other = subprocess.Popen([sys.executable, "-c", program])
    threads = [threading.Thread(target=fill, args=(path, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    with ResponseCache(path) as cache:
        assert len(cache) == 5 * 100
        assert all(cache.find(request(f"{t}/{n}")).text.startswith(f"{t} {n} ") for t in (0, 3, 9) for n in range(100))


def fill(path, number):
    """A hundred calls, each looked up at once, with those of others in between."""
    with ResponseCache(path) as cache:
        for place in range(100):
            own = Response(f"{number} {place} " + "x" * (place * 7 % 300))
            cache.add(request(f"{number}/{place}"), own)
            assert cache.find(request(f"{number}/{place}")) == own


def test_calls_survive_a_kill(path):
    program = f"""
import os, signal
from tests.core.generation.test_client import fill
fill({str(path)!r}, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    with ResponseCache(path) as cache:
        assert len(cache) == 100 and cache.find(request("1/99")).text.startswith("1 99 ")


def test_rows_in_the_order_they_finished(path):
    with ResponseCache(path) as cache:
        for number in (3, 1, 2):
            cache.add(request(str(number), max_new_tokens=number), Response("r", "stop", number, 10))
        cache.add(request("1", max_new_tokens=1), Response("of another process"))
        rows = list(cache.rows())
    assert [row["prompt"] for row in rows] == ["3", "1", "2"]
    assert [row["reply"]["text"] for row in rows] == ["r"] * 3
    assert [row["params"]["max_new_tokens"] for row in rows] == [3, 1, 2]


def test_what_json_cannot_hold_is_refused(path):
    with ResponseCache(path) as cache:
        with pytest.raises(ValueError, match="not JSON compliant"):
            cache.add(request("1"), Response(logprobs=(math.nan,)))
        assert cache.find(request("1")) is None


def test_a_closed_cache_and_a_file_that_is_none(path):
    cache = ResponseCache(path)
    cache.close()
    cache.close()
    with pytest.raises(ValueError, match=r"calls\.sqlite is closed"):
        cache.add(request(), Response("late"))
    path.write_text("no database, but a text of some length " * 100)
    with pytest.raises(OSError, match=r"not a database.*calls\.sqlite"):
        ResponseCache(path)
