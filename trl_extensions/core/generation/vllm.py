"""Generation with vLLM in the running process. vLLM is imported when an engine is built, never before."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..options import check_least
from .types import (
    Generation,
    GenerationParams,
    Prompt,
    adapter_base,
    check_prompts,
    cut_at_stop,
    is_adapter_directory,
    request_seed,
    sum_by_option,
)


logger = logging.getLogger(__name__)

# The ranks vLLM has kernels for; an adapter runs under the next one up.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine:
    """Generates with vLLM (extra `vllm`) in this process.

    Args:
        model: Model id, directory, or directory of a LoRA adapter, which runs on its base model.
        chunk_size: Prompts handed over at once. vLLM answers only when a whole call is done: finished rows reach the
            caller's disk in between.
        options: Of `vllm.LLM`, such as `dtype`, `tensor_parallel_size` or `gpu_memory_utilization`.

    Raises:
        `ImportError`: if vLLM is not installed.
        `ValueError`: if an adapter is of a kind or rank vLLM cannot run.
    """

    def __init__(self, model: str, *, chunk_size: int = 512, **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(f"the vllm engine needs vLLM ({error}): pip install vllm") from error
        from ...embedded import resolve_model_name

        self.name, self.chunk_size = f"vllm:{model}", chunk_size
        check_least(self, chunk_size=1)
        path = resolve_model_name(model)
        self._lora_request = None
        if is_adapter_directory(path):
            from vllm.lora.request import LoRARequest

            self._lora_request = LoRARequest("adapter", 1, path)
            adapter = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
            options |= {"enable_lora": True, "max_lora_rank": _lora_rank(path, adapter)}
            if (Path(path) / "tokenizer_config.json").is_file():
                options["tokenizer"] = path
            path = adapter_base(path)
        self._llm = LLM(model=path, **options)
        self._tokenizer = self._llm.get_tokenizer()

    def generate(
        self, prompts: Sequence[Prompt], params: GenerationParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Generates for every prompt; see [`GenerationEngine.generate`]."""
        check_prompts(prompts)
        # One seed a prompt: under a shared one, equal prompts would all get the same sample.
        if seeds is None:
            seeds = [request_seed(params.seed, index) for index in range(len(prompts))]
        sampling = [_sampling_params(params, seed) for seed in seeds]
        return ((index, self._read(output, params)) for index, output in self._run(prompts, sampling))

    def _read(self, output: Any, params: GenerationParams) -> Generation:
        completion = output.outputs[0]
        # vLLM decodes in the prompt's context, which leaves a leading space in front of some tokenizers' first word
        text = cut_at_stop(self._tokenizer.decode(completion.token_ids, skip_special_tokens=True), params.stop)
        tokens = len(completion.token_ids), len(output.prompt_token_ids or ())
        return Generation(text, "length" if completion.finish_reason == "length" else "stop", *tokens)

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Iterator[tuple[int, Generation, list[float]]]:
        """Log-probabilities of options among the 20 likeliest tokens; see [`GenerationEngine.option_logprobs`]."""
        from vllm import SamplingParams

        check_prompts(prompts)
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
        for index, output in self._run(prompts, [params] * len(prompts)):
            listed = [(token.decoded_token or "", token.logprob) for token in output.outputs[0].logprobs[0].values()]
            cost = Generation("", "length", 1, len(output.prompt_token_ids or ()))
            yield index, cost, sum_by_option(listed, options)

    def _run(self, prompts: Sequence[Prompt], params: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        # vLLM has one call for text and one for chats, and neither takes both.
        for run, kind in ((self._llm.generate, str), (self._llm.chat, list)):
            indices = [index for index, prompt in enumerate(prompts) if isinstance(prompt, kind)]
            for start in range(0, len(indices), self.chunk_size):
                chunk = indices[start : start + self.chunk_size]
                own, sampling = [prompts[index] for index in chunk], [params[index] for index in chunk]
                outputs = run(own, sampling_params=sampling, lora_request=self._lora_request, use_tqdm=False)
                yield from zip(chunk, outputs, strict=True)


def _sampling_params(params: GenerationParams, seed: int) -> Any:
    from vllm import SamplingParams

    own: dict[str, Any] = {"top_p": params.top_p, "seed": seed} if params.temperature > 0 else {}
    if params.schema is not None and (structured := _structured_outputs()) is not None:
        own["structured_outputs"] = structured(json=params.schema)
    return SamplingParams(
        max_tokens=params.max_new_tokens, temperature=params.temperature, stop=list(params.stop) or None, **own
    )


@cache
def _structured_outputs() -> Any:
    """What holds vLLM to a schema, from release 0.11 on; None, said once, for an older one."""
    try:
        from vllm.sampling_params import StructuredOutputsParams
    except ImportError as error:
        logger.warning("this vLLM cannot be held to a JSON schema (%s): going on without", error)
        return None
    return StructuredOutputsParams


def _lora_rank(path: str, config: dict[str, Any]) -> int:
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise ValueError(f"{path}: vLLM runs LoRA adapters only, not {kind!r}: use the transformers engine")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > _LORA_RANKS[-1]:
        raise ValueError(f"{path}: vLLM runs LoRA up to rank {_LORA_RANKS[-1]}, this adapter has rank {rank}")
    return next(supported for supported in _LORA_RANKS if rank <= supported)
