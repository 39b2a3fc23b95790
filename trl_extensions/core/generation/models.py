"""Where the models of a run come from: one set of options for sampling, scoring and every round."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from . import EngineArguments, TransformersEngine, create_engine
from .types import GenerationEngine, is_adapter_directory


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Loads the original of a run and the models made from it.

    Args:
        model_args: The original and how it is loaded.
        engine_args: What samples.
        trust_remote_code: As in `from_pretrained`.
    """

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
        return TransformersEngine(
            model,
            batch_tokens=self.engine_args.engine_batch_tokens,
            dtype=self.engine_args.engine_dtype,
            model_init_kwargs=self.options(model),
        )

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

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The original's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            tokenizer_source(self.model_args.model_name_or_path),
            revision=self.model_args.model_revision,
            trust_remote_code=self.trust_remote_code,
        )


def tokenizer_source(model: str) -> str:
    """Where a model's tokenizer lies: with the model, or with the base of an adapter that was saved without one."""
    from pathlib import Path

    from ...embedded import resolve_model_name

    if not is_adapter_directory(model) or (Path(model) / "tokenizer_config.json").is_file():
        return resolve_model_name(model)
    from peft import PeftConfig

    return resolve_model_name(PeftConfig.from_pretrained(model).base_model_name_or_path)
