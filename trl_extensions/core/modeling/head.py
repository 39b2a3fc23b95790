"""From token ids to hidden states, and the output head that a few of them at a time meet.

Models are unwrapped here: the functions read weights directly, inside the forward of a DDP / FSDP / DeepSpeed wrapper.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..._compat import project


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits: `softcap(scale * (states @ weight.T + bias))`, weight `(V, H)`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float  # of Cohere, Granite, Falcon-H1, ...
    softcap: float | None  # of Gemma

    def to(self, device: torch.device) -> "OutputHead":
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.scale, self.softcap)


@dataclass(frozen=True)
class ReferenceStates:
    """The reference's view of a batch: `states` `(N, H)` before the N scored tokens, and the head they meet."""

    states: torch.Tensor
    head: OutputHead


def output_head(model: nn.Module, like: torch.Tensor) -> OutputHead:
    """The head of an unwrapped causal language model, as its active adapter has it; a sharded (FSDP2) weight is
    gathered in the dtype of the states it will meet."""
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
    """Final hidden states `(B, T, H)` of an unwrapped causal language or PEFT model, without the head."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal_lm.base_model(**inputs, use_cache=False).last_hidden_state


@contextmanager
def head_products(device: torch.device, *dtypes: torch.dtype) -> Iterator[None]:
    """Without autocast, which would round dot products to half precision. Where operands are bfloat16, a CPU, whose
    kernels give float32 for float32 only, multiplies as bfloat16 if it can, and adds up in float32, as a GPU does."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # of torch 2.9 on
    with torch.autocast(device.type, enabled=False):
        if device.type != "cpu" or {*dtypes} != {torch.bfloat16} or matmul is None:
            yield
            return
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def project_logits(out: torch.Tensor, states: torch.Tensor, head: OutputHead, weight, bias, dtype) -> torch.Tensor:
    """Fill `out` `(n, V)`, float32, with the logits of a few states `(n, H)`, and return it. `weight` and `bias` are
    the head's, gathered; states are rounded to `dtype`, which the weight has."""
    project(out, states.to(dtype), weight, bias, 0, len(weight), dtype)
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out
