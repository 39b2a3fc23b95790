"""From token ids to per-token log-probabilities at chosen positions, without ever holding a matrix of logits.

The functions here run on the unwrapped causal language model, inside the forward of its DDP / FSDP / DeepSpeed
wrapper (TRL's forward redirection), because they read the output head's weight directly.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .._compat import ChunkedLogProbFunction, maybe_gather_lm_head_ctx


_VOCAB_CHUNK = 32768


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits: `softcap(scale * (states @ weight.T + bias))`.

    Attributes:
        weight: `(V, H)`.
        bias: `(V,)` or None.
        scale: Factor on the logits (Cohere, Granite, Falcon-H1, ...).
        softcap: Bound of the tanh soft-capping (Gemma), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class ReferenceStates:
    """The original's view of a batch: `states` `(N, H)` before the N scored tokens, and the head they meet."""

    states: torch.Tensor
    head: OutputHead


def output_head(model: nn.Module, like: torch.Tensor) -> OutputHead:
    """Read the head of an unwrapped causal language model, as its active adapter has it.

    Args:
        model: Causal language model or PEFT model.
        like: Hidden states the head will meet; a sharded (FSDP2) weight is gathered in their dtype.
    """
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor().to(like.dtype)
        bias = bias.full_tensor().to(like.dtype) if bias is not None else None
    config = model.config.get_text_config()
    return OutputHead(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _logit_scale(config) -> float:
    # Families name the same factor differently; Granite and MiniCPM3 divide by theirs, HyperCLOVA X multiplies.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def last_hidden_states(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Final hidden states `(B, T, H)`, without the head.

    Args:
        model: Unwrapped causal language model or PEFT model (weight-injecting adapters, not prompt learning).
        inputs: What the backbone takes: `input_ids`, `attention_mask`, `position_ids`.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal_lm.base_model(**inputs, use_cache=False).last_hidden_state


def token_logps(states: torch.Tensor, head: OutputHead, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token given its state.

    Args:
        states: `(N, H)`.
        head: The model's output head.
        token_ids: `(N,)`.

    Returns:
        `(N,)` float32, nats. Memory is bounded by one tile of the vocabulary; gradients flow to states and head.
    """
    device = head.weight.device
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # its forward, unlike its backward, does not gather
        return ChunkedLogProbFunction.apply(
            states.to(device),
            head.weight,
            head.bias,
            token_ids.to(device),
            1.0,
            _VOCAB_CHUNK,
            head.softcap,
            head.scale,
            ("log_probs",),
        )[0]
