"""Text generation behind one protocol: transformers in process, vLLM in process, or an OpenAI-compatible endpoint.

Every engine takes the same prompts and the same [`GenerationParams`] and yields each result as soon as it has one, so
that a caller can write it to disk at once and resume after a kill with the prompts that are still missing.
Importing this module imports no torch; an engine's own file is imported when the engine is first asked for.
"""

from __future__ import annotations

import importlib
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias


if TYPE_CHECKING:
    from .endpoint_engine import EndpointEngine
    from .transformers_engine import TransformersEngine
    from .vllm_engine import VLLMEngine


__all__ = [
    "EndpointEngine",
    "EngineArguments",
    "Generation",
    "GenerationEngine",
    "GenerationParams",
    "Prompt",
    "TransformersEngine",
    "VLLMEngine",
    "create_engine",
]

_ENGINE_MODULES = {
    "EndpointEngine": ".endpoint_engine",
    "TransformersEngine": ".transformers_engine",
    "VLLMEngine": ".vllm_engine",
}

# Text to be continued as it stands, or chat messages that the model's chat template renders.
Prompt: TypeAlias = str | list[dict[str, str]]


def __getattr__(name: str) -> Any:
    if name in _ENGINE_MODULES:
        return getattr(importlib.import_module(_ENGINE_MODULES[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class GenerationParams:
    """
    How to decode. A model's own sampling defaults never apply: what is not said here is off.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `350`):
            Most tokens to generate for a prompt.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0 decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus: sample from the smallest set of tokens whose probability reaches this. Unused when greedy.
        stop (`tuple[str, ...]`, *optional*, defaults to `()`):
            Generation ends at the first of these strings in the generated text, which is cut before it.
        seed (`int`, *optional*, defaults to `0`):
            Seed for sampling. Unused when greedy.

    Raises:
        `ValueError`: naming the field, if a value is out of range or of the wrong type.
    """

    max_new_tokens: int = 350
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, minimum=1)
        _check_integer("seed", self.seed, minimum=0)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Generation:
    """
    What a model wrote for one prompt.

    Attributes:
        text (`str`):
            The generated text, without the prompt, special tokens, the stop string and trailing whitespace.
        finish_reason (`"stop"` or `"length"`):
            `"stop"` if the model ended or reached a stop string, `"length"` if `max_new_tokens` cut it off.
        num_tokens (`int`):
            Tokens generated, the end token and the tokens of a stop string included.
        num_prompt_tokens (`int`):
            Tokens of the prompt, 0 where an endpoint does not say.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    num_prompt_tokens: int = field(default=0, compare=False)


class GenerationEngine(Protocol):
    """What every engine offers."""

    name: str

    def generate(
        self, prompts: Sequence[Prompt], params: GenerationParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """
        Generates for every prompt.

        Bad prompts are refused here, before anything is generated. The iterator may be abandoned at any point.

        Args:
            prompts (`Sequence[Prompt]`):
                Text to continue, or chat messages to answer.
            params ([`GenerationParams`]):
                How to decode.
            seeds (`Sequence[int]`, *optional*):
                A seed for each prompt in place of the one of `params`. What is sampled for a prompt then depends on
                its own seed only, whatever other prompts there are.

        Yields:
            `tuple[int, Generation]`: an index into `prompts` and its result, each index once, in any order.

        Raises:
            `TypeError` or `ValueError`: naming the prompt's index.
        """
        ...

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Iterator[tuple[int, Generation, list[float]]]:
        """
        Says how likely it is that the answer to each prompt begins with each of a few options.

        Args:
            prompts (`Sequence[Prompt]`):
                As for `generate`.
            options (`Sequence[str]`):
                Short strings that differ in their first tokens, such as digits. A leading space does not count.

        Yields:
            `tuple[int, Generation, list[float]]`: an index into `prompts`, what it cost (an empty text), and the
            log-probability of each option in nats, without the temperature. An engine that only lists its likeliest
            tokens gives minus infinity for the others.

        Raises:
            `TypeError` or `ValueError`: naming the prompt's index, or options that begin with the same token.
        """
        ...


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """
    Refuses anything that is neither a string nor a list of chat messages.

    Raises:
        `TypeError` or `ValueError`: one line with the index of the first bad prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of prompts, got one string; wrap it in a list")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"prompt {index} is empty")
            continue
        if not isinstance(prompt, list):
            raise TypeError(f"prompt {index} must be a string or a list of messages, got {type(prompt).__name__}")
        if not prompt:
            raise ValueError(f"prompt {index} has no messages")
        for message in prompt:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise TypeError(
                    f"prompt {index}: a message must be a dict with the strings 'role' and 'content', got {message!r}"
                )


def is_adapter_directory(model: str | os.PathLike[str]) -> bool:
    """Whether a path holds a PEFT adapter (`adapter_config.json`)."""
    return (Path(model) / "adapter_config.json").is_file()


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it, without trailing whitespace."""
    ends = [end for end in (text.find(string) for string in stop) if end >= 0]
    return text[: min(ends, default=len(text))].rstrip()


def sum_by_option(listed: Iterable[tuple[str, float]], options: Sequence[str]) -> list[float]:
    """
    The log-probability of each option, out of a list of tokens with theirs.

    Args:
        listed (`Iterable[tuple[str, float]]`):
            Tokens as text and their log-probabilities. White space around a token, and the marks that some tokenizers
            write for it, do not count.
        options (`Sequence[str]`):
            What to look for.

    Returns:
        `list[float]`: in nats; tokens that are the same option add up, minus infinity for one that is not listed.
    """
    shares = dict.fromkeys(options, 0.0)
    for token, logprob in listed:
        token = token.strip(" \n\t\u0120\u010a\u2581")
        if token in shares:
            shares[token] += math.exp(logprob)
    return [math.log(shares[option]) if shares[option] > 0 else -math.inf for option in options]


def request_seed(seed: int, index: int | str) -> int:
    """
    The seed of one request, batch or named series of them, in 31 bits.

    Mixed rather than added: request 1 under seed 0 must not repeat request 0 under seed 1, and equal prompts in one
    run must not all get the same sample.
    """
    return random.Random(f"{seed}/{index}").getrandbits(31)


@dataclass
class EngineArguments:
    """
    Which engine generates, and how. For `TrlParser`: command-line options and YAML keys of the same names.

    Raises:
        `ValueError`: naming the field, if a value is outside its choices or does not belong to the chosen engine.
    """

    engine: Literal["transformers", "vllm", "endpoint"] = field(
        default="transformers",
        metadata={
            "help": "What generates: `transformers` in this process, `vllm` in this process, or `endpoint`, a server "
            "that speaks the OpenAI chat API."
        },
    )
    engine_model: str | None = field(
        default=None,
        metadata={
            "help": "Model that generates, or the name the endpoint knows it by. Default: the model of the command."
        },
    )
    engine_dtype: str = field(
        default="auto",
        metadata={"help": "Dtype to load the model in, e.g. `float32` or `bfloat16`; `auto` is the checkpoint's own."},
    )
    engine_batch_tokens: int = field(
        default=16384,
        metadata={
            "help": "transformers: most tokens in a batch, prompts and `max_new_tokens` together. Lower it when "
            "memory runs out."
        },
    )
    engine_tensor_parallel_size: int = field(
        default=1, metadata={"help": "vllm: number of GPUs that share the model."}
    )
    engine_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "vllm: share of the GPU memory it may take, above 0 and at most 1."}
    )
    engine_base_url: str | None = field(
        default=None, metadata={"help": "endpoint: the server's address, e.g. `http://localhost:8000/v1`."}
    )
    engine_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "endpoint: environment variable that holds the API key, if the server wants one."},
    )
    engine_concurrency: int = field(default=8, metadata={"help": "endpoint: most requests in flight at once."})
    engine_max_retries: int = field(
        default=5, metadata={"help": "endpoint: how often a request that failed for a passing reason is sent again."}
    )
    engine_timeout: float = field(default=300.0, metadata={"help": "endpoint: seconds to wait for one answer."})

    def __post_init__(self) -> None:
        engines = ("transformers", "vllm", "endpoint")
        if self.engine not in engines:
            raise ValueError(f"engine must be one of {', '.join(engines)}, got {self.engine!r}")
        for name in ("engine_batch_tokens", "engine_tensor_parallel_size", "engine_concurrency"):
            _check_integer(name, getattr(self, name), minimum=1)
        _check_integer("engine_max_retries", self.engine_max_retries, minimum=0)
        share = self.engine_gpu_memory_utilization
        if not 0 < share <= 1:
            raise ValueError(f"engine_gpu_memory_utilization must be above 0 and at most 1, got {share}")
        if not self.engine_timeout > 0:
            raise ValueError(f"engine_timeout must be a positive number of seconds, got {self.engine_timeout}")
        if self.engine == "endpoint" and not self.engine_base_url:
            raise ValueError("engine: endpoint needs engine_base_url, e.g. http://localhost:8000/v1")
        if self.engine != "endpoint" and self.engine_base_url:
            raise ValueError(f"engine_base_url needs engine: endpoint, but engine is {self.engine!r}")


def create_engine(
    args: EngineArguments, model: str | None = None, model_init_kwargs: dict[str, Any] | None = None
) -> GenerationEngine:
    """
    Builds the engine the arguments describe.

    Args:
        args ([`EngineArguments`]):
            Which engine, and its options.
        model (`str`, *optional*):
            Model id, directory or adapter directory; used unless `args.engine_model` names another.
        model_init_kwargs (`dict`, *optional*):
            `revision`, `trust_remote_code` and `attn_implementation` for a model loaded in this process.

    Raises:
        `ValueError`: if no model is named.
        `ImportError`: if the engine's package is not installed.
        `OSError`: if the model cannot be found.
    """
    model = args.engine_model or model
    if not model:
        raise ValueError(f"the {args.engine} engine needs a model: set engine_model")
    if args.engine == "endpoint":
        from .endpoint_engine import EndpointEngine

        return EndpointEngine(
            args.engine_base_url,
            model,
            api_key=os.environ.get(args.engine_api_key_env),
            concurrency=args.engine_concurrency,
            max_retries=args.engine_max_retries,
            timeout=args.engine_timeout,
        )
    if args.engine == "vllm":
        from .vllm_engine import VLLMEngine

        return VLLMEngine(
            model,
            dtype=args.engine_dtype,
            tensor_parallel_size=args.engine_tensor_parallel_size,
            gpu_memory_utilization=args.engine_gpu_memory_utilization,
            revision=(model_init_kwargs or {}).get("revision"),
            trust_remote_code=(model_init_kwargs or {}).get("trust_remote_code", False),
        )
    from .transformers_engine import TransformersEngine

    return TransformersEngine(
        model, batch_tokens=args.engine_batch_tokens, dtype=args.engine_dtype, model_init_kwargs=model_init_kwargs
    )


def _check_integer(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
