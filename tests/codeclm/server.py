"""An OpenAI-compatible server that answers by the rules of `fake`, fails at a chosen rate, and takes its time.

    python -m tests.codeclm.server --delay 0.5 --failures 0.05

prints its address, and its counts are at `/stats`; it ends when its standard input does.
"""

import argparse
import asyncio
import json
import random
import sys
import threading
from collections import Counter
from contextlib import contextmanager

from aiohttp import web

from tests.codeclm.fake import Rules, digest
from trl_extensions.core.generation.client import ResponseCache


FAILURES = ("500", "429", "drop", "html", "half")


class Server:
    """The server.

    Args:
        rules: What it answers.
        delay: Seconds until an answer, or a failure.
        spread: The delay of a request is drawn from `delay` times 1 - spread to 1 + spread, which shuffles answers.
        failures: Share of requests that fail.
        kinds: Of those: status 500, status 429 with `Retry-After: 0`, a connection that is dropped, an HTML page, half
            an answer, or ("empty") an answer without text, where asking again gives what it would have been.
        seed: Of delays and failures.

    Attributes:
        received: Requests by `request_key`.
        answered: Those that got their answer.
        refused: Texts; requests with one of them get that status, always.
        down: Whether everything fails.
        failed: Failures by kind.
        most_in_flight: Most requests that were open at a time.
    """

    def __init__(self, rules=None, *, delay=0.0, spread=0.0, failures=0.0, kinds=FAILURES, seed=0):
        self.rules = rules or Rules()
        self.delay, self.spread, self.failures, self.kinds = delay, spread, failures, kinds
        self._draw = random.Random(seed)
        self.received, self.answered, self.failed = Counter(), Counter(), Counter()
        self.log = []  # who asked for what, in the order it came in
        self.refused, self.down = {}, False
        self.in_flight = self.most_in_flight = 0

    @property
    def app(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/stats", self._stats)
        return app

    async def _complete(self, request):
        body = await request.json()
        key = request_key(body)
        self.received[key] += 1
        self.log.append((request.headers.get("Authorization", "").removeprefix("Bearer "), key))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        kind = self._draw.choice(self.kinds) if self._draw.random() < self.failures else None
        try:
            if self.delay:
                await asyncio.sleep(self.delay * self._draw.uniform(1 - self.spread, 1 + self.spread))
            return self._reply(request, body, key, kind)
        finally:
            self.in_flight -= 1

    def _reply(self, request, body, key, kind):
        status = next((own for text, own in self.refused.items() if text in body["messages"][0]["content"]), None)
        if status is not None:
            return web.json_response({"error": {"message": "not this one"}}, status=status)
        if kind == "500" or self.down:
            self.failed[kind] += 1
            return web.json_response({"error": {"message": "it fell over"}}, status=500)
        if kind == "429":
            self.failed[kind] += 1
            return web.json_response({"error": "too fast"}, status=429, headers={"Retry-After": "0"})
        if kind == "drop":
            self.failed[kind] += 1
            request.transport.abort()
            return web.Response()
        if kind == "html":
            self.failed[kind] += 1
            return web.Response(text="<html><body>Bad gateway</body></html>", content_type="text/html")
        own = self.rules.answer(body["model"], body["messages"], body.get("seed"), body["max_tokens"])
        reply = _completion(own, body)
        if kind == "half":
            self.failed[kind] += 1
            return web.Response(text=json.dumps(reply)[:90], content_type="application/json")
        if kind == "empty" and self.rules.may_be_asked_again(body["model"], body["messages"]):
            self.failed[kind] += 1
            reply["choices"][0]["message"]["content"] = ""
        self.answered[key] += 1
        return web.json_response(reply)

    async def _stats(self, request):
        return web.json_response(
            {
                "received": sum(self.received.values()),
                "answered": sum(self.answered.values()),
                "answered_twice": sum(count > 1 for count in self.answered.values()),
                "never_answered": sum(key not in self.answered for key in self.received),
                "failed": dict(self.failed),
                "most_in_flight": self.most_in_flight,
            }
        )


def request_key(body):
    """What tells requests apart."""
    about = body["model"], body.get("seed"), body["max_tokens"], body["temperature"], bool(body.get("logprobs"))
    return (*about, digest(json.dumps(body["messages"])))


def finished_calls(folder):
    """The calls that a run has made, in the order they were finished in."""
    with ResponseCache(folder / "calls.sqlite") as cache:
        return list(cache.rows())


def key_of_call(row):
    """The request that a finished call was."""
    params, prompt, model = row["params"], digest(json.dumps(row["prompt"])), row["engine"].removeprefix("endpoint:")
    if row.get("options"):
        return model, None, 1, 0, True, prompt
    return model, params["seed"], params["max_new_tokens"], params["temperature"], False, prompt


def _completion(own, body):
    choice = {
        "index": 0, "finish_reason": own.finish_reason, "message": {"role": "assistant", "content": own.text},
    }  # fmt: skip
    if body.get("logprobs"):
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in own.top]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "system_fingerprint": "",
        "choices": [choice],
        "usage": {
            "prompt_tokens": own.read, "completion_tokens": own.written, "total_tokens": own.read + own.written
        },
    }  # fmt: skip


@contextmanager
def serving(server):
    """The address of a server that runs in a thread meanwhile."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=0.1)
    try:
        yield asyncio.run_coroutine_threadsafe(_start(runner), loop).result(60)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


async def _start(runner):
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--failures", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with serving(Server(delay=args.delay, spread=args.spread, failures=args.failures, seed=args.seed)) as address:
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
