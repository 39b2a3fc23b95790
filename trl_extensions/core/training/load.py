"""From the usual arguments to a trained model: what is checked, built, fitted, and left behind whole or not at all."""

import copy
import inspect
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import AutoTokenizer, TrainingArguments
from transformers.utils import is_torch_xla_available
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from ..._compat import create_model_from_path, get_config_model_id
from ...embedded import publish_base
from ..generation.types import adapter_base, is_adapter_directory, tokenizer_source
from ..modeling.batches import keep_trainable
from ..options import option, say_once


logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass
class RunsHere:
    """Mixin before a trainer's configuration: what nobody set follows from the machine and from what is trained.

    Without an accelerator that is the CPU, and `bf16` (autocast) where the processor has matrix units for it (AMX),
    else float32; TRL's default, a GPU and `bf16`, stops there. The learning rate is that of `rates`. Epochs show the
    first number of `shown` of rows, but are not fewer than the second, nor more than the third.
    """

    rates: ClassVar[dict[str, float]] = {"adapter": 2e-4, "all": 2e-5, "head": 2e-3}
    shown: ClassVar[tuple[int, float, float]] = (3000, 1, 3)

    # None until a trainer has it, but of the type that its base class gave it
    learning_rate: float = option(None, "Learning rate. Default: by what is trained, an adapter or all weights.")
    num_train_epochs: float = option(0.0, "Epochs; 0: by the number of rows.")

    def __post_init__(self) -> None:
        config: Any = self
        has_none = not (torch.accelerator.is_available() or is_torch_xla_available())
        config.use_cpu = config.use_cpu or has_none or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if config.use_cpu and config.bf16 is None:
            processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch knows none
            config.bf16 = not config.fp16 and bool(processor.get("amx_bf16"))
        super().__post_init__()  # type: ignore[misc]

    def rate(self, adapter: bool) -> float:
        """The learning rate that was set, or the one by what is trained."""
        trained = "head" if getattr(self, "linear_probe", False) else "adapter" if adapter else "all"
        return self.rates[trained] if self.learning_rate is None else self.learning_rate

    def epochs(self, rows: int) -> float:
        """The epochs that were set, or those by the number of rows that count."""
        return self.num_train_epochs or float(min(self.shown[2], max(self.shown[1], self.shown[0] / max(1, rows))))


def settle(trainer: Any, rows: int | None = None) -> None:
    """Give a trainer a copy of its settings, with those that nobody set derived from its model and the number of rows
    that count, all if left out. They are logged once."""
    given, config = trainer.args, trainer.accelerator.state.deepspeed_plugin
    if not hasattr(given, "rates"):  # plain arguments stay as they are
        return
    found = {"learning_rate": given.rate(isinstance(trainer.model, PeftModel))}
    if given.max_steps <= 0 and trainer.train_dataset is not None:
        found["num_train_epochs"] = given.epochs(len(trainer.train_dataset) if rows is None else rows)
    if told := [f"`{name}` {value:.3g}" for name, value in found.items() if value != getattr(given, name)]:
        trainer.args = copy.copy(given)
        vars(trainer.args).update(found)
        for key in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):  # where "auto" has become None
            node, name = config.hf_ds_config.find_config_node(key) if config else (None, "")
            if node and node.get(name, 0) is None:
                node[name] = trainer.args.learning_rate
        if given.process_index == 0 and logger.isEnabledFor(logging.WARNING):  # a rehearsal is silent
            say_once("derived, as nobody set them: %s", ", ".join(told))


def say_where(args: TrainingArguments) -> None:
    """Log, once, that training is on the CPU, and in what."""
    if args.use_cpu and args.process_index == 0:
        precision = "float16" if args.fp16 else "bfloat16 (autocast)" if args.bf16 else "float32"
        say_once("training on the CPU in %s; `use_cpu` and `bf16` say otherwise", precision)


def as_config(args: TrainingArguments | None, config_class: type[Config], model, method: str) -> Config:
    """`args` as a method's configuration: converted from its base classes, or made with a default `output_dir`."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config_class(f"{name.split('/')[-1]}-{method}")
    say_where(args)
    if isinstance(args, config_class):
        return args
    values = args.to_dict()
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}  # `to_dict` hides them
    accepted = inspect.signature(config_class).parameters
    return config_class(**{name: value for name, value in values.items() if name in accepted})


def reject_prompt_learning(model, peft_config: PeftConfig | None, method: str) -> None:
    """Raise `ValueError` for adapters that put virtual tokens in front, which shift the positions a method scores."""
    configs = [peft_config] if peft_config is not None else []
    configs += list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    for config in configs:
        if isinstance(config, PromptLearningConfig):
            name = type(config).__name__
            raise ValueError(f"{name} adds virtual tokens, which shift the positions {method} scores: use LoRA.")


def reject_stream(dataset: Any, name: str, what: str) -> None:
    """Raise `TypeError` for what is no `Dataset`: faulty rows are named, and their number must be known."""
    if not isinstance(dataset, Dataset):
        found = f"The {name} dataset is a `{type(dataset).__name__}`"
        raise TypeError(f"{found}, which {what} does not work with: load it as a `Dataset` (streaming=False).")


def reject_sequence_parallelism(args: TrainingArguments, method: str) -> None:
    """Raise `ValueError` where a sequence would be cut over devices: methods here look at whole ones."""
    config = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        if (getattr(config, name, None) or 1) > 1:
            raise ValueError(f"`{name}` above 1 cuts sequences over devices, which {method} cannot take: set it to 1.")


def reject_sft_settings(config: SFTConfig, what: str, *, own_data: bool = False) -> None:
    """Raise `ValueError` for settings of `SFTConfig` that tell tokens apart in another way than `what` does; with
    `own_data`, where the method tokenises rows itself, also for those that would have no effect."""
    allowed: dict[str, tuple] = {"label_smoothing_factor": (0.0, None), "loss_type": ("nll",)}
    allowed |= dict.fromkeys(("packing", "eval_packing", "padding_free", "assistant_only_loss"), (False, None))
    if own_data:
        allowed |= {"completion_only_loss": (None,), "truncation_mode": ("keep_start",)}
        allowed |= {"router_aux_loss_coef": (0.0, None)}
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"`{name}` does not work with {what}: leave it at {values[0]!r}.")
    if (config.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(f"`skip_prepare_dataset` does not work with {what}: leave it out.")


def build_trainer(
    trainer_class: type, model_args: ModelConfig, config: Any, rows: Dataset, held_out: Dataset | None
) -> Any:
    """The trainer of a named model with its LoRA and quantisation settings; of a directory that holds a PEFT adapter,
    that adapter is trained on, and a `ValueError` raised if a new one is asked for on top."""
    say_where(config)  # `SFTTrainer` does not
    options = {
        "revision": model_args.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (config.model_init_kwargs or {})
    quantization = get_quantization_config(model_args)
    if is_adapter_directory(model_args.model_name_or_path):
        if model_args.use_peft:
            name = model_args.model_name_or_path
            raise ValueError(f"{name} is an adapter and goes on being trained: leave `use_peft` out, or merge it.")
        model, tokenizer = _load_adapter(model_args.model_name_or_path, options, quantization)
        more = {"processing_class": tokenizer}
    else:
        config.model_init_kwargs, model = options, model_args.model_name_or_path
        more = {"quantization_config": quantization, "peft_config": get_peft_config(model_args)}
    trainer = trainer_class(model, config, train_dataset=rows, eval_dataset=held_out, **more)
    keep_trainable(trainer.model)  # `SFTTrainer` does not by itself
    return trainer


def _load_adapter(path: str, options: dict[str, Any], quantization):
    """The adapter, trainable, on its base as TRL would load that, and its tokenizer."""
    base = adapter_base(path)
    trust = options.get("trust_remote_code", False)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(path), trust_remote_code=trust)
    if quantization is not None:
        options = options | {"quantization_config": quantization}
    if PartialState().num_processes > 1:
        options = options | {"device_map": None}
    return PeftModel.from_pretrained(create_model_from_path(base, **options), path, is_trainable=True), tokenizer


def fit(
    trainer_class: type, model_args: ModelConfig, config: Any, rows: Dataset, held_out: Dataset | None, target: Path
) -> None:
    """Train on rows and leave the model at `target`, which must not exist, whole or not at all; resumes from the last
    checkpoint."""
    if target.exists():
        raise ValueError(f"{target} exists already and is not overwritten: give another `output_dir`.")
    trainer = build_trainer(trainer_class, model_args, config, rows, held_out)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or last_checkpoint(config.output_dir))
    partial = target.with_name(target.name + ".partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
        trainer.state.save_to_json(str(Path(config.output_dir) / "trainer_state.json"))
    trainer.save_model(str(partial))
    trainer.create_model_card(model_name=target.parent.name)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings, such as a token of the hub
        os.replace(Path(config.output_dir) / "README.md", partial / "README.md")
        publish_base(partial)
        os.replace(partial, target)
    if trainer.accelerator.num_processes > 1:
        trainer.end()


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that was written to its end; the trainer writes its state last."""
    if not os.path.isdir(folder):
        return None
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and left out", path)
        else:
            return str(path)
    return None
