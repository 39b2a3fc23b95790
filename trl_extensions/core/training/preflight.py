"""What is found out before the first model is loaded or the first token is paid for."""

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from ...embedded import resolve_model_name
from ..generation import EngineArguments, GenerationParams, create_engine
from ..generation.types import is_adapter_directory
from .load import say_where


@dataclass(frozen=True)
class Training:
    """A training that a run will do: what `build_trainer` takes, with a few rows like those that will be there, and
    the class of the model."""

    trainer_class: Callable[..., Any]
    model_args: ModelConfig
    config: Any
    rows: list[dict[str, Any]]
    model_class: Any = AutoModelForCausalLM
    model_options: dict[str, Any] | None = None  # fields of the model's configuration


def check_folder(folder: Path) -> None:
    """Raise `ValueError` where a run's folder is a file or cannot be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {folder}: {there} is no folder that can be written: name another")


def check_endpoints(engines: Iterable[EngineArguments]) -> None:
    """Ask every server for one token, once; what is wrong is raised as the engine does."""
    known: list[EngineArguments] = []
    for arguments in engines:
        if arguments.engine == "endpoint" and arguments not in known:
            known.append(arguments)
            engine = create_engine(replace(arguments, engine_max_retries=0))
            list(engine.generate([[{"role": "user", "content": "Hello"}]], GenerationParams(1)))


def check_training(training: Training) -> PreTrainedModel | None:
    """Construct the trainer, its optimizer and its schedule for a model without weights (meta device).

    Raises a `ValueError` of one line for what does not go together, such as LoRA's targets and the model, and an
    `OSError` where there is no model of that name. Returns the model with the adapter it got; None where it
    cannot be had without weights, as with sharding or of some remote code.
    """
    config, model_args = copy.copy(training.config), training.model_args
    if config.push_to_hub and config.hub_model_id:
        validate_repo_id(config.hub_model_id)
    if config.deepspeed or config.fsdp:
        return None
    say_where(config)
    name = resolve_model_name(str(model_args.model_name_or_path))
    is_adapter = is_adapter_directory(name)
    if is_adapter:
        name = resolve_model_name(PeftConfig.from_pretrained(name).base_model_name_or_path)
    options = {"trust_remote_code": config.trust_remote_code}
    revision = None if is_adapter else model_args.model_revision
    own = AutoConfig.from_pretrained(name, revision=revision, **options, **(training.model_options or {}))
    with tempfile.TemporaryDirectory() as folder, _silence():
        config.output_dir, config.push_to_hub, config.model_init_kwargs = folder, False, None
        config.disable_tqdm, config.eval_strategy = True, "no"
        config.resume_from_checkpoint = None
        try:
            get_quantization_config(model_args)
            with init_empty_weights():
                options["attn_implementation"] = model_args.attn_implementation
                model = training.model_class.from_config(own, **options)
            model.tie_weights()  # which the context undoes
            # Neither the trainer then moves it anywhere, nor a reference that is a copy of it
            model.hf_device_map, model.to = {"": "meta"}, lambda *_, **__: model
            adapter = None if is_adapter else get_peft_config(model_args)
            trainer = training.trainer_class(
                model, config, train_dataset=Dataset.from_list(training.rows), peft_config=adapter
            )
            trainer.create_optimizer_and_scheduler(num_training_steps=8)
        except (ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
            # What has no weights cannot be moved or computed with; packages for `report_to` are missed by this too
            if isinstance(error, NotImplementedError | AttributeError) or "meta" in str(error):
                return None
            raise ValueError(" ".join(str(error).split())) from error
    return trainer.model


@contextmanager
def _silence() -> Iterator[None]:
    """No log lines or bars: they would speak of rows and weights that are none."""
    level, bars = logging.root.manager.disable, not are_progress_bars_disabled()
    logging.disable(logging.ERROR)
    disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
        if bars:
            enable_progress_bars()
