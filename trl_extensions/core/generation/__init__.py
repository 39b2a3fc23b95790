"""Text generation behind one protocol: transformers in process, vLLM in process, or an OpenAI-compatible endpoint.

Every engine takes the same prompts and the same [`GenerationParams`] and yields each result as soon as it has one, so
that a caller can write it to disk at once and resume after a kill with the prompts that are still missing.
Importing this module imports no torch; an engine's own file is imported when the engine is first asked for.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .types import (
    Generation,
    GenerationEngine,
    GenerationParams,
    Prompt,
    check_integer,
)


if TYPE_CHECKING:
    from .endpoint import EndpointEngine
    from .transformers import TransformersEngine
    from .vllm import VLLMEngine


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
    "EndpointEngine": ".endpoint",
    "TransformersEngine": ".transformers",
    "VLLMEngine": ".vllm",
}


def __getattr__(name: str) -> Any:
    if name in _ENGINE_MODULES:
        return getattr(importlib.import_module(_ENGINE_MODULES[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
            check_integer(name, getattr(self, name), minimum=1)
        check_integer("engine_max_retries", self.engine_max_retries, minimum=0)
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
        from .endpoint import EndpointEngine

        return EndpointEngine(
            args.engine_base_url,
            model,
            api_key=os.environ.get(args.engine_api_key_env),
            concurrency=args.engine_concurrency,
            max_retries=args.engine_max_retries,
            timeout=args.engine_timeout,
        )
    if args.engine == "vllm":
        from .vllm import VLLMEngine

        return VLLMEngine(
            model,
            dtype=args.engine_dtype,
            tensor_parallel_size=args.engine_tensor_parallel_size,
            gpu_memory_utilization=args.engine_gpu_memory_utilization,
            revision=(model_init_kwargs or {}).get("revision"),
            trust_remote_code=(model_init_kwargs or {}).get("trust_remote_code", False),
        )
    from .transformers import TransformersEngine

    return TransformersEngine(
        model, batch_tokens=args.engine_batch_tokens, dtype=args.engine_dtype, model_init_kwargs=model_init_kwargs
    )
