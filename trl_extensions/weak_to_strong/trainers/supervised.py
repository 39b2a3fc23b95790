"""What trainers on weak labels share: one threshold of the confidence loss for all rows of an optimizer step."""

from collections.abc import Iterator

import torch


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
