"""What a weak-to-strong trainer minimises at a given moment of training: loss, its coefficient, the prior to match."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..loss import confidence_loss, product_loss, reverse_kl_loss, soft_cross_entropy, threshold_for


LOSSES = ("soft_ce", "confidence", "product", "reverse_kl")


@dataclass(frozen=True)
class Objective:
    """A loss and its settings.

    Args:
        loss: One of `LOSSES`.
        confidence_coef: Weight in [0, 1] of the strong model's own class in the confidence loss.
        product_alpha: Weight of the weak labels in the product loss.
        product_beta: Weight of the strong model in the product loss.
        warmup_ratio: Share of training over which `confidence_coef` or `product_beta` rises linearly from 0.

    Raises:
        ValueError: A setting that has no meaning.
    """

    loss: str = "soft_ce"
    confidence_coef: float = 0.5
    product_alpha: float = 1.0
    product_beta: float = 1.0
    warmup_ratio: float = 0.1

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        for name, low, high in (
            ("confidence_coef", 0, 1), ("product_alpha", 0, math.inf), ("product_beta", 0, math.inf),
            ("warmup_ratio", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or math.isinf(value):
                shown = "loss_warmup_ratio" if name == "warmup_ratio" else name
                raise ValueError(f"`{shown}` must be a number from {low} to {high}, got {value!r}.")
        if not self.product_alpha and self.loss == "product":
            raise ValueError("`product_alpha` is 0, so the product loss would not look at the weak labels: raise it.")

    def coefficient(self, progress: float) -> float:
        """Weight of the strong model's own view after `progress` in [0, 1] of training; 0 for losses without one."""
        full = {"confidence": self.confidence_coef, "product": self.product_beta}.get(self.loss, 0.0)
        return full if progress >= self.warmup_ratio else full * progress / self.warmup_ratio


class WeakSupervision:
    """An objective with the prior of the training set, `(K,)`, its mean soft label, and the threshold of the running
    step. Neither depends on how a step's rows are cut into micro-batches and devices: see `LearnsFromWeakLabels`."""

    def __init__(self, objective: Objective, prior: torch.Tensor | Sequence[float]):
        self.objective = objective
        self.prior = torch.as_tensor(prior, dtype=torch.float32)
        self.threshold: torch.Tensor | None = None

    @property
    def needs_threshold(self) -> bool:
        return self.objective.loss == "confidence"

    def match_prior(self, logits: torch.Tensor) -> None:
        """Set the threshold under which the classes of a step's rows, `(N, K)`, are distributed like the prior."""
        # Of the weights that are trained: remembered thresholds lag behind, and a model whose predictions drift to one
        # class would be pushed further by them
        self.threshold = threshold_for(torch.softmax(logits.detach().float(), dim=-1), self.prior)

    def losses(self, logits: torch.Tensor, soft_labels: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
        """Unweighted losses `(B,)`, nats, of logits and soft labels `(B, K)` after that share of training.

        In evaluation the confidence loss has the threshold of the last training step, plain argmax before the first.
        """
        coefficient = self.objective.coefficient(progress)
        if self.objective.loss == "confidence":
            threshold = self.threshold
            if threshold is None:
                threshold = torch.full((logits.shape[1],), 1 / logits.shape[1], dtype=torch.float64)
            return confidence_loss(logits, soft_labels, coefficient, prior=self.prior, threshold=threshold)
        if self.objective.loss == "product":
            return product_loss(logits, soft_labels, self.objective.product_alpha, coefficient)
        return (soft_cross_entropy if self.objective.loss == "soft_ce" else reverse_kl_loss)(logits, soft_labels)


class LearnsFromWeakLabels:
    """Mixin for a `Trainer` with `supervision` (`WeakSupervision`) and `weak_logits(model, inputs)`, `(B, K)` logits.

    The threshold follows from the predictions of all micro-batches of a step, on all devices, with the weights of that
    step. A step of one micro-batch has them at hand; of several, they are predicted once more beforehand, without
    gradient, which costs a third of the step.
    """

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._threshold_is_set = len(batches) > 1
        if self._threshold_is_set and self.supervision.needs_threshold:
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = [self.weak_logits(self.model_wrapped, self._prepare_inputs(dict(batch))) for batch in batches]
            self.supervision.match_prior(self.accelerator.gather(torch.cat(logits)))
        return batches, num_items

    def observe(self, logits: torch.Tensor) -> None:
        """Call with the logits `(B, K)` of each micro-batch before its losses are computed."""
        if self.model.training and self.supervision.needs_threshold and not self._threshold_is_set:
            self.supervision.match_prior(self.accelerator.gather(logits.detach()))

    def progress(self) -> float:
        """Share of training that is done, in [0, 1]; 1 in evaluation, which always shows the final objective."""
        if not self.model.training:
            return 1.0
        return self.state.global_step / max(1, self.state.max_steps)
