"""Rows that do not count alike: their weights, and losses that heed them, for `SFTTrainer` and `Trainer` as they are.

`DataCollatorForCodecLM` puts `loss_weights` into its batches, which no trainer looks at. `WeightedLoss`, a callback,
makes a model look at them while it trains; the trainer stays the one it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from .pipeline.metadata import folded


LOSS_WEIGHTS = "loss_weights"  # in a batch
WEIGHT_BY = (None, "gap", "metadata")
Pair = tuple[str, frozenset[str]]

_LOST = "to weigh by: give exported rows; in a trainer set remove_unused_columns=False and leave packing off"


def pair_of(use_case: str, skills: Iterable[str]) -> Pair:
    """What metadata are counted by: use case and set of skills, in lower case, white space tidied."""
    return folded(use_case), frozenset(map(folded, skills))


def raw_weight(row: Mapping[str, Any], by: str, gap_range: tuple[float, float], counts: Mapping[Pair, int]) -> float:
    """The weight of an exported row, not rescaled yet: by "gap", its size within the range; by "metadata", one over
    the rows of its pair (1 for a pair that was not counted). `ValueError` where what is needed is missing."""
    if by == "gap":
        return min(max(abs(read_gap(row)), gap_range[0]), gap_range[1])
    return 1 / max(1, counts.get(read_pair(row), 1))


def read_gap(row: Mapping[str, Any]) -> float:
    """`scores.gap` of an exported row."""
    if "scores" not in row:
        raise ValueError(f"no column `scores` {_LOST}")
    gap = row["scores"].get("gap") if isinstance(row["scores"], Mapping) else row["scores"]
    if gap is None:
        raise ValueError("`scores.gap` is empty, the pair was never scored; use weight_by='metadata', or no weights")
    if isinstance(gap, bool) or not isinstance(gap, int | float) or not math.isfinite(gap):
        raise ValueError(f"`scores.gap` must be a finite number, got {gap!r:.80}")
    return float(gap)


def read_pair(row: Mapping[str, Any]) -> Pair:
    """The pair of an exported row's `metadata`."""
    if "metadata" not in row:
        raise ValueError(f"no column `metadata` {_LOST}")
    metadata = row["metadata"] if isinstance(row["metadata"], Mapping) else {}
    use_case, skills = metadata.get("use_case"), metadata.get("skills")
    if not isinstance(use_case, str) or not use_case.strip():
        raise ValueError(f"`metadata` needs a text `use_case`, got {row['metadata']!r:.80}")
    if not isinstance(skills, list | tuple) or not all(isinstance(skill, str) for skill in skills):
        raise ValueError(f"`metadata` needs a list of texts `skills`, got {row['metadata']!r:.80}")
    return pair_of(use_case, skills)


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Negative log-likelihood, each row's times its weight, in nats per scored token: with ones, SFT's.

    Args:
        logits: `(B, T, V)`; position t scores label t + 1.
        labels: `(B, T)`; -100 is not scored.
        loss_weights: `(B,)`.
        num_items: Scored tokens of the whole optimizer step; those of this batch when left out.
    """
    shifted = labels[:, 1:]
    return _weighted(_token_losses(logits[:, :-1], shifted), shifted != -100, loss_weights, num_items)


class WeightedLoss(TrainerCallback):
    """Lets `loss_weights` of a batch multiply the losses of their rows, in an unmodified `SFTTrainer` or `Trainer`.

    Training only: an evaluation loss stays the plain one, which can be compared between runs. Settings that the
    weights would be lost or mistaken with raise a `ValueError`. Give the trainer `callbacks=[WeightedLoss()]`, a
    `DataCollatorForCodecLM` with `weight_by`, and `remove_unused_columns=False`.
    """

    def __init__(self):
        self._weighing: RowWeighing | None = None

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs) -> None:
        if (loss_type := getattr(args, "loss_type", "nll")) != "nll":
            raise ValueError(f'`loss_type="{loss_type}"` does not work with weighted rows: leave it at "nll".')
        if args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` does not work with weighted rows: set it to 0.")
        if args.n_gpu > 1:
            raise ValueError("Weighted rows do not work with `nn.DataParallel`: use `accelerate launch`.")
        if self._weighing is None or self._weighing.model is not model:
            if self._weighing is not None:
                self._weighing.remove()
            self._weighing = RowWeighing(model)

    # A callback that is added later sees no `on_init_end`, and FSDP has put another model in place by then
    on_train_begin = on_init_end


class RowWeighing:
    """From now on, `model(..., labels=..., loss_weights=...)` in training mode returns the weighted loss.

    For a training loop of your own, as `weigh_rows(model)`; with a trainer, use `WeightedLoss`. `remove()` ends it.
    Give it the model that is called: the PEFT model, not the one inside.
    """

    active = 0  # how many there are in this process

    def __init__(self, model: nn.Module):
        RowWeighing.active += 1
        self.model = model
        self._weights: torch.Tensor | None = None
        # Hooks, as a trainer replaces the forward of the model it is given
        self._handles = [
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            model.register_forward_hook(self._apply, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Leave the model as it was; twice does nothing."""
        RowWeighing.active -= bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._weights = kwargs.get(LOSS_WEIGHTS) if model.training else None
        return args, {name: value for name, value in kwargs.items() if name != LOSS_WEIGHTS}

    def _apply(self, model: nn.Module, args: tuple, kwargs: dict, outputs):
        weights, self._weights = self._weights, None
        if weights is None:
            return outputs
        if getattr(outputs, "loss", None) is None:
            raise ValueError("`loss_weights` came without `labels`, or no loss: leave `compute_loss_func` out.")
        if getattr(outputs, "log_probs", None) is not None:  # the fused head of TRL, zero where nothing is scored
            losses, scored = -outputs.log_probs, outputs.label_mask
            outputs.log_probs = outputs.log_probs * weights.to(outputs.log_probs)[:, None]
        else:
            shifted = kwargs.get("shift_labels")
            logits = outputs.logits if shifted is not None else outputs.logits[:, :-1]
            shifted = (kwargs["labels"][:, 1:] if shifted is None else shifted).to(logits.device)
            losses, scored = _token_losses(logits, shifted), shifted != -100
        # Added, so that what else is in the loss stays there and weights of 1 change not a bit of it
        num_items = kwargs.get("num_items_in_batch")
        outputs.loss = outputs.loss + _weighted(losses, scored, weights - 1, num_items).to(outputs.loss)
        return outputs


weigh_rows = RowWeighing


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(B, T, V)` and `(B, T)`, aligned -> `(B, T)`, 0 where the label is -100."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape)


def _weighted(losses: torch.Tensor, scored: torch.Tensor, weights: torch.Tensor, num_items) -> torch.Tensor:
    count = scored.sum() if num_items is None else torch.as_tensor(num_items)
    return (weights.to(losses) * losses.sum(1)).sum() / count.clamp(min=1).to(losses.device)
