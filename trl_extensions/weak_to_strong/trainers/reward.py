"""`WeakToStrongRewardTrainer`: a `RewardTrainer` whose preferences are a weaker model's, and may be uncertain."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.nn.functional import logsigmoid
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import RewardTrainer

from ...core.modeling.batches import keep_trainable
from ...core.training.load import as_config, reject_stream, settle
from ...core.training.step_average import RowAverages
from ...embedded import resolve_model_name
from ..data.collator import WithRowValues, check_row_values
from ..data.prepare import confidence_weights, with_end_token
from .configs import WeakToStrongRewardConfig
from .objective import PAPER, LearnsFromWeakLabels, WeakSupervision


logger = logging.getLogger(__name__)

_COLUMNS = ("preference", "weight")


class WeakToStrongRewardTrainer(LearnsFromWeakLabels, RowAverages, RewardTrainer):
    """Weak-to-strong generalisation (arXiv 2312.09390, 2410.12621) for reward models.

    Swap it for `RewardTrainer`; LoRA, QLoRA, full fine-tuning and `accelerate launch` work as they do there, and so do
    `margin` columns and `center_rewards_coefficient`. Without our columns and with `loss_type="soft_ce"` the loss is
    that of `RewardTrainer`.

    Args:
        model: Model id, path, `PreTrainedModel` with one label or `PeftModel`.
        args: `WeakToStrongRewardConfig`; plain `TrainingArguments` or a `RewardConfig` are converted.
        data_collator: Defaults to TRL's; it does not see the columns below.
        train_dataset: Rows in any preference format of `RewardTrainer`, with or without `preference`, the probability
            in [0, 1] that `chosen` is the better one (1 where the column is missing), and `weight` (finite, at least
            0), by which a pair's loss is multiplied. Pairs above `max_length` are dropped, as in TRL, and counted.
        eval_dataset: Held-out rows of the same kind, or a dict of such datasets.
        processing_class: Tokenizer; loaded from the model when left out.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in
            `RewardTrainer`.
        quantization_config: For a model given by name.
        peft_config: Wraps the model; `task_type="SEQ_CLS"` trains the head along.

    Logged beside the metrics of `RewardTrainer`: `agreement`, the share of pairs whose better one is the same to the
    model as to its labels (a preference of at least 0.5 for `chosen`), and `loss_coef`, the weight of the model's own
    view (see `Objective`). Evaluation always shows the loss past its warm-up.

    Raises:
        ValueError: Data or settings that cannot be used; the message names the row or field and the remedy.
        TypeError: A streaming dataset.
    """

    args: WeakToStrongRewardConfig
    _tag_names = ["trl", "weak-to-strong", "reward-trainer"]  # noqa: RUF012 (TRL's own convention)
    _name = "Weak-to-strong reward"
    _paper = PAPER

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: WeakToStrongRewardConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        model = resolve_model_name(model) if isinstance(model, str) else model
        args = as_config(args, WeakToStrongRewardConfig, model, "WeakToStrongReward")
        super().__init__(
            model=model, args=with_end_token(args, model, processing_class),
            data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, compute_metrics=compute_metrics, callbacks=callbacks,
            optimizers=optimizers, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics, quantization_config=quantization_config,
            peft_config=peft_config,
        )  # fmt: skip
        keep_trainable(self.model)
        settle(self)
        self.data_collator = WithRowValues(self.data_collator, _COLUMNS)
        if self.args.weight_by_confidence:
            self.train_dataset = _weigh_by_confidence(self.train_dataset)
        soft_labels, weights = _labels_and_weights(self.train_dataset)
        if not weights.any():
            raise ValueError("Every train pair that is left has a `weight` of 0, so no pair counts: check them.")
        self.supervision = WeakSupervision(self.args.objective(), soft_labels.mean(axis=0))

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        reject_stream(dataset, dataset_name, "weak-to-strong training")
        check_row_values(dataset, "preference", dataset_name, highest=1)
        check_row_values(dataset, "weight", dataset_name)
        rows = len(dataset)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        dropped = f"{rows - len(dataset)} of {rows} {dataset_name} pairs are longer than max_length={args.max_length}"
        if not len(dataset):
            raise ValueError(f"{dropped} tokens, so none is left: raise it, or set it to None.")
        if len(dataset) < rows:
            logger.warning("%s tokens and were dropped.", dropped)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in _COLUMNS if name not in self._signature_columns]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        preferences, weights = inputs.pop("preference", None), inputs.pop("weight", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
        preferences = torch.ones_like(chosen) if preferences is None else preferences
        agrees = (chosen > rejected) == (preferences >= 0.5)
        margins = chosen - rejected - inputs.get("margin", 0.0)
        soft_labels = torch.stack([preferences, 1 - preferences], dim=1)
        losses, coef = self.weak_losses(_two_classes(margins), soft_labels, weights)
        centred = (self.args.center_rewards_coefficient or 0.0) * (chosen + rejected).square()
        columns = {"loss": losses + centred, "agreement": agrees, "loss_coef": coef}
        self.record({name: (column.detach(), torch.ones_like(margins)) for name, column in columns.items()})
        # Exactly what `RewardTrainer` has added is taken out again; whatever else it adds stays
        loss = loss + losses.mean() + logsigmoid(margins).mean()
        return (loss, outputs) if return_outputs else loss

    def weak_logits(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(B, 2)`: margins of pairs, seen as two classes."""
        texts = {name: value for name, value in inputs.items() if name not in (*_COLUMNS, "margin")}
        chosen, rejected = torch.chunk(model(**texts, use_cache=False).logits.squeeze(-1), chunks=2)
        return _two_classes(chosen - rejected - inputs.get("margin", 0.0))


def _two_classes(margins: torch.Tensor) -> torch.Tensor:
    return torch.stack([margins, torch.zeros_like(margins)], dim=1)


def _labels_and_weights(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Soft labels `(N, 2)` and weights `(N,)`, with a preference and a weight of 1 where the column is missing."""
    columns = [dataset[name] if name in dataset.column_names else [1.0] * len(dataset) for name in _COLUMNS]
    preferences, weights = (np.asarray(column, dtype=np.float64) for column in columns)
    return np.stack([preferences, 1 - preferences], axis=1), weights


def _weigh_by_confidence(dataset: Dataset) -> Dataset:
    soft_labels, weights = _labels_and_weights(dataset)
    others = dataset.remove_columns([name for name in dataset.column_names if name == "weight"])
    return others.add_column("weight", confidence_weights(soft_labels) * weights)
