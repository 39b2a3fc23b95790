"""Text generation behind one protocol: transformers in process, vLLM in process, or an OpenAI-compatible endpoint.

Every engine takes the same prompts and the same [`GenerationParams`] and yields each result as soon as it has one, so
that a caller can write it to disk at once and resume after a kill with the prompts that are still missing.
Importing this module imports no torch; an engine's own file is imported when the engine is first asked for.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..options import check_least, option, redacted
from .types import Generation, GenerationEngine, GenerationParams, Prompt, is_adapter_directory, tokenizer_source


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from .endpoint import EndpointEngine
    from .transformers import TransformersEngine
    from .vllm import VLLMEngine


__all__ = [
    "EndpointEngine", "EngineArguments", "EngineSpec", "Generation", "GenerationEngine", "GenerationParams",
    "ModelSource", "Prompt", "TransformersEngine", "VLLMEngine", "create_engine", "parse_engine",
]  # fmt: skip

logger = logging.getLogger(__name__)

_ENGINE_MODULES = {"EndpointEngine": ".endpoint", "TransformersEngine": ".transformers", "VLLMEngine": ".vllm"}


def __getattr__(name: str) -> Any:
    if name in _ENGINE_MODULES:
        return getattr(importlib.import_module(_ENGINE_MODULES[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class EngineArguments:
    """Which engine generates, and how. For `TrlParser`: command-line options and YAML keys of the same names.
    `ValueError`, with the field, for a value that is out of range or does not belong to the engine."""

    engine: Literal["transformers", "vllm", "endpoint"] = option(
        "transformers",
        "What generates: `transformers` or `vllm` here, or `endpoint`, a server with the OpenAI chat API.",
    )
    engine_model: str | None = option(None, "Model that generates, as the endpoint calls it. Default: the command's.")
    engine_dtype: str = option("auto", "Dtype to load the model in, e.g. `bfloat16`; `auto` is the checkpoint's own.")
    engine_batch_tokens: int = option(
        16384, "transformers: most tokens in a batch, new ones too. Lower to save memory."
    )
    engine_tensor_parallel_size: int = option(1, "vllm: number of GPUs that share the model.")
    engine_gpu_memory_utilization: float = option(0.9, "vllm: share of the GPU memory it may take, at most 1.")
    engine_base_url: str | None = option(None, "endpoint: the server's address, e.g. `http://localhost:8000/v1`.")
    engine_api_key_env: str = option("OPENAI_API_KEY", "endpoint: environment variable with the API key, if any.")
    engine_concurrency: int = option(8, "endpoint: most requests in flight at once.")
    engine_max_retries: int = option(5, "endpoint: how often a request is sent again when the server is in trouble.")
    engine_timeout: float = option(300.0, "endpoint: seconds to wait for one answer.")
    engine_extra_body: dict[str, Any] | str | None = option(  # noqa: RUF009 (it is `field`)
        None, "endpoint: further fields of every request, YAML or JSON, e.g. `{top_k: 20}`; they win over ours."
    )
    engine_max_tokens_field: str = option(
        "max_tokens", "endpoint: what the server calls the token limit: `max_tokens` or `max_completion_tokens`."
    )
    engine_omit: list[str] | None = option(  # noqa: RUF009
        None, "endpoint: fields that are never sent, for models that refuse them, such as `temperature` or `seed`."
    )

    def __post_init__(self) -> None:
        if isinstance(self.engine_extra_body, str):
            self.engine_extra_body = _from_yaml(self.engine_extra_body, "engine_extra_body")
        if not isinstance(self.engine_extra_body, dict | None):
            raise ValueError(f"engine_extra_body must hold names and values, got {self.engine_extra_body!r}")
        if isinstance(self.engine_omit, str):
            self.engine_omit = [self.engine_omit]
        if self.engine not in (engines := ("transformers", "vllm", "endpoint")):
            raise ValueError(f"engine must be one of {', '.join(engines)}, got {self.engine!r}")
        check_least(self, engine_batch_tokens=1, engine_tensor_parallel_size=1, engine_concurrency=1)
        check_least(self, engine_max_retries=0)
        if not 0 < (share := self.engine_gpu_memory_utilization) <= 1:
            raise ValueError(f"engine_gpu_memory_utilization must be above 0 and at most 1, got {share}")
        if not self.engine_timeout > 0:
            raise ValueError(f"engine_timeout must be a positive number of seconds, got {self.engine_timeout}")
        if self.engine == "endpoint" and not self.engine_base_url:
            raise ValueError("engine: endpoint needs engine_base_url, e.g. http://localhost:8000/v1")
        if not (isinstance(name := self.engine_api_key_env, str) and name.isidentifier()):
            raise ValueError("engine_api_key_env is the name of an environment variable with the key, not the key")
        for name in ("engine_base_url", "engine_extra_body", "engine_omit"):
            if self.engine != "endpoint" and getattr(self, name):
                raise ValueError(f"{name} needs engine: endpoint, but engine is {self.engine!r}")


def create_engine(
    args: EngineArguments, model: str | None = None, model_init_kwargs: dict[str, Any] | None = None
) -> GenerationEngine:
    """Builds the engine the arguments describe.

    Args:
        args: Which engine, and its options.
        model: Model id, directory or adapter directory; used unless `args.engine_model` names another.
        model_init_kwargs: `revision`, `trust_remote_code` and `attn_implementation` for a model of this process.

    Raises:
        `ValueError`: if no model is named.
        `ImportError`: if the engine's package is not installed.
        `OSError`: if the model cannot be found.
    """
    model, loading = args.engine_model or model, model_init_kwargs or {}
    if not model:
        raise ValueError(f"the {args.engine} engine needs a model: set engine_model")

    def own(*names: str) -> dict[str, Any]:
        return {name: getattr(args, f"engine_{name}") for name in names}

    if args.engine == "endpoint":
        from .endpoint import EndpointEngine

        options = own("concurrency", "max_retries", "timeout", "extra_body", "max_tokens_field")
        key, name = os.environ.get(args.engine_api_key_env, ""), args.engine_api_key_env
        if not key.strip() and name != EngineArguments.engine_api_key_env:
            raise ValueError(f"engine_api_key_env: there is no key in the environment variable {name}; set it")
        options |= {"api_key": key, "omit": args.engine_omit or ()}
        return EndpointEngine(str(args.engine_base_url), model, **options)
    if args.engine == "vllm":
        from .vllm import VLLMEngine

        options = own("dtype", "tensor_parallel_size", "gpu_memory_utilization")
        options |= {name: loading[name] for name in ("revision", "trust_remote_code") if name in loading}
        return VLLMEngine(model, **options)
    from .transformers import TransformersEngine

    return TransformersEngine(model, **own("batch_tokens", "dtype"), model_init_kwargs=loading)


@dataclass(frozen=True)
class EngineSpec:
    """Arguments for `create_engine`, and prices of a million tokens read and a million written, in any currency."""

    arguments: EngineArguments
    prices: tuple[float, float] = (0.0, 0.0)


def parse_engine(value: str | dict[str, Any], name: str) -> EngineSpec:
    """Read the setting of an engine, for commands that need several.

    Args:
        value: A model's id or directory, which runs in this process with transformers; or a dict, or YAML of one, with
            `engine`, `prices` (of a million tokens read, and written) and what `EngineArguments` calls `engine_*`.
        name: The setting, for messages.

    Raises:
        ValueError: One line that names the setting and what is wrong with it.
    """
    if isinstance(value, str):
        value = _from_yaml(value, name)
    if isinstance(value, str):
        value = {"model": value}
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a model's name or a dict such as {{model: ...}}, got {value!r}")
    prices = value.get("prices", (0.0, 0.0))
    good = isinstance(prices, (list, tuple)) and [type(price) in (int, float) and price >= 0 for price in prices]
    if good != [True, True]:
        raise ValueError(f"`{name}`: `prices` are two numbers, of a million tokens read and written, got {prices!r}")
    keys = [f.name.removeprefix("engine_") for f in fields(EngineArguments) if f.name != "engine"]
    if unknown := value.keys() - {"engine", "prices", *keys}:
        raise ValueError(f"`{name}` has no key {min(unknown, key=str)!r}; it takes engine, prices, {', '.join(keys)}")
    own = {f"engine_{key}": value[key] for key in keys if key in value}
    default = "endpoint" if "base_url" in value else "transformers"
    try:
        arguments = EngineArguments(engine=value.get("engine", default), **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}`: {error}") from None
    return EngineSpec(arguments, (float(prices[0]), float(prices[1])))


def engine_of(model: Any, name: str = "model") -> GenerationEngine:
    """An engine of a model's name, of a dict that `parse_engine` takes, or of a loaded model; an engine as it is."""
    if isinstance(model, (str, dict)):
        return create_engine(parse_engine(model, name).arguments)
    if hasattr(model, "option_logprobs"):
        return model
    from .transformers import TransformersEngine

    return TransformersEngine(model)


def takes_chats(engine: GenerationEngine) -> bool:
    """Whether prompts are chats to an engine: but for a model in this process without a chat template, they are."""
    tokenizer = getattr(engine, "tokenizer", None)
    return tokenizer is None or tokenizer.chat_template is not None


def _from_yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}` is neither a name nor YAML ({redacted(' '.join(str(error).split()))})") from None


@dataclass(frozen=True)
class ModelSource:
    """Loads the original of a run (`model_args`) and the models made from it; `engine_args` says what samples."""

    model_args: ModelConfig
    engine_args: EngineArguments
    trust_remote_code: bool = False

    def sampler(self, model: str, *, is_original: bool) -> GenerationEngine:
        """What samples from a model: the configured engine, or transformers where an endpoint cannot serve it."""
        if self.engine_args.engine != "endpoint" or is_original:
            return create_engine(self.engine_args, model, self.options(model))
        logger.warning("the endpoint serves the original only: %s samples in this process", model)
        return self.in_process(model)

    def in_process(self, model: str) -> TransformersEngine:
        """The model loaded here, for scoring (`.model`, `.tokenizer`) or for sampling."""
        here = replace(self.engine_args, engine="transformers", engine_model=None, engine_base_url=None)
        engine: Any = create_engine(here, model, self.options(model))
        return engine

    def options(self, model: str) -> dict[str, Any]:
        """What a model is loaded with; a revision belongs to the original, or an adapter on it."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.model_args.attn_implementation:
            options["attn_implementation"] = self.model_args.attn_implementation
        if model == self.model_args.model_name_or_path or is_adapter_directory(model):
            options["revision"] = self.model_args.model_revision
        return options

    def is_conversational(self) -> bool:
        """Whether the original's tokenizer has a chat template."""
        return self.tokenizer().chat_template is not None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The original's tokenizer."""
        from transformers import AutoTokenizer

        own, name = self.model_args, tokenizer_source(str(self.model_args.model_name_or_path))
        trust, revision = self.trust_remote_code, own.model_revision
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)
