import io
import json
import math
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_extensions.core.generation.endpoint import EndpointEngine, EndpointError, retry_delay
from trl_extensions.core.generation.types import Generation, GenerationParams


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
        status, headers, data = action if isinstance(action, tuple) else (action, {}, None)
        if data is None:
            data = json.dumps(answer(f"echo: {message}") if status == 200 else {"error": {"message": "scripted"}})
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


class PatientEngine(EndpointEngine):
    """The engine with its pauses recorded instead of waited for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pauses = []

    def _pause(self, closed, seconds):
        self.pauses.append(seconds)


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
    got = run(PatientEngine(server.url, "m", concurrency=4), prompts)
    assert got == [Generation(f"echo: question {i}", "stop", 7) for i in range(30)]
    assert len(server.requests) == 30


def test_what_is_sent(server):
    messages = [{"role": "system", "content": "Be brief."}, *chat("hi")]
    params = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "stop": ("END", "\n\n"), "seed": 5}
    run(PatientEngine(server.url, "the-model", api_key="secret"), [messages, chat("hi")], **params)
    bodies = sorted((body for _, body in server.requests), key=lambda body: -len(body["messages"]))
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    assert bodies[0]["messages"] == messages and bodies[0]["model"] == "the-model"
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"], bodies[0]["top_p"]) == (12, 0.7, 0.9)
    assert bodies[0]["stop"] == ["END", "\n\n"]
    assert bodies[0]["seed"] != bodies[1]["seed"], "two prompts under one seed are sampled independently"
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)
    first = sorted(body["seed"] for body in bodies)
    server.requests.clear()
    run(PatientEngine(server.url, "the-model"), [messages, chat("hi")], **params)
    assert sorted(body["seed"] for _, body in server.requests) == first, "the same run sends the same seeds"


def test_greedy_request(server):
    run(PatientEngine(server.url, "m"), [chat("hi")], top_p=0.9)
    ((_, body),) = server.requests
    assert body["temperature"] == 0 and "top_p" not in body and "stop" not in body


def test_hub_token_is_not_sent_to_strangers(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    run(PatientEngine(server.url, "m"), [chat("hi")])
    assert "hf_private" not in str(server.headers)


def test_offline_mode_is_about_the_hub(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(PatientEngine(server.url, "m"), [chat("hi")]) == [Generation("echo: hi", "stop", 7)]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_address_forms(server, suffix):
    run(PatientEngine(server.url.removesuffix("/v1") + suffix, "m"), [chat("hi")])
    assert server.requests[0][0] == "/v1/chat/completions"


def test_reading_the_answer(server):
    for number, reply in enumerate(
        [
            answer(" cut here END not here", "length"),
            answer("ends in white \n"),
            answer(None),
            {key: value for key, value in answer("no usage").items() if key != "usage"},
        ]
    ):
        server.script[str(number)] = [(200, {}, json.dumps(reply))]
    got = run(PatientEngine(server.url, "m"), [chat(str(number)) for number in range(4)], stop=("END",))
    assert got == [
        Generation(" cut here", "length", 7),
        Generation("ends in white", "stop", 7),
        Generation("", "stop", 7),
        Generation("no usage", "stop", 0),
    ]


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
}


@pytest.mark.parametrize("failure", list(PASSING))
def test_passing_failure_is_retried(server, failure):
    server.script["hi"] = [PASSING[failure]] * 2
    engine = PatientEngine(server.url, "m", max_retries=2)
    assert run(engine, [chat("hi")]) == [Generation("echo: hi", "stop", 7)]
    assert len(server.requests) == 3 and len(engine.pauses) == 2


@pytest.mark.parametrize("failure", list(PASSING))
def test_lasting_failure_is_one_clear_line(server, failure):
    server.script["hi"] = [PASSING[failure]] * 3
    with pytest.raises(EndpointError) as caught:
        run(PatientEngine(server.url, "m", max_retries=2), [chat("hi")])
    message = str(caught.value)
    assert server.url in message and "prompt 0 after 3 tries" in message and "\n" not in message
    if isinstance(PASSING[failure], int):
        assert f"HTTP {PASSING[failure]}: scripted" in message
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusal_is_not_retried(server, status):
    server.script["hi"] = [(status, {}, '{"error": {"message": "no such\\nmodel: m"}}')]
    with pytest.raises(EndpointError, match=f"refused prompt 0: HTTP {status}: no such model: m$"):
        run(PatientEngine(server.url, "m"), [chat("hi")])
    assert len(server.requests) == 1


def test_nobody_there():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as unused:
        port = unused.server_port
    engine = PatientEngine(f"http://127.0.0.1:{port}", "m", max_retries=1)
    with pytest.raises(EndpointError, match=rf"127.0.0.1:{port} failed on prompt 0 after 2 tries: ConnectError"):
        run(engine, [chat("hi")])


def test_server_that_does_not_answer(server):
    server.gate = threading.Barrier(2)  # the only request waits for a second one that never comes
    engine = PatientEngine(server.url, "m", max_retries=0, timeout=0.2)
    try:
        with pytest.raises(EndpointError, match="Timeout"):
            run(engine, [chat("hi")])
    finally:
        server.gate.abort()


def test_retry_after_is_honoured(server):
    server.script["hi"] = [(429, {"Retry-After": "17"}, "{}"), (503, {"Retry-After": "0"}, "{}")]
    engine = PatientEngine(server.url, "m")
    run(engine, [chat("hi")])
    assert engine.pauses == [17.0, 0.0]


def test_delays():
    for attempt, longest in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        delays = {retry_delay(attempt, None) for _ in range(50)}
        assert longest / 2 <= min(delays) and max(delays) <= longest and len(delays) > 1
    assert retry_delay(0, "2.5") == 2.5
    assert retry_delay(0, "-3") == 0
    assert retry_delay(0, "99999999999") == 3600
    assert retry_delay(0, formatdate(time.time() - 100, usegmt=True)) == 0
    # An hour from now, less what this line takes; the header has whole seconds.
    assert 3500 < retry_delay(0, formatdate(time.time() + 3600, usegmt=True)) <= 3600
    assert retry_delay(0, "soon") <= 1


def test_as_many_in_flight_as_asked_and_no_more(server):
    """The server answers only when four requests wait: fewer in flight would hang, more would show."""
    server.gate = threading.Barrier(4)
    run(PatientEngine(server.url, "m", concurrency=4), [chat(str(i)) for i in range(12)])
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
    results = PatientEngine(server.url, "m", concurrency=2).generate(
        [chat("first"), chat("second")], GenerationParams()
    )
    assert next(results)[0] == 1
    second_seen.set()
    assert next(results)[0] == 0
    assert next(results, None) is None


def test_closing_early_sends_nothing_more(server):
    prompts = [chat(str(i)) for i in range(100)]
    results = PatientEngine(server.url, "m", concurrency=2).generate(prompts, GenerationParams())
    next(results)
    results.close()
    # Two in flight when the first came back, and two more at most that took their place.
    assert len(server.requests) <= 4
    assert next(results, None) is None


def test_closing_early_ends_a_pause(server):
    """A worker that waits an hour for its next try must not keep the process alive for that hour."""
    server.script["sick"] = [(429, {"Retry-After": "3600"}, "{}")] * 9
    before = set(threading.enumerate())
    results = EndpointEngine(server.url, "m", concurrency=2).generate([chat("sick"), chat("well")], GenerationParams())
    assert next(results)[0] == 1
    results.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("endpoint"):
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_answers_under_way_survive_a_failure(server):
    """Of four in flight one is refused: the other three are delivered, the error comes last, nothing new is sent."""
    server.gate = threading.Barrier(4)
    server.script["1"] = [(400, {}, '{"error": "bad"}')]
    results = PatientEngine(server.url, "m", concurrency=4).generate(
        [chat(str(i)) for i in range(4)], GenerationParams()
    )
    got = []
    with pytest.raises(EndpointError, match="refused prompt 1: HTTP 400: bad"):
        for index, _ in results:
            got.append(index)
    assert sorted(got) == [0, 2, 3]


def test_nothing_is_sent_after_a_failure(server):
    server.script["0"] = [400]
    with pytest.raises(EndpointError):
        run(PatientEngine(server.url, "m", concurrency=1), [chat(str(i)) for i in range(20)])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must start with http"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"max_retries": -1}, "max_retries must be 0 or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EndpointEngine(**({"base_url": "http://localhost", "model": "m"} | arguments))


def test_seeds_are_sent_as_they_are(server):
    prompts = [chat("a"), chat("b"), chat("a")]
    params = GenerationParams(temperature=0.7, seed=9)
    list(PatientEngine(server.url, "m").generate(prompts, params, seeds=[5, 2**31 - 1, 7]))
    sent = sorted((body["messages"][0]["content"], body["seed"]) for _, body in server.requests)
    assert sent == [("a", 5), ("a", 7), ("b", 2**31 - 1)]
    server.requests.clear()
    PatientEngine(server.url, "m").ask(chat("a"), params, 11)
    assert [body["seed"] for _, body in server.requests] == [11]


def test_tokens_of_the_prompt_are_counted(server):
    ((_, got),) = PatientEngine(server.url, "m").generate([chat("hi")], GenerationParams())
    assert (got.num_prompt_tokens, got.num_tokens) == (1, 7)


def test_one_question_in_the_calling_thread(server):
    server.script["hi"] = ["drop", 503]
    engine = PatientEngine(server.url, "m", max_retries=2)
    before = threading.active_count()
    assert engine.ask(chat("hi"), GenerationParams(), 0) == Generation("echo: hi", "stop", 7)
    assert len(server.requests) == 3 and len(engine.pauses) == 2 and threading.active_count() <= before + 3
    server.script["bad"] = [(422, {}, '{"error": "no"}')]
    with pytest.raises(EndpointError, match="refused a prompt: HTTP 422: no") as caught:
        engine.ask(chat("bad"), GenerationParams(), 0)
    assert caught.value.status == 422
    server.script["ill"] = [500] * 3
    with pytest.raises(EndpointError, match="failed on a prompt after 3 tries: HTTP 500") as caught:
        engine.ask(chat("ill"), GenerationParams(), 0)
    assert caught.value.status is None


def test_a_question_is_given_up_once_closed(server):
    """No second try, and the hour's pause between them ends at once."""
    server.script["sick"] = [(429, {"Retry-After": "3600"}, "{}")] * 9
    engine, closed = EndpointEngine(server.url, "m"), threading.Event()
    errors = []

    def ask():
        try:
            engine.ask(chat("sick"), GenerationParams(), 0, closed)
        except EndpointError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.requests:
        time.sleep(0.001)
    closed.set()
    thread.join(60)
    assert not thread.is_alive() and "gave up on a prompt: HTTP 429" in errors[0] and len(server.requests) <= 2


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
    engine = PatientEngine(server.url, "m")
    results = {index: (cost, values) for index, cost, values in engine.option_logprobs([chat("a"), chat("b")], "789")}
    assert results[0][1] == pytest.approx([math.log(0.75), math.log(0.125), -math.inf])
    assert results[1][1] == pytest.approx([-2.0, -3.0, -math.inf])
    cost = results[0][0]
    assert (cost, cost.num_prompt_tokens) == (Generation("", "length", 1), 1)
    body = server.requests[-1][1]
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)
    server.script["a"] = [weighed(**listed)]
    assert engine.weigh(chat("a"), ("8",)) == (cost, pytest.approx([math.log(0.125)]))


@pytest.mark.parametrize("logprobs", ["missing", None, {"content": None}, {"content": []}])
def test_a_server_without_logprobs_is_told(server, logprobs):
    reply = answer("7")
    if logprobs != "missing":
        reply["choices"][0]["logprobs"] = logprobs
    server.script["a"] = [(200, {}, json.dumps(reply))]
    with pytest.raises(EndpointError, match="sends no log-probabilities") as caught:
        list(PatientEngine(server.url, "m").option_logprobs([chat("a")], "78"))
    assert "\n" not in str(caught.value) and len(server.requests) == 1, "asking again would not help"


def test_more_than_a_hundred_at_once(server):
    """httpx would let 100 through: the server answers when 130 requests are in flight, or never."""
    server.http.socket.listen(256)
    server.gate = threading.Barrier(130)
    run(PatientEngine(server.url, "m", concurrency=130, max_retries=0), [chat(str(i)) for i in range(130)])
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
    with pytest.raises(ImportError, match=r"pip install trl-extensions\[demo\]"), LlamaServer(tmp_path / "model.gguf"):
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

        with pytest.raises(EndpointError, match=r"refused prompt 0: HTTP 400: .*context"):
            run(engine, [chat("word " * 2000)])
        address = server.base_url
    with pytest.raises(EndpointError, match="ConnectError"):
        run(EndpointEngine(address, "smollm2", max_retries=0), [chat("hi")])
