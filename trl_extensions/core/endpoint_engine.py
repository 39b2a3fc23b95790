"""Generation on any server that speaks the OpenAI chat API: many requests in flight, patient with passing failures."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub import ChatCompletionOutput, InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import hf_raise_for_status

from .generation import Generation, GenerationParams, Prompt, check_prompts, cut_at_stop, request_seed


logger = logging.getLogger(__name__)


class EndpointError(RuntimeError):
    """A request failed for good; the message is one line with the URL, the status and the prompt's index."""


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
        self._client = _Client(base_url=base_url, api_key=api_key or "none", timeout=timeout)

    def generate(self, prompts: Sequence[Prompt], params: GenerationParams) -> Iterator[tuple[int, Generation]]:
        """
        Generates for every prompt; see [`GenerationEngine.generate`].

        Closing the iterator early drops what has not been sent; answers under way are thrown away.

        Raises:
            `ValueError`: naming the prompt's index, if it is plain text: this API only takes chats.
            `EndpointError`: from the iterator, when a request fails for good.
        """
        check_prompts(prompts)
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                raise ValueError(
                    f"prompt {index} is plain text, but the endpoint engine needs chats: give a list of messages, or "
                    "use the transformers or vllm engine to continue raw text"
                )
        return self._generate(list(prompts), params)

    def _generate(self, prompts: list[Prompt], params: GenerationParams) -> Iterator[tuple[int, Generation]]:
        closed = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        unsent = iter(enumerate(prompts))
        pending: dict[Future[Generation], int] = {}
        failure: BaseException | None = None
        try:
            while True:
                # Nothing new is sent after a failure, but answers under way (and paid for) are still delivered.
                while failure is None and len(pending) < self.concurrency and (item := next(unsent, None)):
                    pending[pool.submit(self._ask, closed, *item, params)] = item[0]
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

    def _ask(self, closed: threading.Event, index: int, prompt: Prompt, params: GenerationParams) -> Generation:
        """One prompt, tried up to `max_retries + 1` times. Runs in a worker thread."""
        for attempt in range(self.max_retries + 1):
            reason, retry_after = "", None
            try:
                return self._read_reply(self._send(index, prompt, params), params)
            except HfHubHTTPError as error:
                status = error.response.status_code
                reason = f"HTTP {status}: {_server_message(error)}"
                if status not in (408, 429) and status < 500:
                    raise EndpointError(f"{self.base_url} refused prompt {index}: {reason}") from None
                retry_after = error.response.headers.get("retry-after")
            except (HTTPError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {_one_line(error)}"
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                reason = f"the answer is not a chat completion: {_one_line(error)}"
            if closed.is_set():
                raise EndpointError(f"{self.base_url}: gave up on prompt {index}: {reason}")
            if attempt < self.max_retries:
                delay = retry_delay(attempt, retry_after)
                logger.warning("%s: prompt %d: %s; trying again in %.1f s", self.base_url, index, reason, delay)
                self._pause(closed, delay)
        raise EndpointError(
            f"{self.base_url} failed on prompt {index} after {self.max_retries + 1} tries: {reason}"
        ) from None

    def _pause(self, closed: threading.Event, seconds: float) -> None:
        """Waits, or less if the run is closed meanwhile."""
        closed.wait(seconds)

    def _send(self, index: int, prompt: Prompt, params: GenerationParams) -> ChatCompletionOutput:
        return self._client.chat_completion(
            prompt,
            model=self.model,
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p if params.temperature > 0 else None,
            stop=list(params.stop) or None,
            seed=request_seed(params.seed, index),
        )

    def _read_reply(self, reply: ChatCompletionOutput, params: GenerationParams) -> Generation:
        if not getattr(reply, "choices", None):
            raise ValueError(f"it has no choices ({getattr(reply, 'error', 'and no error message')})")
        choice = reply.choices[0]
        usage = getattr(reply, "usage", None)
        return Generation(
            text=cut_at_stop(choice.message.content or "", params.stop),
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            num_tokens=usage.completion_tokens if usage is not None else 0,
        )


class _Client(InferenceClient):
    """
    The hub's client on connections of its own.

    The ones all of `huggingface_hub` shares refuse every address under `HF_HUB_OFFLINE`, a local server's included.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._session = type(get_session())(timeout=self.timeout, follow_redirects=True)

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
        `float`: the server's wish, or between half and all of 1, 2, 4, ... seconds, 60 at most.
    """
    if retry_after is not None:
        try:
            return max(0.0, float(retry_after))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
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
