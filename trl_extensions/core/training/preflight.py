"""What is found out before the first model is loaded or the first token is paid for."""

import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from datasets import Dataset
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from ...embedded import resolve_model_name
from ..generation import EngineArguments, GenerationParams, create_engine
from ..generation.types import is_adapter_directory
from ..runs.run import Run
from .load import say_where


@dataclass(frozen=True)
class Training:
    """A training that a run will do: what `build_trainer` takes, with a few rows like those that will be there."""

    trainer_class: Callable[..., Any]
    model_args: ModelConfig
    config: Any
    rows: list[dict[str, Any]]
    model_class: Any = AutoModelForCausalLM
    model_options: dict[str, Any] = field(default_factory=dict)  # fields of the model's configuration
    name: str | None = None  # what the run calls the model, if not as in `model_args`


def rehearse(run: Run) -> dict[str, PreTrainedModel | None]:
    """All that follows, for a run; returns what it trains, by name, without weights."""
    check_folder(run.folder)
    models = {}
    for own in run.trainings():
        if run.processes > 1:  # each of which will see one GPU
            own.config._n_gpu = min(1, own.config.n_gpu)
        models[own.name or str(own.model_args.model_name_or_path)] = check_training(own)
    check_servers(run.servers())  # last: it may cost something
    return models


def check_folder(folder: Path) -> None:
    """Raise `ValueError` where a run's folder is a file or cannot be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {folder}: {there} is no folder that can be written; name another")


def check_servers(engines: Iterable[EngineArguments]) -> None:
    """Ask every server for one token, once; what is wrong is raised as the engine does."""
    own = [engine for engine in engines if engine.engine == "endpoint"]
    for place, arguments in enumerate(own):
        if arguments not in own[:place]:
            engine = create_engine(replace(arguments, engine_max_retries=0))
            list(engine.generate([[{"role": "user", "content": "Hello"}]], GenerationParams(1)))


def check_training(training: Training) -> PreTrainedModel | None:
    """Construct the trainer, its optimizer and its schedule for a model without weights (meta device).

    Raises a `ValueError` of one line for what does not go together, such as LoRA's targets and the model, and an
    `OSError` where there is no model of that name. Returns the model with the adapter it got, or None where that
    cannot be had without weights, as with sharding or of some remote code.
    """
    config, model_args = copy.copy(training.config), training.model_args
    if config.hub_model_id:
        validate_repo_id(config.hub_model_id)
    name = resolve_model_name(str(model_args.model_name_or_path))
    if config.deepspeed or config.fsdp or is_adapter_directory(name):
        return None
    say_where(config)
    trust, level = {"trust_remote_code": config.trust_remote_code}, logging.root.manager.disable
    own = AutoConfig.from_pretrained(name, revision=model_args.model_revision, **trust, **training.model_options)
    with ExitStack() as stack:
        config.output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(redirect_stderr(io.StringIO()))  # bars, which would speak of rows that are none
        stack.callback(logging.disable, level)
        logging.disable(logging.ERROR)
        config.push_to_hub, config.model_init_kwargs, config.eval_strategy = False, None, "no"
        try:
            get_quantization_config(model_args)
            with init_empty_weights():
                attention = model_args.attn_implementation
                model = training.model_class.from_config(own, attn_implementation=attention, **trust)
            model.tie_weights()  # which the context undoes
            # Neither the trainer then moves it anywhere, nor a reference that is a copy of it
            model.hf_device_map, model.to = {"": "meta"}, lambda *_, **__: model
            rows, adapter = Dataset.from_list(training.rows), get_peft_config(model_args)
            trainer = training.trainer_class(model, config, train_dataset=rows, peft_config=adapter)
            trainer.create_optimizer_and_scheduler(num_training_steps=8)
        except (ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
            # What has no weights cannot be moved or computed with
            if isinstance(error, NotImplementedError | AttributeError) or "meta" in str(error):
                return None
            raise ValueError(" ".join(str(error).split())) from error
    return trainer.model
