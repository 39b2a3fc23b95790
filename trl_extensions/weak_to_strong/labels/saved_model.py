"""A trained classifier or reward model, loaded to be asked: a whole model, or an adapter on its base."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, get_quantization_config

from ..._compat import create_model_from_path
from ...core.generation.models import tokenizer_source
from ...core.generation.types import is_adapter_directory
from ...embedded import resolve_model_name


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def saved_class_names(name: str, model_args: ModelConfig, trust_remote_code: bool) -> list[str] | None:
    """What a whole model calls its classes; None of an adapter, and where they are called LABEL_0, LABEL_1, ..."""
    if is_adapter_directory(name):
        return None
    config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    names = [config.id2label[number] for number in range(config.num_labels)]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def load_saved(
    name: str, num_labels: int, model_args: ModelConfig, trust_remote_code: bool, device: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model as `model_args` say (dtype, attention, revision, quantisation), and its tokenizer.

    Args:
        name: Directory or id; of an adapter its directory. A revision is that of the model, or of the adapter's base.
        num_labels: Outputs there must be.
        model_args: How it is loaded.
        trust_remote_code: As in `from_pretrained`.
        device: Where a model without quantisation goes.

    Raises:
        ValueError: It has another number of outputs, or none.
    """
    options: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
    }
    quantization = get_quantization_config(model_args)
    options |= {"device_map": None} if quantization is None else {"quantization_config": quantization}
    source = {"trust_remote_code": trust_remote_code}
    if is_adapter_directory(name):
        model = _load_adapter(name, num_labels, options)
    else:
        _check_head(name, num_labels, options)
        model = create_model_from_path(name, AutoModelForSequenceClassification, **options)
        source["revision"] = model_args.model_revision
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(name), **source)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return model.to(device) if quantization is None else model, tokenizer


def _check_head(name: str, num_labels: int, options: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(
        name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
    )
    made_for = (config.architectures or [""])[0]
    if made_for and "SequenceClassification" not in made_for and not options["trust_remote_code"]:
        raise ValueError(f"{name} is a {made_for} and has no head to ask: give a model that `train` made.")
    if config.num_labels != num_labels:
        raise ValueError(
            f"{name} has {config.num_labels} outputs where {num_labels} are needed: set `form`, or `class_names` to "
            "the classes it was trained on, or give another model."
        )


def _load_adapter(name: str, num_labels: int, options: dict[str, Any]) -> "PreTrainedModel":
    from peft import PeftConfig, PeftModel

    base = resolve_model_name(PeftConfig.from_pretrained(name).base_model_name_or_path)
    model = create_model_from_path(base, AutoModelForSequenceClassification, num_labels=num_labels, **options)
    try:
        return PeftModel.from_pretrained(model, name)
    except RuntimeError as error:  # several lines, a tensor each
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"{name} does not fit {base} with {num_labels} outputs: set `form`, or `class_names` to the classes it "
            "was trained on."
        ) from error
