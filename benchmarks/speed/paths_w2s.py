"""A weak-to-strong step on token distributions: full logits of both models, TRL's kernel, and ours.

Every path is a function of a strong model, its weak teacher and a batch that leaves gradients in the strong one and
returns its loss. The optimizer, which is the same for all, is left out.
"""

import torch
from torch import nn

from trl_extensions._compat import ChunkedDivergenceFunction
from trl_extensions.core.modeling.chunked import chunked_kl, dense_kl
from trl_extensions.core.modeling.head import output_head
from trl_extensions.weak_to_strong.trainers.sft import scored_states

from .models import random_tokens


def make_batch(rows: int, prompt: int, response: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Texts of one length as TRL's collator lays them out; prompts are not scored."""
    input_ids = torch.tensor(random_tokens(rows, prompt + response, vocabulary, seed=1))
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def dense(strong: nn.Module, weak: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition on full float32 logits of both models."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = weak(**inputs, use_cache=False).logits[:, :-1]
    logits = strong(**inputs, use_cache=False).logits[:, :-1]
    scored = batch["labels"][:, 1:] != -100
    divergence = dense_kl(logits, target, reverse=False)
    loss = (divergence * scored).sum() / scored.sum()
    loss.backward()
    return loss.detach()


def ours(strong: nn.Module, weak: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `WeakToStrongSFTTrainer` runs with a `weak_model`."""
    target, states = _both(strong, weak, batch)
    loss = chunked_kl(states, output_head(strong, states), target, output_head(weak, target), reverse=False).mean()
    loss.backward()
    return loss.detach()


def kernel(strong: nn.Module, weak: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same states and TRL's kernel for its distillation losses."""
    target, states = _both(strong, weak, batch)
    loss = ChunkedDivergenceFunction.apply(
        states, strong.lm_head.weight, None, target, weak.lm_head.weight, None, 0.0, 1.0, 1.0, None, 1.0, None
    )[0].mean()
    loss.backward()
    return loss.detach()


def _both(strong: nn.Module, weak: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        target = scored_states(weak, batch)
    return target.clone(), scored_states(strong, batch)


PATHS = {"dense": dense, "ours": ours, "TRL's kernel": kernel}
