"""What every trainer checks about its arguments before TRL sees them."""

import inspect
from typing import TypeVar

from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import PreTrainedModel, TrainingArguments

from ..._compat import get_config_model_id


Config = TypeVar("Config", bound=TrainingArguments)


def as_config(args: TrainingArguments | None, config_class: type[Config], model, method: str) -> Config:
    """`args` as an instance of `config_class`: converted from its base classes, or made with defaults.

    Args:
        args: What the user passed.
        config_class: The method's configuration.
        model: Model or its name, for a default `output_dir`.
        method: Ends that default.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.split('/')[-1]}-{method}")
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
            raise ValueError(
                f"{type(config).__name__} adds virtual tokens, which shift the positions {method} scores: use a "
                "method that changes weights, such as LoRA."
            )


def reject_same_model(model, ref_model: PreTrainedModel | None) -> None:
    """Raise `ValueError` where the original would be trained along."""
    if ref_model is not None and ref_model is model:
        raise ValueError("`ref_model` and `model` are the same object: pass a copy, or leave `ref_model` out.")


def reject_sequence_parallelism(args: TrainingArguments, method: str) -> None:
    """Raise `ValueError` where a sequence would be cut over devices: methods here look at whole ones."""
    config = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        if (getattr(config, name, None) or 1) > 1:
            raise ValueError(
                f"`{name}` above 1 cuts sequences over devices, which {method} does not support: set it to 1."
            )


def reject_sft_settings(config, method: str, *, because: str, loss_type: str, rows: str) -> None:
    """Raise `ValueError` for settings of `SFTConfig` that a method with its own data and loss cannot honour.

    Args:
        config: The method's configuration.
        method: Its name in messages.
        because: What it does instead of packing, as in "SAMI, which ...".
        loss_type: What to do about `loss_type`.
        rows: What to do about `skip_prepare_dataset`.
    """
    for name in ("packing", "eval_packing", "padding_free", "assistant_only_loss"):
        if getattr(config, name):
            raise ValueError(f"`{name}` does not work with {method}, which {because}: set it to False.")
    if config.label_smoothing_factor:
        raise ValueError(f"`label_smoothing_factor` has no meaning for the {method} loss: set it to 0.")
    if (
        config.completion_only_loss is not None
        or config.truncation_mode != "keep_start"
        or config.router_aux_loss_coef
    ):
        raise ValueError(
            "`completion_only_loss`, `truncation_mode` and `router_aux_loss_coef` belong to SFT and have no effect on "
            f"{method}: leave them out."
        )
    if config.loss_type != "nll":
        raise ValueError(f"`loss_type` selects an SFT loss and has no effect on {method}: {loss_type}.")
    if (config.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(f"`skip_prepare_dataset` is not supported: {rows}.")
