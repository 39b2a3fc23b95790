"""Generation on any server that speaks the OpenAI chat API: many requests in flight, patient with passing failures."""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import ChatCompletionOutput, InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import hf_raise_for_status

from .types import Generation, GenerationParams, Prompt, check_prompts, cut_at_stop, request_seed, sum_by_option


logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_PAUSE = 3600.0  # seconds


class EndpointError(RuntimeError):
    """A request failed for good; the message is one line with the URL, the status and which prompt it was.

    Attributes:
        status (`int`, *optional*):
            The HTTP status of a refusal (4xx); `None` where the server could not be reached or kept failing.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointEngine:
    """
    Generates by asking a server, through [`huggingface_hub.InferenceClient`].

    Up to `concurrency` requests are in flight; results come as they finish. Rate limits (429), server errors (5xx),
    time-outs, lost connections and broken answers are retried with growing, jittered pauses, or after the pause the
    server asks for. Any other refusal (4xx) ends the run at once with the server's own words; answers that are under
    way by then are still delivered first.

    Sampling defaults that the OpenAI API cannot express (`top_k`, for one) stay the server's.

    Args:
        base_url (`str`):
            Address of the server, with or without `/v1`.
        model (`str`):
            Name the server knows the model by.
        api_key (`str`, *optional*):
            Key the server wants. Without one none is sent, not even the Hugging Face token of this machine.
        concurrency (`int`, *optional*, defaults to `8`):
            Most requests in flight.
        max_retries (`int`, *optional*, defaults to `5`):
            How often one request is sent again.
        timeout (`float`, *optional*, defaults to `300.0`):
            Seconds to wait for one answer.

    Raises:
        `ValueError`: if an argument is out of range or `base_url` is not an http address.
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
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {max_retries}")
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.name = f"endpoint:{model}"
        # Left without a key, the client would send the user's Hugging Face token to whatever server this is.
        self._client = _Client(concurrency, base_url=base_url, api_key=api_key or "none", timeout=timeout)

    def generate(
        self, prompts: Sequence[Prompt], params: GenerationParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """
        Generates for every prompt; see [`GenerationEngine.generate`].

        Closing the iterator early drops what has not been sent; answers under way are thrown away.

        Raises:
            `ValueError`: naming the prompt's index, if it is plain text: this API only takes chats.
            `EndpointError`: from the iterator, when a request fails for good.
        """
        check_prompts(prompts)
        _check_chats(prompts)
        if seeds is None:
            seeds = [request_seed(params.seed, index) for index in range(len(prompts))]
        return self._run(
            [partial(self._answer, prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        )

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Iterator[tuple[int, Generation, list[float]]]:
        """
        Log-probabilities of options; see [`GenerationEngine.option_logprobs`].

        A server lists its 20 likeliest tokens at most; an option that is not among them gets minus infinity.

        Raises:
            `ValueError`: naming the prompt's index, if it is plain text.
            `EndpointError`: from the iterator, when a request fails for good or the server sends no log-probabilities.
        """
        check_prompts(prompts)
        _check_chats(prompts)
        results = self._run([partial(self._weigh, prompt, options) for prompt in prompts])
        return ((index, *result) for index, result in results)

    def ask(
        self, prompt: Prompt, params: GenerationParams, seed: int, closed: threading.Event | None = None
    ) -> Generation:
        """One answer, in the calling thread, with the same retries; gives up early once `closed` is set.

        Raises:
            `EndpointError`: when the request fails for good.
        """
        return self._try(closed or threading.Event(), "a prompt", partial(self._answer, prompt, params, seed))

    def weigh(
        self, prompt: Prompt, options: Sequence[str], closed: threading.Event | None = None
    ) -> tuple[Generation, list[float]]:
        """`option_logprobs` of one prompt, as `ask` asks."""
        return self._try(closed or threading.Event(), "a prompt", partial(self._weigh, prompt, options))

    def _run(self, requests: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T]]:
        """Up to `concurrency` requests at once, results as they come."""
        closed = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        unsent = iter(enumerate(requests))
        pending: dict[Future[T], int] = {}
        failure: BaseException | None = None
        try:
            while True:
                # Nothing new is sent after a failure, but answers under way (and paid for) are still delivered.
                while failure is None and len(pending) < self.concurrency and (item := next(unsent, None)):
                    index, request = item
                    pending[pool.submit(self._try, closed, f"prompt {index}", request)] = index
                if not pending:
                    break
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    index, error = pending.pop(future), future.exception()
                    if error is None:
                        yield index, future.result()
                    else:
                        failure = failure or error
                        closed.set()
            if failure is not None:
                raise failure
        finally:
            closed.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, closed: threading.Event, what: str, request: Callable[[], T]) -> T:
        """One request, tried up to `max_retries + 1` times. Runs in a worker thread."""
        for attempt in range(self.max_retries + 1):
            reason, retry_after = "", None
            try:
                return request()
            except HfHubHTTPError as error:
                status = error.response.status_code
                reason = f"HTTP {status}: {_server_message(error)}"
                if status not in (408, 429) and status < 500:
                    raise EndpointError(f"{self.base_url} refused {what}: {reason}", status) from None
                retry_after = error.response.headers.get("retry-after")
            except (HTTPError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {_one_line(error)}"
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                reason = f"the answer is not a chat completion: {_one_line(error)}"
            if closed.is_set():
                raise EndpointError(f"{self.base_url}: gave up on {what}: {reason}")
            if attempt < self.max_retries:
                delay = retry_delay(attempt, retry_after)
                logger.warning("%s: %s: %s; trying again in %.1f s", self.base_url, what, reason, delay)
                self._pause(closed, delay)
        raise EndpointError(f"{self.base_url} failed on {what} after {self.max_retries + 1} tries: {reason}") from None

    def _pause(self, closed: threading.Event, seconds: float) -> None:
        """Waits, or less if the run is closed meanwhile."""
        closed.wait(seconds)

    def _answer(self, prompt: Prompt, params: GenerationParams, seed: int) -> Generation:
        reply = self._client.chat_completion(
            prompt,
            model=self.model,
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p if params.temperature > 0 else None,
            stop=list(params.stop) or None,
            seed=seed,
        )
        choice = _only_choice(reply)
        return Generation(
            text=cut_at_stop(choice.message.content or "", params.stop),
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            **_usage(reply),
        )

    def _weigh(self, prompt: Prompt, options: Sequence[str]) -> tuple[Generation, list[float]]:
        reply = self._client.chat_completion(
            prompt, model=self.model, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20
        )
        content = getattr(getattr(_only_choice(reply), "logprobs", None), "content", None)
        if not content:
            raise EndpointError(
                f"{self.base_url} sends no log-probabilities: have the numbers written as text, or use another engine"
            )
        listed = [(token.token, token.logprob) for token in content[0].top_logprobs]
        return Generation("", "length", **_usage(reply)), sum_by_option(listed, options)


def _only_choice(reply: ChatCompletionOutput) -> Any:
    if not getattr(reply, "choices", None):
        raise ValueError(f"it has no choices ({getattr(reply, 'error', 'and no error message')})")
    return reply.choices[0]


def _usage(reply: ChatCompletionOutput) -> dict[str, int]:
    usage = getattr(reply, "usage", None)
    if usage is None:
        return {"num_tokens": 0}
    return {
        "num_tokens": getattr(usage, "completion_tokens", None) or 0,
        "num_prompt_tokens": getattr(usage, "prompt_tokens", None) or 0,
    }


def _check_chats(prompts: Sequence[Prompt]) -> None:
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(
                f"prompt {index} is plain text, but the endpoint engine needs chats: give a list of messages, or "
                "use the transformers or vllm engine to continue raw text"
            )


class _Client(InferenceClient):
    """
    The hub's client on connections of its own.

    The ones all of `huggingface_hub` shares refuse every address under `HF_HUB_OFFLINE`, a local server's included.
    """

    def __init__(self, concurrency: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        session = type(get_session())
        # 20 connections are kept open unless told otherwise, and requests beyond 100 wait for another to end. Releases
        # of the hub's client build on httpx or httpx2, which have this in common.
        limits = sys.modules[session.__module__.partition(".")[0]].Limits(
            max_connections=None, max_keepalive_connections=concurrency
        )
        self._session = session(timeout=self.timeout, follow_redirects=True, limits=limits)

    def _inner_post(self, request_parameters: Any, *, stream: bool = False) -> bytes:
        response = self._session.post(
            request_parameters.url, json=request_parameters.json, headers=request_parameters.headers
        )
        hf_raise_for_status(response)
        return response.content


def retry_delay(attempt: int, retry_after: str | None) -> float:
    """
    Seconds to wait before the next try.

    Args:
        attempt (`int`):
            Tries that failed before this one.
        retry_after (`str`, *optional*):
            The server's `Retry-After` header, seconds or an HTTP date; it overrules the growing pause.

    Returns:
        `float`: the server's wish, an hour at most, or between half and all of 1, 2, 4, ... seconds, 60 at most.
    """
    if retry_after is not None:
        try:
            return min(max(0.0, float(retry_after)), _LONGEST_PAUSE)
        except ValueError:
            pass
        try:
            wish = parsedate_to_datetime(retry_after).timestamp() - time.time()
            return min(max(0.0, wish), _LONGEST_PAUSE)
        except ValueError:
            logger.warning("ignoring an unreadable Retry-After header: %r", retry_after)
    return min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)


def _server_message(error: HfHubHTTPError) -> str:
    """What the server says went wrong, in one line."""
    try:
        body = error.response.json()["error"]
        message = body["message"] if isinstance(body, dict) else body
    except (ValueError, TypeError, KeyError):
        message = error.server_message or error.response.reason_phrase
    return _one_line(message)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:300] or "no message"
