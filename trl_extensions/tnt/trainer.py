"""`TNTTrainer`: an `SFTTrainer` that takes unwanted tokens out of a model and leaves the rest where it was."""

import logging

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import Sampler
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
from ..core.modeling.batches import keep_trainable
from ..core.modeling.reference import ReferenceMixin, build_reference
from ..core.training.load import as_config, reject_prompt_learning, reject_sequence_parallelism, reject_stream, settle
from ..core.training.step_average import StepAverage
from ..embedded import resolve_model_name
from .collator import DataCollatorForTNT, PromptSampler, prompt_length
from .config import TNTConfig
from .data import TOKEN_COLUMNS, prepare_rows
from .fused_loss import Objective
from .scores import score_tokens, scored_states, sums_of_rows


logger = logging.getLogger(__name__)


class OwnRate(TrainerCallback):
    """A checkpoint's optimizer has the learning rate of the step before it: the next one gets what its schedule says,
    as where an annealed training goes on in another cycle."""

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        for place, factor in enumerate(getattr(lr_scheduler, "lr_lambdas", ())):
            optimizer.param_groups[place]["lr"] = lr_scheduler.base_lrs[place] * factor(state.global_step)


class TNTTrainer(ReferenceMixin, StepAverage, SFTTrainer):
    """Targeted negative training (TNT, arXiv 2406.13660): remove annotated tokens, keep the distribution otherwise.

    Swap it for `SFTTrainer`; LoRA, QLoRA, full fine-tuning, gradient accumulation and `accelerate launch` work as they
    do there. Train on the model's own outputs. Arguments not listed are those of `SFTTrainer`.

    Args:
        model: Model id, path, `PreTrainedModel` or `PeftModel`. An adapter that is trained already goes on being
            trained, relative to the model as it is given: the way to add a second patch to a patched model.
        args: `TNTConfig`; plain `TrainingArguments` or an `SFTConfig` are converted.
        train_dataset: Rows with `prompt`, `completion` and `negative_spans` (character offsets `[start, end)` into the
            completion; empty for a clean row), or `input_ids`, `labels` and `negative_mask`.
        ref_model: The original. Left out: the model behind a fresh adapter, the PEFT model as it was given (kept as
            the adapter "ref"), or a frozen copy.

    Logged, averaged over tokens: `prob/negative` and `prob/negative_ref` (probability of the unwanted tokens under the
    policy and the original), `kl/negative` and `kl/kept` (KL from the ideal target to the policy, nats per token),
    `entropy` (nats), `tokens/negative` (their share of scored tokens); by `evaluate` with the prefix `eval_`.
    Raises `ValueError` for data or settings that TNT cannot use, `TypeError` for a streaming dataset.
    """

    _tag_names = ["trl", "tnt"]  # noqa: RUF012 (TRL's own convention)
    _name = "TNT"
    _paper = {  # noqa: RUF012
        "title": "Towards Minimal Targeted Updates of Language Models with Targeted Negative Training",
        "id": "2406.13660",
        # docstyle-ignore
        "citation": """\
@article{zhang2024towards,
    title   = {{Towards Minimal Targeted Updates of Language Models with Targeted Negative Training}},
    author  = {Lily H. Zhang and Rajesh Ranganath and Arya Tafvizi},
    year    = 2024,
    journal = {Transactions on Machine Learning Research},
    eprint  = {arXiv:2406.13660}
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TNTConfig | TrainingArguments | None = None,
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
        args = as_config(args, TNTConfig, model, "TNT")
        reject_prompt_learning(model, peft_config, "TNT")
        reject_sequence_parallelism(args, "TNT")
        self.objective: Objective = Objective(args.variant, args.alpha, args.smoothing, args.smooth_over)
        adapter_is_trained = isinstance(model, PeftModel)
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs, quantization_config=quantization_config,
            peft_config=peft_config,
        )  # fmt: skip
        keep_trainable(self.model)
        self.add_callback(OwnRate)
        rows = () if self.train_dataset is None else self.train_dataset["token_weights"]
        settle(self, sum(any(weight < 0 for weight in own) for own in rows))
        if self._is_vision_dataset or getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("TNT trains decoder-only models on text: images and encoder-decoders are not supported.")
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        if data_collator is None:
            shares_prefix = self._shares_prefix(self.model, *([] if ref_model is None else [ref_model]))
            pad_id = self._tokenizer.pad_token_id
            self.data_collator = DataCollatorForTNT(pad_id, args.pad_to_multiple_of, share_prefix=shares_prefix)
        elif args.share_prefix:
            logger.warning("`share_prefix` has no effect: it is the `data_collator` given that lays batches out.")
        self.reference = build_reference(self.model, self.accelerator, ref_model, adapter_is_trained)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        reject_stream(dataset, dataset_name, "TNT")
        limits = {"max_length": args.max_length, "num_proc": args.dataset_num_proc}
        with global_then_local_main_first():
            dataset = prepare_rows(dataset, self._tokenizer, name=dataset_name, **limits)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = TOKEN_COLUMNS

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not getattr(self.data_collator, "share_prefix", False) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(dataset)
        rows = dataset.with_format(None)
        prompts = [hash(tuple(row["input_ids"][: prompt_length(row["token_weights"])])) for row in rows]
        if len(set(prompts)) == len(prompts):
            return super()._get_train_sampler(dataset)
        return PromptSampler(prompts, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def count_items(self, batch):
        return int((batch["token_weights"][:, 1:] != 0).sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference = self._reference_states(model, scored_states, inputs)

        def forward(policy):
            scores = score_tokens(policy, inputs, reference, self.objective)
            return scores.total, scores

        total, scores = self._policy_forward(model, forward)
        self.record(sums_of_rows(scores, inputs), tokens=inputs["attention_mask"])
        loss = self.step_loss(total, len(scores.losses))
        return (loss, {"losses": scores.losses}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, inputs, True, ignore_keys)  # there are no logits to return
