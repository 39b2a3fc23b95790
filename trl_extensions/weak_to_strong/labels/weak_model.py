"""The weak model whose token distributions a strong one learns: loaded, compared, its head cut to common rows."""

from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..._compat import create_model_from_path, get_config_model_id, is_deepspeed_zero3_enabled
from ...core.modeling.head import OutputHead
from ...core.modeling.reference import FrozenReference, frozen_model


_INSTEAD = "To train on text that the weak model wrote, which needs no common vocabulary, leave `weak_model` out"


def weak_reference(
    weak_model: str | PreTrainedModel | PeftModel,
    weak_tokenizer: PreTrainedTokenizerBase | None,
    strong: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    accelerator: Accelerator,
) -> tuple[FrozenReference, int]:
    """The weak model, prepared as a frozen reference for the launcher in use, and how many rows of the output head
    both models have: models of one tokenizer may be padded to different sizes.

    By name it is loaded with the `dtype` and `attn_implementation` of the strong one; without a tokenizer the one that
    lies where it came from is compared. A `ValueError` says why its distributions are no target.
    """
    if weak_tokenizer is None:
        name = weak_model if isinstance(weak_model, str) else get_config_model_id(weak_model.config)
        if not name:
            raise ValueError("Where the tokenizer of `weak_model` lies is unknown: pass `weak_processing_class`.")
        weak_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    _check_same_vocabulary(tokenizer, weak_tokenizer)
    weak: Any = weak_model
    if isinstance(weak_model, str):
        given: Any = args.model_init_kwargs or {}
        options = {option: given[option] for option in ("dtype", "attn_implementation") if option in given}
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        weak = create_model_from_path(weak_model, trust_remote_code=args.trust_remote_code, **options)
    sizes = [model.config.get_text_config().vocab_size for model in (strong, weak)]
    highest = max(tokenizer.get_vocab().values())
    if highest >= min(sizes):
        found = f"ids up to {highest}, but the strong model has {sizes[0]} rows and the weak one {sizes[1]}"
        raise ValueError(f"The tokenizer has {found}: call `resize_token_embeddings` on the smaller. {_INSTEAD}.")
    if sizes[0] > sizes[1] and is_deepspeed_zero3_enabled():
        found = f"The strong model has {sizes[0]} vocabulary rows, the weak one {sizes[1]}"
        raise ValueError(f"{found}, and ZeRO-3 cannot cut a head: use ZeRO-2 or FSDP 2, or resize the embeddings.")
    if any(module is weak for module in strong.modules()):
        raise ValueError("`weak_model` and `model` are the same object, so the target would be trained: pass a copy.")
    if getattr(weak.config, "is_encoder_decoder", False):
        raise ValueError(f"`weak_model` is an encoder-decoder, token distributions need a decoder. {_INSTEAD}.")
    return frozen_model(weak, accelerator), min(sizes)


def _check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, weak_tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where a token id means one thing to the strong model and another to the weak one."""
    strong, weak = (
        {number: token for token, number in one.get_vocab().items()} for one in (tokenizer, weak_tokenizer)
    )
    if strong == weak:
        return
    first = min(number for number in strong.keys() | weak.keys() if strong.get(number) != weak.get(number))
    ours, theirs = (repr(one[first]) if first in one else "no token" for one in (strong, weak))
    sizes = f"strong model ({len(strong)} tokens) and the weak one ({len(weak)} tokens)"
    found = f"first in id {first}: {ours} for the strong model, {theirs} for the weak one"
    raise ValueError(f"The vocabularies of the {sizes} differ, {found}. {_INSTEAD}.")


def narrow(head: OutputHead, rows: int) -> OutputHead:
    """The head without what lies behind its first `rows` rows. A weak head that ZeRO-3 keeps in parts has no rows to
    see here; the divergence reads as many of it as the strong head has."""
    if head.weight.shape[0] <= rows:
        return head
    return replace(head, weight=head.weight[:rows], bias=head.bias[:rows] if head.bias is not None else None)
