"""Generation with transformers in the running process: batched by length, the model left as it was found."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..modeling.batches import eval_mode, plan_batches
from ..options import check_least
from ..training.encoding import encode_prompt
from .types import (
    Generation,
    GenerationParams,
    Prompt,
    adapter_base,
    check_prompts,
    cut_at_stop,
    is_adapter_directory,
    request_seed,
    tokenizer_source,
)


logger = logging.getLogger(__name__)


class TransformersEngine:
    """Generates with a causal language model in this process.

    Prompts are batched by length and a budget of tokens, padded on the left. A loaded model may be in the middle of
    training: modes, caches, gradient checkpointing, the generation config and the global random state are the same
    afterwards, also when the iterator is abandoned. Pass an unwrapped model (no DDP or FSDP around it). The model's
    own generation defaults (sampling, repetition penalty, ...) are ignored, its end tokens are not.

    Args:
        model: Model id, directory, directory of a PEFT adapter, the embedded model's alias, or a loaded model.
        tokenizer: The model's tokenizer, never modified. By default it is loaded from where the model came from.
        batch_tokens: Most tokens in a batch: rows * (longest prompt + `max_new_tokens`). A longer row goes alone.
        dtype: Dtype to load a named model in; `"auto"` is the checkpoint's own.
        model_init_kwargs: Of `from_pretrained` for a named model, such as `revision` or `attn_implementation`.

    Attributes:
        num_tokens (`int`): Tokens read and written by `generate` since it was made.
        num_places (`int`): Places computed for them, with padding and those of rows that ended before their batch.

    Raises:
        `OSError`: if a named model or its tokenizer cannot be loaded.
        `ValueError`: if `batch_tokens` is below 1 or no tokenizer can be found.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_tokens: int = 16384,
        dtype: str = "auto",
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.batch_tokens, self.num_tokens, self.num_places = batch_tokens, 0, 0
        check_least(self, batch_tokens=1)
        if isinstance(model, (str, Path)):
            name = str(model)
            self.model = _load_model(name, {"dtype": dtype, "trust_remote_code": False} | (model_init_kwargs or {}))
            source = tokenizer_source(name)
        else:
            self.model, source = model, getattr(model.config, "_name_or_path", "")
            name = source or type(model).__name__
        if tokenizer is None:
            if not source:
                raise ValueError("this model was not loaded by name, so its tokenizer is unknown: pass tokenizer=")
            own = {k: v for k, v in (model_init_kwargs or {}).items() if k in ("revision", "trust_remote_code")}
            tokenizer = AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False} | own)
        self.tokenizer, self.name = tokenizer, f"transformers:{name}"
        self._matchers: dict[str, Any] = {}

    def generate(
        self, prompts: Sequence[Prompt], params: GenerationParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Generates for every prompt; see [`GenerationEngine.generate`]. Without `seeds`, samples are the same for the
        same list of prompts only. `ValueError` for a prompt that does not fit into the model's context."""
        token_ids = self._encode(prompts, params.max_new_tokens)
        return self._generate(token_ids, params, None if seeds is None or not params.temperature else list(seeds))

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Iterator[tuple[int, Generation, list[float]]]:
        """Log-probabilities of options; see [`GenerationEngine.option_logprobs`]. Where the tokenizer puts a token of
        white space before an option, the prompt is continued by it first."""
        lead, first_tokens = _first_tokens(self.tokenizer, options)
        token_ids = [ids + lead for ids in self._encode(prompts, 1 + len(lead))]
        config = self._generation_config(GenerationParams(1), output_logits=True)
        for rows in plan_batches(list(map(len, token_ids)), 0, self.batch_tokens):
            logprobs = self._run_model([token_ids[row] for row in rows], config).logits[0].float().log_softmax(-1)
            weights = torch.stack([logprobs[:, ids].logsumexp(-1) for ids in first_tokens], dim=1).tolist()
            for row, values in zip(rows, weights, strict=True):
                yield row, Generation("", "length", 1, len(token_ids[row])), values

    def _encode(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        check_prompts(prompts)
        token_ids = [encode_prompt(self.tokenizer, prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
        context: int | None = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for index, ids in enumerate(token_ids):
            if context and len(ids) + max_new_tokens > context:
                size = f"{len(ids)} tokens, which with max_new_tokens={max_new_tokens} exceeds"
                raise ValueError(f"prompt {index} has {size} the model's context of {context}: shorten one of the two")
        return token_ids

    def _generate(
        self, token_ids: list[list[int]], params: GenerationParams, seeds: list[int] | None
    ) -> Iterator[tuple[int, Generation]]:
        """Batch by batch; nothing of the model is changed while we are suspended. `seeds`: of rows, if sampled so."""
        # Behind `_SamplingByRow`, the likeliest of the noisy scores is a sample
        config = self._generation_config(params if seeds is None else replace(params, temperature=0.0))
        ends, device = config.eos_token_id, self.model.device
        matcher = None if params.schema is None else self._matcher(params.schema, ends)
        forked, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
        batches = plan_batches(list(map(len, token_ids)), params.max_new_tokens, self.batch_tokens)
        for number, rows in enumerate(batches):
            prompts = [token_ids[row] for row in rows]
            width = max(map(len, prompts))
            stops = _StopStrings(self.tokenizer, params.stop, width, len(rows))
            processors = LogitsProcessorList()
            if matcher is not None:
                processors.append(_BySchema([matcher.deep_copy() for _ in rows], width, ends))
            if seeds is not None:
                processors.append(_SamplingByRow(params, [seeds[row] for row in rows], device))
            criteria = StoppingCriteriaList([stops] if params.stop else [])
            options = {"logits_processor": processors, "stopping_criteria": criteria}
            with torch.random.fork_rng(forked, enabled=config.do_sample, device_type=kind):
                if config.do_sample:
                    torch.manual_seed(request_seed(params.seed, number))
                output = self._run_model(prompts, config, **options).sequences
            self.num_places += output.numel()
            for row, ids, end in zip(rows, output[:, width:].tolist(), stops.ends, strict=True):
                eos_at = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                # The end token is no text, even where the tokenizer does not call it special
                ids = ids[: eos_at if end is None else min(eos_at, end)]
                ended = len(ids) == eos_at < output.shape[1] - width
                text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                reason: Any = "stop" if ended or end is not None else "length"
                size = len(ids) + ended, len(token_ids[row])
                self.num_tokens += sum(size)
                yield row, Generation(cut_at_stop(str(text), params.stop), reason, *size)

    def _matcher(self, schema: str, ends: list[int]) -> Any:
        """What follows a schema token by token, ready to be copied; None, said once, where nothing can."""
        if schema in self._matchers:
            return self._matchers[schema]
        self._matchers[schema], tokenizer = None, cast(Any, self.tokenizer)
        width = max(len(tokenizer), self.model.config.get_text_config(decoder=True).vocab_size)
        # Spaces as models write them, and no others: a weak one would go on with white space for ever
        form: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer

            vocabulary = from_tokenizer(tokenizer, n_vocab=width, eos_token=ends or None)
            matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(schema, overrides=form))
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            self._matchers[schema] = matcher
        except (ImportError, ValueError) as error:
            remedy = "pip install llguidance: " if isinstance(error, ImportError) else ""
            reason = " ".join(str(error).split())
            logger.warning("%s: replies are not held to their schema: %s%s", self.name, remedy, reason)
        return self._matchers[schema]

    def _run_model(self, token_ids: list[list[int]], config: GenerationConfig, **options: Any) -> Any:
        """What `generate` of the model returns for a batch, padded on the left."""
        model: Any = self.model
        width = max(map(len, token_ids))
        input_ids = torch.tensor([[config.pad_token_id] * (width - len(ids)) + ids for ids in token_ids])
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in token_ids])
        places = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
        with _left_as_found(model, config), torch.inference_mode():
            return model.generate(**places, generation_config=config, **options)

    def _generation_config(self, params: GenerationParams, **more: Any) -> GenerationConfig:
        eos = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        eos = {*(eos if isinstance(eos, (list, tuple)) else [eos]), self.tokenizer.eos_token_id} - {None}
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = min(eos, default=0)  # masked, so any id does
        own: dict[str, Any] = {"do_sample": False, "use_cache": True, "return_dict_in_generate": True}
        if params.temperature > 0:
            # top_k=0 switches off the 50 that transformers would fill in.
            own |= {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
        own |= {"max_new_tokens": params.max_new_tokens, "eos_token_id": sorted(eos), "pad_token_id": pad}
        return GenerationConfig(**own, **more)


class _BySchema(LogitsProcessor):
    """Lets each row write what its matcher allows next, and nothing but its end once it is whole."""

    def __init__(self, matchers: Sequence[Any], prompt_width: int, ends: Sequence[int]) -> None:
        self.matchers, self.prompt_width, self.ends = matchers, prompt_width, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        allowed = np.zeros((len(self.matchers), scores.shape[1]), dtype=bool)
        written = input_ids[:, -1].tolist() if input_ids.shape[1] > self.prompt_width else None
        for row, matcher in enumerate(self.matchers):
            if written is not None and not matcher.is_stopped():
                matcher.consume_token(written[row])
            if matcher.is_stopped() or matcher.is_error():  # whole, or ended by a stop string and padded
                allowed[row, self.ends] = True
            else:
                bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
                allowed[row] = bits[: scores.shape[1]]
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)


class _SamplingByRow(LogitsProcessor):
    """Samples each row with a random state of its own, so that its text does not depend on the rest of its batch: by
    the Gumbel-max trick, what decodes greedily behind this samples."""

    def __init__(self, params: GenerationParams, seeds: Sequence[int], device: torch.device) -> None:
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(params.temperature))]
        if params.top_p < 1:
            self.warpers.append(TopPLogitsWarper(params.top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.uniform_(generator=generator)
        # -log of uniform numbers: torch takes five times as long to draw exponential ones
        return scores - noise.log_().neg_().log_()


def _first_tokens(tokenizer: PreTrainedTokenizerBase, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The tokens of white space that come before every option, and the tokens each may then begin with."""
    leads: list[list[int]] = []
    firsts: list[set[int]] = []

    def is_text(token: int) -> bool:
        return bool(str(tokenizer.decode([token])).strip())

    for option in options:
        own = tokenizer.encode(option, add_special_tokens=False)
        start = next((place for place, token in enumerate(own) if is_text(token)), len(own))
        spaced = tokenizer.encode(" " + option, add_special_tokens=False)[:1]
        leads.append(own[:start])
        firsts.append({*own[start : start + 1], *filter(is_text, spaced)})
    if not all(firsts) or sum(map(len, firsts)) > len(set().union(*firsts)):
        raise ValueError(f"options {list(options)}: two of them begin with the same token; give ones that do not")
    lead = leads[0] if all(own == leads[0] for own in leads) else []
    return lead, [sorted(own) for own in firsts]


class _StopStrings(StoppingCriteria):
    """Ends a row at the first stop string in its generated text, `ends[row]` tokens from its start. transformers' own
    `stop_strings` also looks at the end of the prompt: a stop of two newlines would fire on one behind another."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_width: int, rows: int) -> None:
        self.tokenizer, self.stop, self.prompt_width = tokenizer, stop, prompt_width
        self.ends: list[int | None] = [None] * rows
        # A token holds a byte or more: a stop lies within as many tokens as it has bytes. The margin keeps it off the
        # window's first token, whose leading space some tokenizers drop.
        self.window = max((len(string.encode()) for string in stop), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> Any:
        start = max(self.prompt_width, input_ids.shape[1] - self.window)
        for row, tail in enumerate(input_ids[:, start:].tolist()):
            if self.ends[row] is None:
                text = self.tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                if any(string in text for string in self.stop):
                    self.ends[row] = input_ids.shape[1] - self.prompt_width
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


@contextmanager
def _left_as_found(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Eval mode (which switches gradient checkpointing off) and `config` as the model's generation config inside,
    everything as before outside. The config is swapped, not only passed to `generate`, because transformers fills
    whatever the passed one leaves unset (a repetition penalty, for one) from the model's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = config
    try:
        with eval_mode(model):
            yield
    finally:
        inner.generation_config = own


def _load_model(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model in eval mode on the accelerator, if there is one."""
    from accelerate import PartialState

    from ...embedded import resolve_model_name

    path, adapter = resolve_model_name(name), None
    if is_adapter_directory(path):
        from peft import PeftModel

        path, adapter = adapter_base(path), path
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except OSError as error:
        wanted = f"the base model {path!r} of the adapter {name!r}" if adapter else f"the model {path!r}"
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"cannot load {wanted}: give a directory with config.json or a hub id ({reason})") from None
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.to(PartialState().device).eval()
