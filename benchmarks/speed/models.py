"""The random models and batches that every path of a benchmark shares."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification


@dataclass(frozen=True)
class Size:
    """Shape of a random Llama, with one key head per query head and tied embeddings."""

    hidden: int = 512
    intermediate: int = 2048
    layers: int = 8
    heads: int = 8
    vocabulary: int = 49152


TINY = Size(hidden=32, intermediate=64, layers=1, heads=2, vocabulary=128)


def make_model(size: Size, seed: int = 0, *, frozen_head: bool = False) -> LlamaForCausalLM:
    """A random Llama in float32 and training mode, without dropout.

    Args:
        size: Its shape.
        seed: Of its weights.
        frozen_head: Train everything but the embeddings, which are the output head too.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(size)).train()
    if frozen_head:
        model.get_input_embeddings().requires_grad_(False)
    return model


def make_classifier(size: Size, seed: int = 0) -> LlamaForSequenceClassification:
    """The same with two classes in place of the vocabulary, in eval mode."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(size)).eval()


def _config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def head_parameters(model: LlamaForCausalLM) -> int:
    """Weights of the output head."""
    return model.lm_head.weight.numel()


def backbone_parameters(model: LlamaForCausalLM) -> int:
    """Weights that multiply every token's state: all but the embeddings (which are the head) and the norms."""
    return sum(
        parameter.numel() for layer in model.model.layers for parameter in layer.parameters() if parameter.dim() > 1
    )


def random_tokens(number: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids of `number` texts of `length` tokens, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (number, length), generator=generator).tolist()


def clear_gradients(model: torch.nn.Module) -> None:
    """Forget gradients; the next step allocates them anew, as after `optimizer.zero_grad()`."""
    model.zero_grad(set_to_none=True)
