"""Averages that do not depend on how rows are cut into batches and devices, for the loss of a step and for logs."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch


class StopsAtNonFinite:
    """Mixin before a `Trainer`: a loss, gradient norm or weight that is not finite ends training in a `ValueError`
    of one line, before anything is saved as its result. transformers' `logging_nan_inf_filter` would hide it."""

    args: Any
    state: Any
    model: Any

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._check_finite("the loss", loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not self.args.fp16:  # whose scaler looks for a scale by overflowing
            self._check_finite("the gradient norm", torch.as_tensor(logs.get("grad_norm", 0.0)))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                self._check_finite(f"the weight `{name}`", getattr(weight, "to_local", lambda own=weight: own)())
        return result

    def _check_finite(self, what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value).all():
            where = f"step {self.state.global_step + 1}: {what} is not finite, and nothing is saved"
            remedy = f"try a tenth of `learning_rate` ({self.args.learning_rate:g}), or `bf16` in place of `fp16`"
            raise ValueError(f"{where}: {remedy}, in another `output_dir`.")


class RowAverages(StopsAtNonFinite):
    """Mixin before a `Trainer`: what is logged, and every metric of an evaluation, is a mean over rows or tokens."""

    _signature_columns: list[str] | None

    def record(
        self,
        averages: dict[str, tuple[torch.Tensor, torch.Tensor]],
        extremes: dict[str, tuple[Callable[[list[float]], float], torch.Tensor]] | None = None,
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Add a batch of B rows, of all devices.

        `averages` has, by name, `(B,)` sums of what is averaged and `(B,)` counts; a "loss" is read in evaluation
        only, where it replaces the mean over batches. `extremes` has `min` or `max` and `(B,)` values. The attention
        mask `tokens` is counted to TRL's `num_tokens`.
        """
        mode = self._mode
        totals = self._totals[mode]
        table = torch.stack([column.float() for pair in averages.values() for column in pair], dim=1)
        if mode == "train":
            sums = self.accelerator.gather(table.double().sum(0, keepdim=True))
        else:  # rows that only fill the last batch of the processes up are left out
            sums = self.accelerator.gather_for_metrics(table).double()
        for name, (total, count) in zip(averages, sums.sum(0).reshape(-1, 2).tolist(), strict=True):
            if mode == "eval" or name != "loss":
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + total, before[1] + count
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        for name, (extreme, values) in (extremes or {}).items():
            found = gather(values.float()).tolist()
            totals[name] = extreme([*found, totals[name][0]] if name in totals else found), 1.0
        if tokens is not None:
            if mode == "train":
                self._total_train_tokens += self.accelerator.gather(tokens.sum()).sum().item() // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    @property
    def _mode(self) -> Literal["train", "eval"]:
        return "train" if self.model.training else "eval"

    @property
    def _totals(self) -> dict[str, dict[str, tuple[float, float]]]:
        return self.__dict__.setdefault("_totals_of_modes", {"train": {}, "eval": {}})

    def _averages(self, mode: str) -> dict[str, float]:
        averages = {name: total / count for name, (total, count) in self._totals[mode].items() if count}
        self._totals[mode].clear()
        return averages

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log, then log as the trainer does."""
        if self.model.training:
            logs.update(self._averages("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        """As in `Trainer`, with the averages of this loop, its loss among them, as metrics."""
        getattr(self, "_metrics", {"eval": {}})["eval"].clear()  # `predict` leaves TRL's behind, for it logs nothing
        self._totals["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._averages("eval").items()})
        return output


class StepAverage(RowAverages):
    """`RowAverages` whose items (rows, or scored tokens) also weigh the same in the loss of an optimizer step."""

    # The loss is divided by the items of the whole step
    loss_is_scaled_for_ga = True
    _items_in_step: float = 0

    def count_items(self, batch: dict[str, Any]) -> int:
        """How many items of a batch the loss is a sum over."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = torch.tensor(sum(map(self.count_items, batches)), device=self.args.device)
        self._items_in_step = self.accelerator.gather(own).sum().item()
        return batches, num_items

    def step_loss(self, total: torch.Tensor, items: int) -> torch.Tensor:
        """What to return for a batch whose items have losses of this sum."""
        if self.model.training and self._items_in_step:
            # DDP averages gradients over processes; the sum over all items is divided by all items
            return total * self.accelerator.num_processes / self._items_in_step
        return total / max(1, items)
