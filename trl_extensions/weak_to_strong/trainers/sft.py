"""`WeakToStrongSFTTrainer`: an `SFTTrainer` whose targets a weaker model wrote, or would have written."""

from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTTrainer

from ...core.modeling.batches import keep_trainable
from ...core.modeling.chunked import chunked_kl
from ...core.modeling.head import last_hidden_states, output_head
from ...core.modeling.reference import ReferenceMixin
from ...core.training.load import (
    as_config,
    reject_prompt_learning,
    reject_sequence_parallelism,
    reject_sft_settings,
    reject_stream,
    settle,
)
from ...core.training.step_average import RowAverages
from ...embedded import resolve_model_name
from ..data.collator import WithRowValues, check_row_values, columns_of
from ..data.prepare import with_end_token
from ..labels.weak_model import narrow, weak_reference
from .configs import WeakToStrongSFTConfig
from .objective import PAPER


class WeakToStrongSFTTrainer(ReferenceMixin, RowAverages, SFTTrainer):
    """Weak-to-strong generalisation (arXiv 2312.09390, 2410.12621) for generation: learn to write from a weaker model.

    Two forms. *Hard text*, without `weak_model`: the completions were written by the weak model(s); without a `weight`
    column this is `SFTTrainer`. *Token distributions*, with `weak_model`: at every scored token the target is the weak
    model's distribution of the next one, in the weak model's own context; both models need one vocabulary.

    Args:
        model: Strong model: id, path, `PreTrainedModel` or `PeftModel`.
        args: `WeakToStrongSFTConfig`; plain `TrainingArguments` or an `SFTConfig` are converted.
        data_collator: Defaults to TRL's; it does not see the weights.
        train_dataset: Rows in any format of `SFTTrainer`, with or without a column `weight` (finite, at least 0), by
            which the losses of a row's tokens are multiplied. The number of scored tokens the loss is divided by does
            not depend on it.
        eval_dataset: Held-out rows of the same kind, or a dict of such datasets.
        processing_class: Tokenizer; loaded from the model when left out.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
            formatting_func: As in `SFTTrainer`.
        quantization_config: For a model given by name.
        peft_config: Wraps the strong model.
        weak_model: Weak model: id, path, `PreTrainedModel` or `PeftModel`. By name, it is loaded with the strong
            model's `dtype` and `attn_implementation`. It is frozen and runs without dropout.
        weak_processing_class: The weak model's tokenizer, compared with the strong one's; loaded from where the weak
            model came from when left out.

    Logged with a `weak_model`, in place of `entropy` and `mean_token_accuracy`: `kl/weak`, the divergence from the
    weak model, nats per scored token, unweighted. The load-balancing loss of mixtures of experts is not added then.

    Raises:
        ValueError: Data, settings or models that cannot be used; the message names the row, token or field and the
            remedy.
        TypeError: A streaming dataset with weights or with a `weak_model`.
    """

    args: WeakToStrongSFTConfig
    _tag_names = ["trl", "weak-to-strong", "sft"]  # noqa: RUF012 (TRL's own convention)
    _name = "Weak-to-strong SFT"
    _paper = PAPER

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: WeakToStrongSFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        weak_model: str | PreTrainedModel | PeftModel | None = None,
        weak_processing_class: PreTrainedTokenizerBase | None = None,
    ):
        model = resolve_model_name(model) if isinstance(model, str) else model
        args = as_config(args, WeakToStrongSFTConfig, model, "WeakToStrongSFT")
        args = with_end_token(args, model, processing_class)
        self._learns_tokens = weak_model is not None
        self.reference = None
        if self._learns_tokens:
            reject_prompt_learning(model, peft_config, "learning token distributions")
        if train_dataset is not None:  # here, for TRL prepares neither images nor rows it is told to leave alone
            self._check_dataset(train_dataset, args, "train")
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics, quantization_config=quantization_config,
            peft_config=peft_config, formatting_func=formatting_func,
        )  # fmt: skip
        keep_trainable(self.model)
        settle(self)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("Weak-to-strong SFT trains decoder-only models, `model` is an encoder-decoder.")
        if not self._skip_prepare_dataset:
            self.data_collator = WithRowValues(self.data_collator, ("weight",))
        if self._learns_tokens:
            self.reference, self._rows = weak_reference(
                weak_model, weak_processing_class, self.model, self._tokenizer, args, self.accelerator
            )

    def _check_dataset(self, dataset: Dataset | IterableDataset, args: WeakToStrongSFTConfig, name: str) -> None:
        columns = columns_of(dataset)
        if not self._learns_tokens and "weight" not in columns:
            return
        what = "`weak_model`" if self._learns_tokens else f"the column `weight` of the {name} dataset"
        reject_sequence_parallelism(args, what)
        reject_sft_settings(args, what)
        if "image" in columns or "images" in columns:
            raise ValueError(f"The {name} dataset has images, which {what} does not work with: use text columns.")
        reject_stream(dataset, name, what)
        check_row_values(dataset, "weight", name)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        self._check_dataset(dataset, args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "weight" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "weight"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = inputs.pop("weight", None)
        if self.reference is None:
            return super().compute_loss(self._weighted(model, weights), inputs, return_outputs, num_items_in_batch)
        loss = self._token_loss(model, inputs, weights, num_items_in_batch)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})

    def _weighted(self, model: nn.Module, weights: torch.Tensor | None) -> nn.Module | Callable:
        """Calls the model; the log-probabilities that `SFTTrainer` sums up come back multiplied by their row's weight,
        and in evaluation their sums over rows are recorded."""
        # Where a row is one of the batch, and nothing but these log-probabilities is in the loss
        exact = self.args.loss_type == "nll" and not self.padding_free and not self.aux_loss_enabled
        exact = exact and self.label_smoother is None and self.compute_loss_func is None and not self.model.training
        if weights is None and not exact:
            return model

        def call(**inputs):
            outputs = model(**inputs)
            if inputs.get("fused_lm_head"):
                if weights is not None:
                    outputs.log_probs = outputs.log_probs * weights.to(outputs.log_probs)[:, None]
                if exact:
                    self.record({"loss": (-outputs.log_probs.sum(1), outputs.label_mask.sum(1))})
            return outputs

        return call

    def _token_loss(self, model, inputs, weights, num_items_in_batch):
        """Summed divergences over the scored tokens of the step, as `SFTTrainer` normalises its own losses."""
        target = self._reference_states(model, scored_states, inputs)
        target_head = narrow(target.head, self._rows)
        scored = _scored(inputs)
        row_of_token = scored.nonzero()[:, 0]

        def forward(policy):
            states = scored_states(policy, inputs)
            head = narrow(output_head(policy, states), self._rows)
            reverse = self.args.token_loss == "reverse_kl"
            divergence = chunked_kl(states, head, target.states, target_head, reverse=reverse)
            losses = divergence if weights is None else divergence * weights[row_of_token].to(divergence)
            return losses.sum(), torch.stack([losses.detach(), divergence.detach()])

        total, values = self._policy_forward(model, forward)
        count = scored.sum(1).float()
        sums = values.new_zeros(2, len(count)).index_add(1, row_of_token.to(values.device), values).to(count)
        self.record({"loss": (sums[0], count), "kl/weak": (sums[1], count)}, tokens=inputs["attention_mask"])
        count = scored.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1).to(total.device)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages over processes
        return loss


def scored_states(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states `(N, H)` before the N scored tokens of a batch (those whose label is not -100), row after row."""
    names = ("input_ids", "attention_mask", "position_ids")
    states = last_hidden_states(model, **{name: inputs[name] for name in names if name in inputs})
    return states[:, :-1][_scored(inputs).to(states.device)]


def _scored(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["labels"][:, 1:] != -100
