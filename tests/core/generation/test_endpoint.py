import asyncio
import io
import json
import math
import sys
import threading
import time
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from trl_extensions.core.generation import EngineArguments, create_engine, endpoint
from trl_extensions.core.generation.client import CallFailed, LLMClient, ResponseCache
from trl_extensions.core.generation.endpoint import EndpointEngine, EndpointError
from trl_extensions.core.generation.types import Generation, GenerationParams


ECHO = {status: (status, {}, '{"error": {"message": "you sent HEADERS"}}') for status in (200, 400, 503)}


def chat(text):
    return [{"role": "user", "content": text}]


class FakeServer:
    """
    A real HTTP server that answers `echo: <last message>`, except where `script` says otherwise.

    `script` maps a message to a list of actions, taken one a request and then followed by normal answers. An action is
    a number (a status), a tuple (status, headers, body), or the string `"drop"` (close the connection unanswered).
    """

    def __init__(self):
        self.script = {}
        self.requests = []
        self.headers = []
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.gate = None  # a barrier that holds requests until enough of them are in flight
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.http.handle_error = lambda *args: None  # clients that hang up are part of the tests
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        message = body["messages"][-1]["content"]
        with self.lock:
            self.requests.append((handler.path, body))
            self.headers.append(dict(handler.headers))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            action = self.script[message].pop(0) if self.script.get(message) else 200
        try:
            if self.gate is not None:
                self.gate.wait(timeout=60)
        finally:
            with self.lock:
                self.in_flight -= 1
        if action == "drop":
            handler.close_connection = True
            return
        if action == "drip":  # a byte now and then, for ever
            handler.send_response(200)
            handler.end_headers()
            while True:
                handler.wfile.write(b" ")
                time.sleep(0.05)
        status, headers, data = action if isinstance(action, tuple) else (action, {}, None)
        if data is None:
            data = json.dumps(answer(f"echo: {message}") if status == 200 else {"error": {"message": "scripted"}})
        data = data.replace("HEADERS", f"{handler.headers['Authorization']} {handler.path}")
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data.encode())))
        handler.end_headers()
        handler.wfile.write(data.encode())

    def count(self, message):
        return sum(body["messages"][-1]["content"] == message for _, body in self.requests)


def answer(text, finish_reason="stop", tokens=7):
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m", "system_fingerprint": "",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Retries come at once, the package's and ours."""
    for module, first, longest in (
        (openai._base_client, "INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"),
        (endpoint, "_FIRST_PAUSE", "_LONGEST_PAUSE"),
    ):
        monkeypatch.setattr(module, first, 0.001)
        monkeypatch.setattr(module, longest, 0.001)


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


def run(engine, prompts, **params):
    results = list(engine.generate(prompts, GenerationParams(**params)))
    assert sorted(index for index, _ in results) == list(range(len(prompts))), "every index exactly once"
    return [generation for _, generation in sorted(results, key=lambda result: result[0])]


def test_answers_find_their_prompts(server):
    prompts = [chat(f"question {i}") for i in range(30)]
    got = run(EndpointEngine(server.url, "m", concurrency=4), prompts)
    assert got == [Generation(f"echo: question {i}", "stop", 7) for i in range(30)]
    assert len(server.requests) == 30


def test_what_is_sent(server):
    messages = [{"role": "system", "content": "Be brief."}, *chat("hi")]
    params = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "stop": ("END", "\n\n"), "seed": 5}
    run(EndpointEngine(server.url, "the-model", api_key="secret"), [messages, chat("hi")], **params)
    bodies = sorted((body for _, body in server.requests), key=lambda body: -len(body["messages"]))
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    assert bodies[0]["messages"] == messages and bodies[0]["model"] == "the-model"
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"], bodies[0]["top_p"]) == (12, 0.7, 0.9)
    assert bodies[0]["stop"] == ["END", "\n\n"]
    assert bodies[0]["seed"] != bodies[1]["seed"], "two prompts under one seed are sampled independently"
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)
    first = sorted(body["seed"] for body in bodies)
    server.requests.clear()
    run(EndpointEngine(server.url, "the-model"), [messages, chat("hi")], **params)
    assert sorted(body["seed"] for _, body in server.requests) == first, "the same run sends the same seeds"


def test_greedy_request(server):
    run(EndpointEngine(server.url, "m"), [chat("hi")], top_p=0.9)
    ((_, body),) = server.requests
    assert body["temperature"] == 0 and "top_p" not in body and "stop" not in body


def test_hub_token_is_not_sent_to_strangers(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    run(EndpointEngine(server.url, "m"), [chat("hi")])
    assert "hf_private" not in str(server.headers)


def test_offline_mode_is_about_the_hub(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(EndpointEngine(server.url, "m"), [chat("hi")]) == [Generation("echo: hi", "stop", 7)]


ADDRESSES = {
    "": "/v1/chat/completions",
    "/": "/v1/chat/completions",
    "/v1/": "/v1/chat/completions",
    "/v1/chat/completions": "/v1/chat/completions",
    "/api": "/api/v1/chat/completions",
    "/api/paas/v4": "/api/paas/v4/chat/completions",
    "/v1beta/openai/": "/v1beta/openai/chat/completions",
    "/openai/deployments/m?api-version=2024-10-21": "/openai/deployments/m/chat/completions?api-version=2024-10-21",
}


@pytest.mark.parametrize("suffix", list(ADDRESSES))
def test_address_forms(server, suffix):
    run(EndpointEngine(server.url.removesuffix("/v1") + suffix, "m", api_key="k"), [chat("hi")])
    assert server.requests[0][0] == ADDRESSES[suffix]
    assert server.headers[0].get("api-key") == ("k" if "api-version" in suffix else None), "as Azure wants it"


def test_no_key_is_sent_where_none_is_given(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    run(EndpointEngine(server.url, "m"), [chat("hi")])
    assert not {"authorization", "api-key"} & {name.lower() for name in server.headers[0]}


def test_keys_are_not_shown(server, caplog):
    server.script["hi"] = [(200, {}, '{"error": "busy, sk-mine"}'), (401, {}, '{"error": "wrong key sk-mine"}')]
    with pytest.raises(EndpointError, match=r"HTTP 401: wrong key \*\*\*$"):
        run(EndpointEngine(server.url, "m", api_key=" sk-mine\r\n"), [chat("hi")])
    assert "busy, ***" in caplog.text and "sk-mine" not in caplog.text
    assert "Bearer sk-mine" in server.headers[0].values(), "white space around a key is no part of it"


def test_a_server_that_repeats_what_it_got(server, caplog):
    address = server.url.replace("://", "://me:p4ssword@") + "?api-version=3&access_token=t0ken"
    for engine, secrets in (
        (EndpointEngine(address, "m", max_retries=1), ("me:p4ssword", "bWU6cDRzc3dvcmQ=", "t0ken")),
        (EndpointEngine(server.url, "m", api_key="sk-0123456789abcdef", max_retries=1), ("sk-0123456789abcdef",)),
    ):
        for status in (200, 400, 503):
            server.script["hi"] = [ECHO[status]] * 2
            with pytest.raises(EndpointError) as caught:
                run(engine, [chat("hi")])
            shown = caplog.text + str(caught.value) + engine.name + engine.base_url
            assert "***" in str(caught.value) and not [own for own in secrets if own in shown]
    server.script["hi"] = [(200, {}, json.dumps(answer("It is sk-0123456789abcdef.\x1b[2J")))]
    assert run(engine, [chat("hi")])[0].text == "It is ***.\x1b[2J"
    server.script["hi"] = [(400, {}, '{"error": "\\u001b[2Jgone"}')]
    with pytest.raises(EndpointError) as caught:
        run(engine, [chat("hi")])
    assert str(caught.value).isprintable(), "or it would clear the terminal"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_prompts_go_to_no_other_server(server, status):
    other = FakeServer()
    server.script["hi"] = [(status, {"Location": f"{other.url}/chat/completions"}, "")]
    with pytest.raises(EndpointError, match=f"HTTP {status}: .*{other.url}") as caught:
        run(EndpointEngine(server.url, "m", api_key="k"), [chat("hi")])
    assert not other.requests and len(server.requests) == 1 and caught.value.status == status
    other.http.shutdown()
    other.http.server_close()


def test_settings_of_what_is_sent(server):
    args = EngineArguments(
        engine="endpoint",
        engine_base_url=server.url,
        engine_model="m",
        engine_extra_body="{top_k: 5, chat_template_kwargs: {enable_thinking: false}}",
        engine_max_tokens_field="max_completion_tokens",
        engine_omit=["temperature", "seed"],
    )
    engine = create_engine(args)
    run(engine, [chat("hi")], max_new_tokens=9)
    ((_, body),) = server.requests
    assert set(body) == {"model", "messages", "max_completion_tokens", "top_k", "chat_template_kwargs"}
    assert (body["max_completion_tokens"], body["top_k"]) == (9, 5)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_k" in engine.name, "another answer to caches"


def replied(finish_reason="stop", **message):
    reply = answer("", finish_reason)
    reply["choices"][0]["message"] |= message
    return reply


READ = {
    "cut at the stop string": (answer(" cut here END not here", "length"), Generation(" cut here", "length", 7)),
    "white space": (answer("ends in white \n"), Generation("ends in white", "stop", 7)),
    "nothing": (answer(None), Generation("", "stop", 7)),
    "without usage": (answer("hi") | {"usage": None}, Generation("hi", "stop", 0)),
    "usage of nothing": (answer("hi") | {"usage": {"completion_tokens": None}}, Generation("hi", "stop", 0)),
    "parts": (
        replied(content=[{"type": "text", "text": "one "}, {"type": "thinking", "thinking": "hm"}, "two"]),
        Generation("one two", "stop", 7),
    ),
    "thoughts of their own, all of it": (
        replied("length", content=None, reasoning_content="hm", reasoning="hm"),
        Generation("", "length", 7),
    ),
    "a refusal": (replied(content=None, refusal="I will not."), Generation("I will not.", "stop", 7)),
}


@pytest.mark.parametrize("name", list(READ))
def test_reading_the_answer(server, name):
    reply, expected = READ[name]
    server.script["hi"] = [(200, {}, "\ufeff" + json.dumps(reply))]
    assert run(EndpointEngine(server.url, "m"), [chat("hi")], stop=("END",)) == [expected]


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "eos_reached_somehow", None])
def test_only_stop_is_complete(server, tmp_path, caplog, reason):
    """What a server broke off is cut off to who samples, and a failed call, for good, to the client."""
    server.script["hi"] = [(200, {}, json.dumps(answer("half a sent", reason)))] * 2
    engine = EndpointEngine(server.url, "m")
    assert run(engine, [chat("hi")]) == [Generation("half a sent", "length", 7)]
    assert "prompt 0" in caplog.text and repr(reason) in caplog.text

    async def call():
        with ResponseCache(tmp_path / "calls.sqlite") as cache:
            async with LLMClient({"a": engine}, cache) as client:
                await client.call("a", "step", chat("hi"), GenerationParams())

    with pytest.raises(CallFailed, match="finish_reason") as caught:
        asyncio.run(call())
    assert not caught.value.retryable and repr(reason) in str(caught.value)


WORDS = {
    "vLLM now": '{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}',
    "vLLM before 0.10": '{"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}',
    "FastAPI": '{"detail": "too long"}',
    "FastAPI, checked": '{"detail": [{"type": "extra", "loc": ["body", "seed"], "msg": "too long"}]}',
    "Mistral": '{"object": "error", "message": {"detail": [{"loc": ["body", "seed"], "msg": "too long"}]}}',
    "Anthropic": '{"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}',
    "Gemini": '[{"error": {"code": 400, "message": "too long", "status": "INVALID_ARGUMENT"}}]',
    "Cloudflare": '{"success": false, "errors": [{"code": 7, "message": "too long"}]}',
    "AWS": '{"Message": "too long"}',
    "OpenRouter": '{"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": "too long"}}}',
    "text": "too\nlong",
    "HTML": "<html><head><title>too</title></head><body><p>long</p></body></html>",
    "another": '{"code": 400, "what": "too long"}',
}


@pytest.mark.parametrize("name", list(WORDS))
def test_the_words_of_the_server(server, name):
    server.script["hi"] = [(400, {}, WORDS[name])]
    with pytest.raises(EndpointError, match=r"HTTP 400: .*too long") as caught:
        run(EndpointEngine(server.url, "m"), [chat("hi")])
    assert "\n" not in str(caught.value) and ("body, seed" in str(caught.value)) == ("loc" in WORDS[name])


@pytest.mark.parametrize(("code", "status"), [(401, 401), ("402", 402), (429, None), (500, None), ("oops", None)])
def test_an_error_inside_a_200(server, code, status):
    server.script["hi"] = [(200, {}, json.dumps({"error": {"message": "no credits", "code": code}}))] * 2
    with pytest.raises(EndpointError, match="no credits") as caught:
        run(EndpointEngine(server.url, "m", max_retries=1), [chat("hi")])
    assert caught.value.status == status and len(server.requests) == (1 if status else 2)


SCHEMA = '{"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": false}'


def test_a_schema_is_sent(server):
    run(EndpointEngine(server.url, "m"), [chat("hi")], schema=SCHEMA)
    run(EndpointEngine(server.url, "m"), [chat("hi")], schema='{"type": "object", "properties": {"a": {}}}')
    form = server.requests[0][1]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == json.loads(SCHEMA)
    strict = [body["response_format"]["json_schema"]["strict"] for _, body in server.requests]
    assert strict == [True, False], "OpenAI takes closed objects only"


REFUSALS = ["'response_format' of type json_schema is not supported", "guided decoding is off", "bad grammar"]


@pytest.mark.parametrize("words", REFUSALS)
def test_a_server_without_schemas_is_found_out_once(server, caplog, words):
    server.script["one"] = [(422, {}, json.dumps({"detail": words}))]
    engine = EndpointEngine(server.url, "m", concurrency=1)
    got = run(engine, [chat("one"), chat("two"), chat("three")], schema=SCHEMA)
    assert [own.text for own in got] == ["echo: one", "echo: two", "echo: three"]
    assert ["response_format" in body for _, body in server.requests] == [True, False, False, False]
    assert len(caplog.records) == 1 and words in caplog.text


def test_another_refusal_is_not_the_schemas(server):
    server.script["one"] = [(400, {}, '{"error": "context length exceeded"}')]
    with pytest.raises(EndpointError, match="context length exceeded"):
        run(EndpointEngine(server.url, "m"), [chat("one")], schema=SCHEMA)


PASSING = {
    "rate limit": 429,
    "request time-out": 408,
    "server error": 500,
    "overloaded": 503,
    "lost connection": "drop",
    "html": (200, {"Content-Type": "text/html"}, "<html><body>Bad gateway</body></html>"),
    "html error": (502, {"Content-Type": "text/html"}, "<html><body>Bad gateway</body></html>"),
    "empty": (200, {}, ""),
    "half a json": (200, {}, json.dumps(answer("x"))[:90]),
    "no choices": (200, {}, '{"error": {"message": "busy"}}'),
    "an empty choice": (200, {}, '{"choices": [{}]}'),
    "a null message": (200, {}, '{"choices": [{"index": 0, "finish_reason": "stop", "message": null}]}'),
    "a list": (200, {}, "[1]"),
    "a number": (200, {}, "3"),
    "a list in a list in ...": (200, {}, "[" * 100_000),
    "the same as an error": (500, {}, '{"error": ' * 100_000),
}


@pytest.mark.parametrize("failure", list(PASSING))
def test_passing_failure_is_retried(server, failure):
    server.script["hi"] = [PASSING[failure]] * 2
    engine = EndpointEngine(server.url, "m", max_retries=2)
    assert run(engine, [chat("hi")]) == [Generation("echo: hi", "stop", 7)]
    assert len(server.requests) == 3


@pytest.mark.parametrize("failure", list(PASSING))
def test_lasting_failure_is_one_clear_line(server, failure):
    server.script["hi"] = [PASSING[failure]] * 3
    with pytest.raises(EndpointError) as caught:
        run(EndpointEngine(server.url, "m", max_retries=2), [chat("hi")])
    message = str(caught.value)
    assert message.startswith(f"prompt 0: {server.url}: ") and message.endswith("(after 3 tries)")
    assert "\n" not in message and caught.value.status is None
    if isinstance(PASSING[failure], int):
        assert f"HTTP {PASSING[failure]}: scripted" in message
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusal_is_not_retried(server, status):
    server.script["hi"] = [(status, {}, '{"error": {"message": "no such\\nmodel: m"}}')]
    with pytest.raises(EndpointError, match=f"^prompt 0: {server.url}: HTTP {status}: no such model: m$") as caught:
        run(EndpointEngine(server.url, "m"), [chat("hi")])
    assert len(server.requests) == 1 and caught.value.status == status


def test_nobody_there():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as unused:
        port = unused.server_port
    engine = EndpointEngine(f"http://127.0.0.1:{port}", "m", max_retries=1)
    with pytest.raises(EndpointError, match=rf"^prompt 0: .*127.0.0.1:{port}/v1: ConnectError: .*after 2 tries"):
        run(engine, [chat("hi")])


def test_server_that_does_not_answer(server):
    server.gate = threading.Barrier(2)  # the only request waits for a second one that never comes
    engine = EndpointEngine(server.url, "m", max_retries=0, timeout=0.2)
    try:
        with pytest.raises(EndpointError, match="Timeout"):
            run(engine, [chat("hi")])
    finally:
        server.gate.abort()


def test_an_answer_without_an_end(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_LONGEST_WAIT", 0.1)
    server.script["hi"] = ["drip"]
    with pytest.raises(EndpointError, match="does not end"):
        run(EndpointEngine(server.url, "m", max_retries=0, timeout=0.2), [chat("hi")])


def test_retry_after_is_honoured(server, monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)
    date = formatdate(time.time() + 60, usegmt=True)
    server.script["hi"] = [(429, {"Retry-After": "17"}, "{}"), (503, {"Retry-After": date}, "{}")]
    run(EndpointEngine(server.url, "m"), [chat("hi")])
    assert pauses[0] == 17.0 and 55 < pauses[1] <= 60


@pytest.mark.parametrize("after", ["inf", "-5", "nan", "1e309", "soon", "1e9", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_no_pause_without_an_end(server, after):
    server.script["hi"] = [(429, {"Retry-After": after}, '{"error": "busy"}')]
    with suppress(EndpointError):  # the package gives up at once where the pause would be too long
        run(EndpointEngine(server.url, "m", max_retries=1), [chat("hi")])
    assert len(server.requests) <= 2


def test_as_many_in_flight_as_asked_and_no_more(server):
    """The server answers only when four requests wait: fewer in flight would hang, more would show."""
    server.gate = threading.Barrier(4)
    run(EndpointEngine(server.url, "m", concurrency=4), [chat(str(i)) for i in range(12)])
    assert server.most_in_flight == 4


def test_results_come_as_they_finish(server):
    """The first prompt is answered only once the result of the second is in the caller's hands."""
    second_seen = threading.Event()
    handle = server.handle

    def gated(handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.rfile = io.BytesIO(body)
        if b"first" in body:
            second_seen.wait(timeout=60)
        handle(handler)

    server.handle = gated
    results = EndpointEngine(server.url, "m", concurrency=2).generate(
        [chat("first"), chat("second")], GenerationParams()
    )
    assert next(results)[0] == 1
    second_seen.set()
    assert next(results)[0] == 0
    assert next(results, None) is None


def test_closing_early_sends_nothing_more(server):
    prompts = [chat(str(i)) for i in range(100)]
    results = EndpointEngine(server.url, "m", concurrency=2).generate(prompts, GenerationParams())
    next(results)
    results.close()
    # Two in flight when the first came back, and two more at most that took their place.
    assert len(server.requests) <= 4
    assert next(results, None) is None


def test_closing_early_ends_a_pause(server):
    """A request that waits a minute for its next try does not keep the thread alive for that minute."""
    server.script["sick"] = [(429, {"Retry-After": "100"}, "{}")] * 9
    before = set(threading.enumerate())
    results = EndpointEngine(server.url, "m", concurrency=2).generate([chat("sick"), chat("well")], GenerationParams())
    assert next(results)[0] == 1
    results.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name == "endpoint":
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_inside_a_running_loop(server):
    """As in a notebook."""

    async def cell():
        return run(EndpointEngine(server.url, "m"), [chat("hi")])

    assert asyncio.run(cell()) == [Generation("echo: hi", "stop", 7)]


def test_answers_under_way_survive_a_failure(server):
    """Of four in flight one is refused: the other three are delivered, the error comes last, nothing new is sent."""
    server.gate = threading.Barrier(4)
    server.script["1"] = [(400, {}, '{"error": "bad"}')]
    results = EndpointEngine(server.url, "m", concurrency=4).generate(
        [chat(str(i)) for i in range(4)], GenerationParams()
    )
    got = []
    with pytest.raises(EndpointError, match=r"^prompt 1: .*HTTP 400: bad$"):
        for index, _ in results:
            got.append(index)
    assert sorted(got) == [0, 2, 3]


def test_nothing_is_sent_after_a_failure(server):
    server.script["0"] = [400]
    with pytest.raises(EndpointError):
        run(EndpointEngine(server.url, "m", concurrency=1), [chat(str(i)) for i in range(20)])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must start with http"),
        ({"concurrency": 0}, "`concurrency` must be .* at least 1"),
        ({"max_retries": -1}, "`max_retries` must be .* at least 0"),
        ({"base_url": "me:p4ssword@host/v1?key=t0ken"}, "must start with http:// or https://, got 'host/v1'$"),
        ({"api_key": "sk-mine sk-other"}, "^the API key holds blanks or other than ASCII characters: [^-]*$"),
        ({"api_key": "鍵sk-mine"}, "^the API key holds [^-]*$"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EndpointEngine(**({"base_url": "http://localhost", "model": "m"} | arguments))


def test_seeds_are_sent_as_they_are(server):
    prompts = [chat("a"), chat("b"), chat("a")]
    params = GenerationParams(temperature=0.7, seed=9)
    list(EndpointEngine(server.url, "m").generate(prompts, params, seeds=[5, 2**31 - 1, 7]))
    sent = sorted((body["messages"][0]["content"], body["seed"]) for _, body in server.requests)
    assert sent == [("a", 5), ("a", 7), ("b", 2**31 - 1)]


def test_tokens_of_the_prompt_are_counted(server):
    ((_, got),) = EndpointEngine(server.url, "m").generate([chat("hi")], GenerationParams())
    assert (got.num_prompt_tokens, got.num_tokens) == (1, 7)


def weighed(**logprobs):
    """An answer whose first token is listed with the log-probabilities of others."""
    top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    reply = answer("x", "length", 1)
    reply["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -1.0, "top_logprobs": top}]}
    return (200, {}, json.dumps(reply))


def test_option_logprobs(server):
    """Equal options with and without a space add up: 0.5 + 0.25; one that is not listed is minus infinity."""
    listed = {"7": math.log(0.5), " 7": math.log(0.25), "8": math.log(0.125), "77": math.log(0.1)}
    server.script["a"] = [503, weighed(**listed)]
    server.script["b"] = [weighed(**{"\u01207": -2.0, "\u25818\n": -3.0})]
    engine = EndpointEngine(server.url, "m")
    results = {index: (cost, values) for index, cost, values in engine.option_logprobs([chat("a"), chat("b")], "789")}
    assert results[0][1] == pytest.approx([math.log(0.75), math.log(0.125), -math.inf])
    assert results[1][1] == pytest.approx([-2.0, -3.0, -math.inf])
    cost = results[0][0]
    assert (cost, cost.num_prompt_tokens) == (Generation("", "length", 1), 1)
    body = server.requests[-1][1]
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)


@pytest.mark.parametrize("logprobs", ["missing", None, {"content": None}, {"content": []}])
def test_a_server_without_logprobs_is_told(server, logprobs):
    reply = answer("7")
    if logprobs != "missing":
        reply["choices"][0]["logprobs"] = logprobs
    server.script["a"] = [(200, {}, json.dumps(reply))]
    with pytest.raises(EndpointError, match="sends no log-probabilities") as caught:
        list(EndpointEngine(server.url, "m").option_logprobs([chat("a")], "78"))
    assert "\n" not in str(caught.value) and len(server.requests) == 1, "asking again would not help"


def test_more_than_a_hundred_at_once(server):
    """httpx would let 100 through: the server answers when 130 requests are in flight, or never."""
    server.http.socket.listen(256)
    server.gate = threading.Barrier(130)
    run(EndpointEngine(server.url, "m", concurrency=130, max_retries=0), [chat(str(i)) for i in range(130)])
    assert server.most_in_flight == 130


def test_plain_text_is_refused(server):
    with pytest.raises(ValueError, match="prompt 1 is plain text, but the endpoint engine needs chats"):
        EndpointEngine(server.url, "m").generate([chat("hi"), "hi"], GenerationParams())
    assert not server.requests


# The local llama.cpp server


def test_llama_server_missing_file(tmp_path):
    from benchmarks.llama_server import LlamaServer

    with pytest.raises(FileNotFoundError, match=r"model\.gguf"):
        LlamaServer(tmp_path / "model.gguf")


def test_llama_server_without_package(tmp_path, monkeypatch):
    from benchmarks.llama_server import LlamaServer

    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install xllamacpp"), LlamaServer(tmp_path / "model.gguf"):
        pass


@pytest.mark.slow
def test_llama_server_rejects_garbage(tmp_path):
    from benchmarks.llama_server import LlamaServer

    (tmp_path / "model.gguf").write_bytes(b"hello")
    with (
        pytest.raises(RuntimeError, match=r"llama.cpp cannot serve .*model\.gguf"),
        LlamaServer(tmp_path / "model.gguf"),
    ):
        pass


@pytest.mark.slow
def test_real_server():
    from benchmarks.llama_server import LlamaServer
    from trl_extensions.embedded import embedded_gguf

    questions = ["What is inflation?", "Why is the sky blue?", "How do I cook rice?", "How do planes fly?"]
    prompts = [chat(f"{question} Answer in one sentence.") for question in questions] * 2
    with LlamaServer(embedded_gguf(), parallel=8, context=4096) as server:
        engine = EndpointEngine(server.base_url, "smollm2", concurrency=8)
        short = run(engine, prompts, max_new_tokens=5)
        assert [(g.finish_reason, g.num_tokens) for g in short] == [("length", 5)] * 8
        assert all(generation.text for generation in short)

        # One at a time: batches of another size may round differently, and greedy text follows the rounding.
        single = EndpointEngine(server.base_url, "smollm2", concurrency=1)
        first = run(single, prompts[:2], max_new_tokens=24)
        assert run(single, prompts[:2], max_new_tokens=24) == first
        assert first[0].text.startswith(short[0].text)

        (whole,) = run(engine, [chat("Say hello.")], max_new_tokens=200)
        assert whole.finish_reason == "stop" and whole.num_tokens < 200
        word = first[0].text.split()[3]
        (cut,) = run(single, prompts[:1], max_new_tokens=24, stop=(word,))
        assert cut.text == first[0].text[: first[0].text.index(word)].rstrip() and cut.finish_reason == "stop"

        schema = {
            "type": "object",
            "properties": {"skill": {"type": "string", "maxLength": 40}},
            "required": ["skill"],
        }
        for answer in run(engine, prompts[:4], max_new_tokens=60, schema=json.dumps(schema)):
            assert answer.finish_reason == "stop" and list(json.loads(answer.text)) == ["skill"]

        with pytest.raises(EndpointError, match=r"^prompt 0: .*HTTP 400: .*context"):
            run(engine, [chat("word " * 2000)])
        address = server.base_url
    with pytest.raises(EndpointError, match="ConnectError"):
        run(EndpointEngine(address, "smollm2", max_retries=0), [chat("hi")])
