"""Several continuations of one prompt in one sequence: the same numbers for fewer tokens.

The prompt stands once, its continuations follow one after another. Positions restart after the prompt, and a mask lets
a continuation see the prompt and itself only, so that every token's state is what it would be without the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..._compat import is_deepspeed_zero3_enabled
from .batches import eval_mode
from .head import last_hidden_states


# Full attention and rotary positions from `position_ids`: exact without a look at the weights
_KNOWN_EXACT = {
    "cohere", "gemma", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


class PackedBatch(NamedTuple):
    """One sequence: a prompt with its continuations behind it."""

    input_ids: list[int]
    group_ids: list[int]  # the number of the continuation a token belongs to, -1 in the prompt
    position_ids: list[int]  # which restart after the prompt


def pack_shared_prefix(prompt: Sequence[int], continuations: Sequence[tuple[int, Sequence[int]]]) -> PackedBatch:
    """A prompt and its continuations, each with its number, as one sequence."""
    input_ids, group_ids, position_ids = list(prompt), [-1] * len(prompt), list(range(len(prompt)))
    for number, continuation in continuations:
        input_ids += continuation
        group_ids += [number] * len(continuation)
        position_ids += range(len(prompt), len(prompt) + len(continuation))
    return PackedBatch(input_ids, group_ids, position_ids)


def last_states(model: nn.Module, inputs: dict[str, torch.Tensor], group_ids: torch.Tensor | None) -> torch.Tensor:
    """Final hidden states `(S, T, H)` of a batch, whose prompts are shared if it has `position_ids`."""
    layout: dict[str, torch.Tensor | BlockMask] = {"attention_mask": inputs["attention_mask"]}
    if "position_ids" in inputs:
        mask = attention_mask(group_ids, inputs["attention_mask"], model)
        layout = {"attention_mask": mask, "position_ids": inputs["position_ids"]}
    return last_hidden_states(model, input_ids=inputs["input_ids"], **layout)


def states_before(
    hidden: torch.Tensor, group_ids: torch.Tensor, real: torch.Tensor, scored: torch.Tensor
) -> torch.Tensor:
    """Of final states `(S, T, H)` those, `(N, H)`, that predict the N tokens of continuations which are `scored`
    `(S, T)`, sequence by sequence; `group_ids` and `real` as for `attention_mask`, padding on the right."""
    group_ids, real, scored = (tensor.to(hidden.device) for tensor in (group_ids, real, scored))
    sequence, position = scored.nonzero(as_tuple=True)
    # A token is predicted one position earlier, a continuation's first one at the end of the prompt
    starts = group_ids[sequence, position - 1] != group_ids[sequence, position]
    prompt_ends = ((group_ids < 0) & real.bool()).sum(1) - 1
    return hidden[sequence, torch.where(starts, prompt_ends[sequence], position - 1)]


def attention_mask(group_ids: torch.Tensor, real: torch.Tensor, model: nn.Module) -> torch.Tensor | BlockMask:
    """Mask `(S, 1, T, T)` in the form the model's attention takes, from the continuation each token belongs to, -1 for
    the prompt (`group_ids`), and 1 on tokens, 0 on padding (`real`), both `(S, T)`."""
    kind = model.config.get_text_config()._attn_implementation
    if kind == "flex_attention":
        return _block_mask(group_ids, real.bool())
    length = group_ids.size(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=group_ids.device).tril()
    keys, queries = group_ids[:, None, :], group_ids[:, :, None]
    visible = (causal & real.bool()[:, None, :] & ((keys == -1) | (keys == queries)))[:, None]
    if kind == "sdpa":
        return visible
    bias = torch.zeros(visible.shape, dtype=model.dtype, device=group_ids.device)
    return bias.masked_fill(~visible, torch.finfo(model.dtype).min)


def _block_mask(group_ids: torch.Tensor, real: torch.Tensor) -> BlockMask:
    def visible(sequence, head, query, key):
        group = group_ids[sequence, key]
        return (key <= query) & real[sequence, key] & ((group == -1) | (group == group_ids[sequence, query]))

    sequences, length = group_ids.shape
    return create_block_mask(visible, sequences, None, length, length, device=group_ids.device)


def why_not_exact(model: nn.Module, longest: int | None = None) -> str | None:
    """Why a model cannot score continuations behind a shared prompt exactly, or None if it can: by its configuration
    and, where the weights are at hand, a probe. `longest` bounds the tokens of a prompt with one continuation."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return f"{config._attn_implementation} attention takes no mask of its own"
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has {', '.join(sorted(others))} layers"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and (longest is None or longest > window):
        return f"its sliding window of {window} tokens may be shorter than a row"
    if is_deepspeed_zero3_enabled() or any(parameter.is_meta for parameter in model.parameters()):
        known = config.model_type in _KNOWN_EXACT
        return None if known else f"{config.model_type} is not known to allow it and its weights cannot be probed"
    return _probe(model)


@torch.no_grad()
def _probe(model: nn.Module) -> str | None:
    """Compare the states of two short continuations behind one prompt with those in sequences of their own."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    tokens = torch.arange(11, device=device) * 7919 % vocabulary
    packed = pack_shared_prefix(tokens[:5].tolist(), [(0, tokens[5:8].tolist()), (1, tokens[8:].tolist())])
    ids, group_ids, position_ids = (torch.tensor([row], device=device) for row in packed)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": position_ids}
    try:
        with eval_mode(model):
            shared = last_states(model, inputs, group_ids)[0]
            rows = (torch.cat([tokens[:5], rest])[None] for rest in (tokens[5:8], tokens[8:]))
            apart = [last_hidden_states(model, input_ids=row)[0] for row in rows]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        return f"its forward refuses the layout ({reason})"
    expected = torch.cat([apart[0], apart[1][5:]]).float()
    difference = (shared.float() - expected).norm() / expected.norm()
    tolerance = 1e-4 if model.dtype == torch.float32 and not _is_quantized(model) else 5e-2
    return None if difference < tolerance else f"a probe differs by {difference:.1e}"


def _is_quantized(model: nn.Module) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
