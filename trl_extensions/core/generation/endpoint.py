"""Generation on any server that speaks the OpenAI chat API, through the client of the `openai` package."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import re
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from ..options import check_least, redacted
from .types import Generation, GenerationParams, Prompt, check_prompts, cut_at_stop, request_seed, sum_by_option


if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds, as in the package
_LONGEST_WAIT = 120.0  # seconds the package waits at most where the server asks for a pause
_NO_SCHEMA = re.compile(r"response_format|json.?schema|structured|guided|grammar", re.IGNORECASE)
# Where servers put what went wrong: OpenAI, vLLM before 0.10, FastAPI, Mistral, Anthropic, Cloudflare, AWS, ...
_WORDS = ("error", "errors", "message", "detail", "details", "msg", "error_message", "error_description", "title")


class EndpointError(RuntimeError):
    """A request failed for good: one line with the URL, the status and the server's own words. `status` is None where
    the server kept failing, so that the same request may succeed another time; `partial` is what was written where the
    server ended the answer for a reason of its own."""

    def __init__(self, message: str, status: int | None = None, partial: Generation | None = None) -> None:
        super().__init__(message)
        self.status, self.partial = status, partial


class _Broken(Exception):  # noqa: N818
    """An answer that is none, as a server or a proxy in trouble sends: worth asking again."""


class EndpointEngine:
    """Generates by asking a server.

    Up to `concurrency` requests are in flight; results come as they finish. Rate limits (429), server errors (5xx),
    time-outs, lost connections and broken answers are retried, with growing pauses or after the pause the server asks
    for (two minutes at most). Any other refusal (4xx) ends the run with the server's own words; answers that are under
    way by then are still delivered first. Redirects are not followed: prompts and key go to nobody but the server that
    was named. Neither the key nor a password in the address is shown or kept, whatever the server writes.

    Only "stop" ends an answer. One that the server ended for a reason of its own, such as a content filter, is
    delivered as cut off by `generate`, with a warning, and fails in `LLMClient`.

    Args:
        base_url: Its address; `/v1` is added unless there is a version or a query (`?api-version=...`) in it.
        model: Name the server knows the model by.
        api_key: Without one none is sent. White space around it is no part of it.
        max_retries: How often one request is sent again.
        timeout: Seconds to wait for one answer.
        extra_body: Further fields of every request, such as `top_k`; they win over the engine's own.
        max_tokens_field: What the server calls the token limit: `max_tokens` or `max_completion_tokens`.
        omit: Fields that are never sent, for models that refuse them, such as `temperature` or `seed`.

    Raises:
        `ValueError`: if an argument is out of range, `base_url` is not an http address, or the key cannot be one.
        `ImportError`: if `openai` is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
        timeout: float = 300.0,
        extra_body: Mapping[str, Any] | None = None,
        max_tokens_field: str = "max_tokens",
        omit: Sequence[str] = (),
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            shown = base_url.rpartition("@")[2].partition("?")[0]
            raise ValueError(f"base_url must start with http:// or https://, got {shown!r}")
        api_key = (api_key or "").strip()
        if not re.fullmatch("[!-~]*", api_key):
            raise ValueError("the API key holds blanks or other than ASCII characters: copy it anew, it alone")
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError(f"the endpoint engine needs the openai package ({error}): pip install openai") from error
        self.base_url, self.model, self._api_key = redacted(base_url), model, api_key
        self.concurrency, self.max_retries, self.timeout = concurrency, max_retries, timeout
        check_least(self, concurrency=1, max_retries=0)
        self.extra_body, self.max_tokens_field, self.omit = dict(extra_body or {}), max_tokens_field, tuple(omit)
        # What else is sent may change what is answered: other settings are another engine to caches and run folders
        self.name = f"endpoint:{model}{f' {redacted(json.dumps(extra_body, sort_keys=True))}' if extra_body else ''}"
        parts = urlsplit(base_url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        if not parts.query and not re.search(r"/v\d+\w*(/|$)", path):
            path += "/v1"
        self._url, self._query = urlunsplit((parts.scheme, parts.netloc, path, "", "")), dict(parse_qsl(parts.query))
        self._shown, user = redacted(self._url), unquote(parts.netloc.rpartition("@")[0])
        basic = base64.b64encode(user.encode()).decode()  # as it is sent, and some servers repeat what they got
        private = [value for name, value in self._query.items() if value not in redacted(f"?{name}={value}")]
        self._private = [text for text in (api_key, user, basic, user.partition(":")[2], *private) if text]
        self._sends_schemas = True

    def generate(
        self, prompts: Sequence[Prompt], params: GenerationParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Generates for every prompt, a chat; see [`GenerationEngine.generate`]. Closing the iterator early drops what
        has not been sent. `EndpointError` when a request fails for good."""
        _check_chats(prompts)
        if seeds is None:
            seeds = [request_seed(params.seed, index) for index in range(len(prompts))]
        requests = [(prompt, params, seed, ()) for prompt, seed in zip(prompts, seeds, strict=True)]
        return ((index, generation) for index, generation, _ in self._stream(requests))

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Iterator[tuple[int, Generation, list[float]]]:
        """Log-probabilities of options among the 20 likeliest tokens; see [`GenerationEngine.option_logprobs`]."""
        _check_chats(prompts)
        return self._stream([(prompt, GenerationParams(1), 0, tuple(options)) for prompt in prompts])

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """A connection for one event loop: `await ask(prompt, params, seed, options=())` gives a [`Generation`] and,
        with options, their log-probabilities. The bound on requests in flight is the caller's to keep."""
        import openai

        async with openai.AsyncOpenAI(
            base_url=self._url,
            default_query=self._query,
            api_key=self._api_key or "none",  # or it would send what it finds in the environment to any server
            max_retries=self.max_retries,
            timeout=self.timeout,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        ) as client:
            yield partial(self._ask, client)

    def _stream(self, requests: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Generation, Any]]:
        """Results as they come, from an event loop in a thread: it goes on while the caller writes, and in notebooks.

        A request is sent when an earlier one is answered and taken, so that little is wasted if the caller leaves.
        """
        results: SimpleQueue[Any] = SimpleQueue()
        unsent, failures = iter(enumerate(requests)), list[BaseException]()
        loop, taken = asyncio.new_event_loop(), asyncio.Semaphore(0)

        async def work(ask: Any) -> None:
            for index, request in unsent:
                if failures:  # nothing new is sent, but answers under way (and paid for) are still delivered
                    return
                try:
                    results.put((index, *await ask(*request)))
                except EndpointError as error:
                    if error.partial is None:
                        failures.append(EndpointError(f"prompt {index}: {error}", error.status))
                        return
                    logger.warning("prompt %d: %s; it counts as cut off", index, error)
                    results.put((index, error.partial, None))
                await taken.acquire()

        async def run() -> None:
            async with self.session() as ask:
                await asyncio.gather(*(work(ask) for _ in range(min(self.concurrency, len(requests)))))

        def follow() -> None:
            try:
                loop.run_until_complete(task)
            except BaseException as error:
                failures.append(error)
            finally:
                loop.close()
                results.put(None)

        task = loop.create_task(run())
        threading.Thread(target=follow, name="endpoint", daemon=True).start()
        try:
            while (result := results.get()) is not None:
                loop.call_soon_threadsafe(taken.release)
                yield result
            if failures:
                raise failures[0]
        finally:
            with suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(task.cancel)

    async def _ask(
        self, client: AsyncOpenAI, prompt: Prompt, params: GenerationParams, seed: int, options: Sequence[str] = ()
    ) -> tuple[Generation, list[float] | None]:
        """One answer; the client sends again what failed by HTTP's rules, this what is no answer in spite of them."""
        for attempt in range(self.max_retries + 1):
            try:
                return self._read(await self._post(client, self._body(prompt, params, seed, options)), params, options)
            except (_Broken, RecursionError) as error:  # the latter of JSON a thousand levels deep
                reason = error
            if attempt < self.max_retries:
                delay = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.75, 1.0)
                logger.warning("%s: %s; trying again in %.1f s", self._shown, self._safe(reason), delay)
                await asyncio.sleep(delay)
        raise self._error(reason)

    def _body(self, prompt: Prompt, params: GenerationParams, seed: int, options: Sequence[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": prompt, "temperature": params.temperature}
        body[self.max_tokens_field] = params.max_new_tokens
        body |= {"logprobs": True, "top_logprobs": 20} if options else {"seed": seed}
        body |= {"top_p": params.top_p} if params.temperature > 0 else {}
        body |= {"stop": list(params.stop)} if params.stop else {}
        for name in self.omit:
            body.pop(name, None)
        if params.schema is not None and self._sends_schemas:
            schema = json.loads(params.schema)
            form = {"name": "reply", "schema": schema, "strict": _is_strict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body | self.extra_body

    async def _post(self, client: AsyncOpenAI, body: dict[str, Any]) -> bytes:
        """The server's answer as it stands: not every server's fits the package's types."""
        import openai

        headers: dict[str, Any] = {} if self._api_key else {"Authorization": openai.Omit()}
        if self._api_key and "api-version" in self._query:  # Azure's own
            headers = {"api-key": self._api_key}
        own = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            # The package's limit is of the time between two pieces of an answer
            async with asyncio.timeout((self.max_retries + 1) * (self.timeout + _LONGEST_WAIT)):
                raw = await client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=own, extra_headers=headers
                )
        except openai.APIStatusError as error:
            status, words = error.status_code, _words_of(error.response.content) or error.response.reason_phrase
            if there := status // 100 == 3 and error.response.headers.get("location"):
                words = f"redirects to {there}, which is not followed: make it the base_url if you trust it"
            if status in (400, 422) and "response_format" in body and _NO_SCHEMA.search(words):
                if self._sends_schemas:
                    logger.warning("%s takes no JSON schema (%s): going on without", self._shown, self._safe(words))
                self._sends_schemas = False
                return await self._post(client, {k: v for k, v in body.items() if k != "response_format"})
            raise self._error(f"HTTP {status}: {words}", status) from None
        except TimeoutError:
            raise self._error("an answer that does not end") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise self._error(f"{type(cause).__name__}: {cause}") from None
        return raw.content

    def _read(
        self, content: bytes, params: GenerationParams, options: Sequence[str]
    ) -> tuple[Generation, list[float] | None]:
        """What a completion says. An error in it is final if its code is that of a refusal."""
        try:
            reply = _dict(json.loads(content.decode("utf-8-sig")))
        except ValueError:
            reply = {}
        choices, usage = reply.get("choices"), _dict(reply.get("usage"))
        choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
        error = reply.get("error") or choice.get("error")
        reason, message = choice.get("finish_reason"), choice.get("message")
        if error or reason == "error" or not isinstance(message, dict):
            code, words = str(_dict(error).get("code")), _words(error) or _words_of(content)
            if code.isdecimal() and 400 <= int(code) < 500 and not _is_passing(int(code)):
                raise self._error(f"{code}: {words}", int(code))
            raise _Broken(f"the answer is not a chat completion: {words}")
        counts = usage.get("completion_tokens"), usage.get("prompt_tokens")
        tokens = [count if isinstance(count, int) else 0 for count in counts]
        if options:
            try:
                top = choice["logprobs"]["content"][0]["top_logprobs"]
                listed = [(own["token"], float(own["logprob"])) for own in top]
            except (KeyError, IndexError, TypeError, ValueError):
                words = "sends no log-probabilities: have the numbers written as text, or use another engine"
                raise EndpointError(f"{self._shown} {words}") from None
            return Generation("", "length", *tokens), sum_by_option(listed, options)
        text = cut_at_stop(_text_of(message.get("content")) or _text_of(message.get("refusal")), params.stop)
        text = self._without_keys(text, 16)  # a shorter one, such as EMPTY, may well be a word of the answer
        generation = Generation(text, "stop" if reason == "stop" else "length", *tokens)
        if reason not in ("stop", "length"):
            raise self._error(f"the answer is not complete: finish_reason is {reason!r}", 200, generation)
        return generation, None

    def _error(self, reason: object, status: int | None = None, partial: Generation | None = None) -> EndpointError:
        if status is not None and _is_passing(status):
            status = None
        after = f" (after {self.max_retries + 1} tries)" if status is None else ""
        return EndpointError(f"{self._shown}: {self._safe(reason)}{after}", status, partial)

    def _safe(self, words: object) -> str:
        """In one line of 300 characters that a terminal can show, without keys."""
        line = " ".join(redacted(self._without_keys(str(words))).split()) or "no message"
        return "".join(own if own.isprintable() else "?" for own in line[:300])

    def _without_keys(self, text: str, least: int = 1) -> str:
        for own in self._private:
            text = text.replace(own, "***") if len(own) >= least else text
        return text


def _check_chats(prompts: Sequence[Prompt]) -> None:
    check_prompts(prompts)
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(f"prompt {index} is plain text, but the endpoint engine needs chats: give messages")


def _is_strict(schema: Any) -> bool:
    """Whether OpenAI's strict mode takes a schema: objects closed, all they may hold required, no bounds of texts."""
    if isinstance(schema, list):
        return all(map(_is_strict, schema))
    if not isinstance(schema, dict):
        return True
    names = schema.get("properties")
    closed = schema.get("additionalProperties") is False and set(schema.get("required", ())) == set(names or ())
    return "maxLength" not in schema and (names is None or closed) and all(map(_is_strict, schema.values()))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_passing(status: int) -> bool:
    return status in (408, 409, 429) or status >= 500


def _text_of(content: Any) -> str:
    """The text of a message: of a list of parts, those that are text, without thoughts."""
    if isinstance(content, list):
        return "".join(map(_text_of, content))
    if isinstance(content, dict) and content.get("type") in ("text", "output_text", "refusal"):
        return _text_of(content.get("text") or content.get("refusal"))
    return content if isinstance(content, str) else ""


def _words_of(data: bytes) -> str:
    """What the server says in a body: JSON of any of the shapes in use, HTML or plain text."""
    text = data.decode("utf-8-sig", errors="replace")
    try:
        return _words(json.loads(text)) or text
    except (ValueError, RecursionError):
        return re.sub(r"<[^>]*>", " ", text)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(filter(None, map(_words, value)))
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    value = {str(key).lower(): own for key, own in value.items()}
    words = next(filter(None, (_words(value.get(name)) for name in _WORDS)), "")
    if words and isinstance(value.get("loc"), list):  # FastAPI's, of a field
        words += f" ({', '.join(map(str, value['loc']))})"
    inner = value.get("metadata")  # of a provider behind the server
    return f"{words}: {inner['raw']}" if isinstance(inner, dict) and inner.get("raw") else words
