"""The model of a classification trainer: loaded with K outputs, wrapped in its adapter, told what padding is."""

import copy
import logging
import os

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..._compat import create_model_from_path, disable_dropout_in_model, get_config_model_id, suppress_seqcls_warning
from .configs import WeakToStrongConfig


logger = logging.getLogger(__name__)

_HEADS = ("score", "classifier", "classification_head")


def load_classifier(
    name: str,
    args: WeakToStrongConfig,
    num_labels: int,
    class_names: list[str] | None,
    quantization_config: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    """A sequence classification model by id or path, float32 unless `args.model_init_kwargs` says otherwise.

    A head the checkpoint does not have is drawn from the current random state.

    Raises:
        ValueError: `quantization_config` is given twice.
    """
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("`quantization_config` is given twice: leave it out of `model_init_kwargs`.")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if class_names:
        options["id2label"] = dict(enumerate(class_names))
        options["label2id"] = {label: number for number, label in enumerate(class_names)}
    with suppress_seqcls_warning():
        return create_model_from_path(name, AutoModelForSequenceClassification, num_labels=num_labels, **options)


def load_tokenizer(model: PreTrainedModel, args: WeakToStrongConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model."""
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(
        get_config_model_id(model.config), revision=revision or "main", trust_remote_code=args.trust_remote_code
    )


def settle_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: WeakToStrongConfig) -> None:
    """Chat template and padding token; the model needs the latter to find the last token of each text.

    Raises:
        ValueError: There is no padding token to be had.
    """
    if args.chat_template_path is not None:
        if os.path.isfile(args.chat_template_path):
            with open(args.chat_template_path, encoding="utf-8") as file:
                tokenizer.chat_template = file.read()
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(args.chat_template_path).chat_template
    pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"The padding token {pad_token!r} is not in the vocabulary: set `tokenizer.pad_token`.")
    tokenizer.pad_token = pad_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """The most tokens a text may have: `max_length`, or less where the model or its tokenizer takes less."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer that knows no limit says 10 to the 30
    known = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return min((limit for limit in (max_length, positions, known) if limit), default=None)


def wrap_classifier(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: WeakToStrongConfig
) -> PreTrainedModel | PeftModel:
    """The model as it is trained: adapter, dtype of its weights, gradient checkpointing, dropout.

    An adapter of another task type (TRL's default is causal language modelling) becomes one for classification, which
    trains the head along.

    Raises:
        ValueError: An adapter on top of an adapter, or one whose head is frozen.
    """
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("`model` has an adapter already: leave `peft_config` out, or merge the adapter first.")
        if peft_config.task_type != "SEQ_CLS":
            logger.info(
                "task_type of the adapter was %s; it is SEQ_CLS here, so that the head is trained.",
                peft_config.task_type,
            )
            peft_config = copy.deepcopy(peft_config)
            peft_config.task_type = "SEQ_CLS"
        # ZeRO-3 gathers parameters of one dtype only
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=quantised or not zero3)
    if isinstance(model, PeftModel):
        _check_head(model)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
            if zero3:
                args.gradient_checkpointing_kwargs = {
                    **(args.gradient_checkpointing_kwargs or {}),
                    "use_reentrant": True,
                }
    if quantised:
        # As TRL does; updates of DoRA's magnitudes would vanish in bfloat16
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model


def _check_head(model: PeftModel) -> None:
    trained = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
    if not trained.intersection(_HEADS):
        raise ValueError(
            "The adapter leaves the classification head frozen: make it with task_type='SEQ_CLS', or add the head to "
            "its `modules_to_save`."
        )
