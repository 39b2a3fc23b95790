"""Random models of known shapes, made on the device itself, and the work that a step of each size does."""

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Size:
    """Shape of a Llama, and how much of everything a step gets.

    Attributes:
        rows, length, prompt: Texts of a step, their tokens, and those of them that are not scored.
        queries, sami_prompt, response: Queries of a SAMI step; tokens of a prompt and of a response.
        shared_prompt: Tokens of a prompt where sharing it is measured.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 128256
    tied: bool = True
    rows: int = 8
    length: int = 512
    prompt: int = 128
    queries: int = 4
    sami_prompt: int = 200
    response: int = 128
    shared_prompt: int = 400


# The shapes of Llama 3.2 1B and Llama 3.1 8B
SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 512, rows=2, length=24, prompt=8, queries=1, sami_prompt=12, response=6,
                 shared_prompt=16),
    "1b": Size(2048, 8192, 16, 32, 8),
    "8b": Size(4096, 14336, 32, 32, 8, tied=False),
}  # fmt: skip


def make_model(
    size: Size, device: torch.device, dtype: torch.dtype, *, seed: int = 0, labels: int | None = None
) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """A random Llama, its weights drawn on the device; with `labels` a classifier."""
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        max_position_embeddings=8192, tie_word_embeddings=size.tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        num_labels=labels or 2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = (LlamaForCausalLM if labels is None else LlamaForSequenceClassification)(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def twin(model: nn.Module) -> nn.Module:
    """Modules of its own around the very weights of a model, to be wrapped and patched by one trainer."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def quantise(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model but its head by 4-bit ones (NF4, doubly quantised), in place.

    As `from_pretrained` does it from a checkpoint, which would have to be written first.
    """
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is head or name == "score":
                continue
            weight = layer.weight.data
            own = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            kept = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True, "module": own}
            own.weight = bnb.nn.Params4bit(weight, **kept).to(weight.device)
            setattr(parent, name, own)
            layer.weight = None
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def lora(classifier: bool = False) -> LoraConfig:
    return LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS" if classifier else "CAUSAL_LM"
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens and a few words: all rows are token ids already."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
