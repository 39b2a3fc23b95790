"""What a weak-to-strong trainer minimises at a given moment of training: loss, its coefficient, the prior to match."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..loss import confidence_loss, product_loss, reverse_kl_loss, soft_cross_entropy, threshold_for


LOSSES = ("soft_ce", "confidence", "product", "reverse_kl")
PAPER = {
    "title": "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision",
    "id": "2312.09390",
    # docstyle-ignore
    "citation": """\
@article{burns2023weak,
    title   = {{Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision}},
    author  = {Collin Burns and Pavel Izmailov and Jan Hendrik Kirchner and Bowen Baker and Leo Gao and others},
    year    = 2023,
    eprint  = {arXiv:2312.09390}
}""",
}


@dataclass(frozen=True)
class Objective:
    """One of `LOSSES` and its settings, those of `WeakLossArguments`; `ValueError` for one that has no meaning."""

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
        # By the weights of this step: a threshold of earlier ones lags behind, and pushes a drifting model further
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

    def weak_losses(
        self, logits: torch.Tensor, soft_labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses `(B,)` of a micro-batch's logits `(B, K)`, times the weights, and the `loss_coef` `(B,)` they had."""
        progress = 1.0  # evaluation always shows the final objective
        if self.model.training:
            progress = self.state.global_step / max(1, self.state.max_steps)
            if self.supervision.needs_threshold and not self._threshold_is_set:
                self.supervision.match_prior(self.accelerator.gather(logits.detach()))
        losses = self.supervision.losses(logits, soft_labels, progress)
        coefficient = torch.full_like(losses, self.supervision.objective.coefficient(progress))
        return losses if weights is None else losses * weights, coefficient
