"""`SAMITrainer`: an `SFTTrainer` that raises the mutual information of constitutions and responses."""

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTTrainer

from .._compat import disable_dropout_in_model, global_then_local_main_first
from ..core.modeling.batches import eval_mode, keep_trainable
from ..core.modeling.reference import ReferenceMixin, build_reference
from ..core.training.load import as_config, reject_prompt_learning, reject_sequence_parallelism, reject_stream, settle
from ..core.training.step_average import StepAverage
from ..embedded import resolve_model_name
from .collator import DataCollatorForSAMI
from .config import SAMIConfig
from .data import TOKEN_COLUMNS, prepare_rows
from .guard import OverOptimizationGuard
from .scores import matched_states, plain_inputs, plain_kl, rows_of, score_pairs, states_before_responses


class SAMITrainer(ReferenceMixin, StepAverage, SFTTrainer):
    """Self-supervised alignment with mutual information (SAMI, arXiv 2404.14313), without preference labels.

    Swap it for `SFTTrainer`; LoRA, QLoRA, full fine-tuning, gradient accumulation and `accelerate launch` work as they
    do there. Batch sizes count queries.

    Args:
        model: Model id, path, `PreTrainedModel` or `PeftModel`.
        args: `SAMIConfig`; plain `TrainingArguments` or an `SFTConfig` are converted.
        train_dataset: Rows with `prompts` and `completions`, or `query`, `constitutions` and `completions`.
        eval_dataset: Held-out rows of the same kind, or a dict of such datasets.
        processing_class: Tokenizer; loaded from the model when left out.
        ref_model: The original that KL is measured against. Left out: the model behind a fresh adapter, the PEFT model
            as it was given, or a frozen copy.
        data_collator: Defaults to `DataCollatorForSAMI`.
        callbacks, optimizers, optimizer_cls_and_kwargs: As in `Trainer`.
        quantization_config: For a model given by name.
        peft_config: Wraps the model; prompt learning methods are not supported.

    Logged per step, averaged over queries: `mi/bound` (nats, of log-probabilities of whole responses),
    `mi/contrast_per_token` (nats, of means over tokens), `mi/accuracy_rows`, `mi/accuracy_columns`, `logps/matched`,
    `logps/mismatched` (nats, after `logp_reduction`), `kl` and, with `preserve_weight`, `kl_plain` (nats per response
    token), `completions/{mean,min,max}_length` (tokens). `evaluate` reports the same with the prefix `eval_`.

    Raises:
        ValueError: Data or settings SAMI cannot use; the message names the row or field and the remedy.
        TypeError: A streaming dataset.
    """

    args: SAMIConfig
    _tag_names = ["trl", "sami"]  # noqa: RUF012 (TRL's own convention)
    _name = "SAMI"
    _paper = {  # noqa: RUF012
        "title": "Self-Supervised Alignment with Mutual Information: Learning to Follow Principles without "
        "Preference Labels",
        "id": "2404.14313",
        # docstyle-ignore
        "citation": """\
@inproceedings{fraenken2024selfsupervised,
    title     = {{Self-Supervised Alignment with Mutual Information: Learning to Follow Principles without Preference Labels}},
    author    = {Jan-Philipp Fr{\\"a}nken and Eric Zelikman and Rafael Rafailov and Kanishk Gandhi and Tobias Gerstenberg and Noah D. Goodman},
    year      = 2024,
    booktitle = {Advances in Neural Information Processing Systems},
    eprint    = {arXiv:2404.14313}
}""",  # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SAMIConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        model = resolve_model_name(model) if isinstance(model, str) else model
        args = as_config(args, SAMIConfig, model, "SAMI")
        reject_prompt_learning(model, peft_config, "SAMI")
        reject_sequence_parallelism(args, "SAMI")
        adapter_is_trained = isinstance(model, PeftModel)
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs, quantization_config=quantization_config,
            peft_config=peft_config,
        )  # fmt: skip
        keep_trainable(self.model)
        settle(self)
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        if data_collator is None:
            self.data_collator = DataCollatorForSAMI(
                self._tokenizer.pad_token_id, args.pad_to_multiple_of, share_prefix=self._shares_prefix(self.model)
            )
        self.reference = None
        if args.beta or args.preserve_weight or args.log_kl or args.guard_max_kl is not None:
            self.reference = build_reference(self.model, self.accelerator, ref_model, adapter_is_trained)
        if args.guard_steps:
            self.add_callback(OverOptimizationGuard(self))

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        reject_stream(dataset, dataset_name, "SAMI")
        with global_then_local_main_first():
            dataset = prepare_rows(
                dataset, self._tokenizer, max_length=args.max_length, overlong_policy=args.overlong_policy,
                prompt_template=args.prompt_template, score_end=args.score_end, plain=args.preserve_weight > 0,
                name=dataset_name, num_proc=args.dataset_num_proc,
            )  # fmt: skip
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*TOKEN_COLUMNS, "plain_input_ids"]

    def count_items(self, batch):
        return len(batch["num_constitutions"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, losses, statistics = self._score(model, inputs)
        columns = {"loss": losses} | statistics
        lengths = columns.pop("completions/min_length"), columns.pop("completions/max_length")
        self.record(
            {name: (column, torch.ones_like(losses)) for name, column in columns.items()},
            {"completions/min_length": (min, lengths[0]), "completions/max_length": (max, lengths[1])},
            inputs["attention_mask"],
        )
        loss = self.step_loss(total, len(losses))
        return (loss, {"losses": losses}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, inputs, True, ignore_keys)  # there are no logits to return

    def row_statistics(self, model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a batch of rows would log, `(B,)` per metric name; in eval mode, without gradients."""
        with torch.no_grad(), eval_mode(model):
            return self._score(model, inputs)[2]

    def _score(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Summed loss with gradient, and detached `(B,)` losses and statistics."""
        reference, plain, plain_reference = self._reference_states(model, matched_states, inputs), None, None
        if self.args.preserve_weight:
            plain = plain_inputs(inputs)
            plain_reference = self._reference_states(model, states_before_responses, plain)

        def forward(policy):
            logps, kl = score_pairs(policy, inputs, self.args.logp_reduction, reference)
            losses, statistics = rows_of(
                logps, kl, inputs, self.args.beta, reduction=self.args.logp_reduction,
                length_weight=self.args.length_weight,
            )  # fmt: skip
            if plain is not None:
                preserved = plain_kl(policy, plain, inputs["num_constitutions"], plain_reference)
                statistics["kl_plain"] = preserved.detach()
                losses = losses + self.args.preserve_weight * preserved
            return losses.sum(), (losses.detach(), statistics)

        total, (losses, statistics) = self._policy_forward(model, forward)
        return total, losses, statistics
