"""What trainers on weak labels share: predictions count from the next step on, and survive a resume."""

import logging
import os
from collections.abc import Iterator

import torch


logger = logging.getLogger(__name__)

_FILE = "weak_supervision.pt"


class LearnsFromWeakLabels:
    """Mixin for a `Trainer` with the attribute `supervision` (`WeakSupervision`)."""

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self.supervision.commit()  # a new optimizer step begins
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def progress(self) -> float:
        """Share of training that is done, in [0, 1]; 1 in evaluation, which always shows the final objective."""
        if not self.model.training:
            return 1.0
        return self.state.global_step / max(1, self.state.max_steps)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.supervision.state_dict(), os.path.join(output_dir, _FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, _FILE)
        if os.path.isfile(path):
            self.supervision.load_state_dict(torch.load(path, weights_only=True))
        elif self.supervision.objective.loss == "confidence":
            logger.warning("%s has no %s: the threshold of the confidence loss starts anew.", checkpoint, _FILE)
