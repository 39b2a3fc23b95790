"""`WeakToStrongTrainer`: a classifier with K classes that learns from the soft labels of weaker models."""

import copy
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..._compat import (
    BaseTrainer,
    ForwardRedirection,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
    suppress_seqcls_warning,
)
from ...core.modeling.batches import keep_trainable
from ...core.training.load import as_config, reject_prompt_learning, reject_sequence_parallelism, reject_stream, settle
from ...core.training.step_average import StepAverage
from ...embedded import resolve_model_name
from ..data.collator import DataCollatorForWeakLabels
from ..data.prepare import (
    ROW_COLUMNS,
    classes_of,
    end_token,
    mean_soft_label,
    prepare_rows,
    weigh_by_confidence,
)
from .configs import WeakToStrongConfig
from .features import features, head_logits, head_of
from .objective import PAPER, LearnsFromWeakLabels, WeakSupervision


logger = logging.getLogger(__name__)

_HEADS = ("score", "classifier", "classification_head")


class WeakToStrongTrainer(LearnsFromWeakLabels, StepAverage, BaseTrainer):
    """Weak-to-strong generalisation (arXiv 2312.09390, 2410.12621) for text classification with K >= 2 classes.

    LoRA, QLoRA, full fine-tuning, accumulation and `accelerate launch` work as in `RewardTrainer`. Every row of an
    optimizer step counts the same, times its weight, however the step is cut into micro-batches and devices.

    Args:
        model: Model id, path, `PreTrainedModel` for sequence classification or `PeftModel` of one. By name it gets a
            head of K classes: `args.num_labels`, else as many as `args.class_names`, else as the training data shows.
        args: `WeakToStrongConfig`; plain `TrainingArguments` are converted.
        data_collator: Defaults to `DataCollatorForWeakLabels`.
        train_dataset: Rows with `text`, or `prompt` (text or chat messages), and `soft_labels` (K floats that sum to
            1) or `label` (class number or name); optionally `weight`. `input_ids` or, with `linear_probe`, `features`
            (the pooled state) are taken in place of a text.
        eval_dataset: Held-out rows of the same kind, or a dict of such datasets.
        processing_class: Tokenizer; loaded from the model when left out.
        compute_metrics: As in `Trainer`; predictions are logits `(N, K)`, label ids the true classes `(N,)` where all
            rows have them, otherwise the soft labels `(N, K)`.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in `Trainer`.
        quantization_config: For a model given by name.
        peft_config: Wraps the model; the head is trained along.

    Logged, averaged over rows: `agreement` (the model's class is the one the weak label favours), `confidence` (the
    probability of the model's class), `loss_coef` (weight of the model's own view, see `Objective`). `evaluate`
    reports the same with the prefix `eval_`, and `eval_accuracy` over rows whose true `label` is known. Evaluation
    always shows the loss past its warm-up. `predict` returns logits `(N, K)`, and takes rows without labels.

    Raises:
        ValueError: Data or settings that cannot be used; the message names the row or field and the remedy.
        TypeError: A streaming dataset.
    """

    _tag_names = ["trl", "weak-to-strong"]  # noqa: RUF012 (TRL's own convention)
    _name = "Weak-to-strong"
    _paper = PAPER
    _redirect = ForwardRedirection()

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: WeakToStrongConfig | TrainingArguments | None = None,
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
        args = as_config(args, WeakToStrongConfig, model, "WeakToStrong")
        reject_prompt_learning(model, peft_config, "weak-to-strong training")
        reject_sequence_parallelism(args, "weak-to-strong training")
        if train_dataset is not None:
            reject_stream(train_dataset, "train", "weak-to-strong training")
        set_seed(args.seed)  # a new head is random
        if isinstance(model, str):
            model = load_classifier(model, args, *_classes(args, train_dataset), quantization_config)
        self.num_labels, self.class_names = _classes_of_model(model, args)
        tokenizer = load_tokenizer(model, args) if processing_class is None else processing_class
        settle_tokenizer(model, tokenizer, args)
        if args.linear_probe:
            _freeze_backbone(model, peft_config)
        model = wrap_classifier(model, peft_config, args)
        keep_trainable(model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        self._max_length = longest_input(model, tokenizer, args.max_length)
        super().__init__(
            model=model, args=args,
            data_collator=data_collator or DataCollatorForWeakLabels(tokenizer.pad_token_id, args.pad_to_multiple_of),
            train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer,
            compute_metrics=compute_metrics, callbacks=callbacks, optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        if args.n_gpu > 1:
            raise ValueError("Several GPUs are visible to one process: use `accelerate launch`, or show it only one.")
        self.model.add_model_tags(self._tag_names)
        prior = np.full(self.num_labels, 1 / self.num_labels)
        if train_dataset is not None:
            self.train_dataset = self._prepare_dataset(train_dataset, "train")
            prior = mean_soft_label(self.train_dataset)
        settle(self)
        if isinstance(eval_dataset, dict):
            self.eval_dataset = {name: self._prepare_dataset(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare_dataset(eval_dataset, "eval")
        self.supervision = WeakSupervision(args.objective(), prior)

    def _prepare_dataset(self, dataset: Dataset, name: str, labelled: bool = True) -> Dataset:
        reject_stream(dataset, name, "weak-to-strong training")
        if "features" in dataset.column_names and not self.args.linear_probe:
            raise ValueError(f"The {name} dataset has `features`, which only `linear_probe` reads: set it.")
        with global_then_local_main_first():
            # Every row that is asked about is answered
            overlong_policy = self.args.overlong_policy if labelled else "truncate"
            dataset = prepare_rows(
                dataset, self.processing_class, num_labels=self.num_labels, class_names=self.class_names,
                max_length=self._max_length, overlong_policy=overlong_policy, name=name, labelled=labelled,
                num_proc=self.args.dataset_num_proc,
            )  # fmt: skip
            if name == "train" and self.args.weight_by_confidence:
                dataset = weigh_by_confidence(dataset)
        if self.args.linear_probe and "features" not in dataset.column_names:
            dataset = concatenate_datasets([dataset, Dataset.from_dict({"features": self._features(dataset)})], axis=1)
        return dataset

    def _features(self, dataset: Dataset) -> np.ndarray:
        """`(N, H)`, each process having computed its share."""
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        token_ids, model = dataset["input_ids"][:], self.accelerator.unwrap_model(self.model)
        shown = not self.args.disable_tqdm and rank == 0
        own = features(model, token_ids[rank::size], batch_tokens=self.args.probe_batch_tokens, progress=shown)
        everything = np.empty((len(token_ids), own.shape[1]), dtype=own.dtype)
        for place, share in enumerate(gather_object([own]) if size > 1 else [own]):
            everything[place::size] = share
        return everything

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ROW_COLUMNS

    def count_items(self, batch):
        return len(batch["soft_labels"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = self.weak_logits(model, inputs)
        losses, coef = self.weak_losses(logits, inputs["soft_labels"], inputs["weight"])
        confidence, predicted = logits.detach().softmax(dim=-1).max(dim=-1)
        agreement = predicted == inputs["soft_labels"].argmax(dim=-1)
        columns = {"loss": losses.detach(), "agreement": agreement, "confidence": confidence, "loss_coef": coef}
        averages = {name: (column, torch.ones_like(confidence)) for name, column in columns.items()}
        if "label" in inputs and not self.model.training:
            averages["accuracy"] = (predicted == inputs["label"], inputs["label"] >= 0)
        self.record(averages)
        loss = self.step_loss(losses.sum(), len(losses))
        return (loss, {"logits": logits}) if return_outputs else loss

    def weak_logits(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(B, K)` float32; labels never reach the model, which would choose a loss of its own."""
        if "features" in inputs:
            unwrapped = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():
                return self._redirect(model, unwrapped, head_logits, unwrapped, inputs["features"]).float()
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**texts, **self._options).logits.float()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if "soft_labels" not in inputs:
                return None, self.weak_logits(model, inputs), None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["logits"], inputs["label" if self._true_labels_known else "soft_labels"]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As `Trainer.evaluate`; rows that were not prepared yet are."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._prepare_dataset(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Dataset, ignore_keys=None, metric_key_prefix="test") -> Any:
        """As `Trainer.predict`, with logits `(N, K)` as predictions; rows need no labels."""
        dataset = self._prepare_dataset(test_dataset, metric_key_prefix, labelled=False)
        return super().predict(dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        rows = dataloader.dataset
        self._true_labels_known = "label" in rows.column_names and None not in rows["label"]
        return super().evaluation_loop(dataloader, *args, **kwargs)


def _classes(args: WeakToStrongConfig, dataset: Dataset | None) -> tuple[int, list[str] | None]:
    """Classes of a model that is about to be loaded, and their names."""
    if args.class_names:
        return len(args.class_names), args.class_names
    if dataset is None and args.num_labels is None:
        raise ValueError("Without a train dataset the number of classes is unknown: set `num_labels`.")
    number, names = (args.num_labels, None) if dataset is None else classes_of(dataset)
    number = args.num_labels or number
    return number, names if names and len(names) == number else None


def _classes_of_model(model: PreTrainedModel | PeftModel, args: WeakToStrongConfig) -> tuple[int, list[str]]:
    number = model.config.num_labels
    wanted = args.num_labels or (len(args.class_names) if args.class_names else number)
    if number != max(2, wanted):
        needed = max(2, wanted)
        raise ValueError(f"The model has {number} classes where {needed} are needed: give num_labels={needed} to it.")
    if args.class_names:
        model.config.id2label = dict(enumerate(args.class_names))
        model.config.label2id = {name: place for place, name in enumerate(args.class_names)}
    return number, [model.config.id2label[place] for place in range(number)]


def _freeze_backbone(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    if peft_config is not None or isinstance(model, PeftModel):
        raise ValueError("`linear_probe` trains the head alone, and an adapter changes what it reads: drop one.")
    model.requires_grad_(False)
    head_of(model).requires_grad_(True)


def load_classifier(
    name: str, args: WeakToStrongConfig, num_labels: int, class_names: list[str] | None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A sequence classification model by id or path, float32 unless `args.model_init_kwargs` says otherwise; a head
    that the checkpoint does not have is drawn from the current random state."""
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("`quantization_config` is given twice: leave it out of `model_init_kwargs`.")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if class_names:
        options["id2label"] = dict(enumerate(class_names))
        options["label2id"] = {label: number for number, label in enumerate(class_names)}
    with suppress_seqcls_warning():
        return create_model_from_path(name, AutoModelForSequenceClassification, num_labels=num_labels, **options)


def load_tokenizer(model: PreTrainedModel | PeftModel, args: WeakToStrongConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model."""
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(
        get_config_model_id(model.config), revision=revision or "main", trust_remote_code=args.trust_remote_code
    )


def settle_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: WeakToStrongConfig) -> None:
    """Chat template and padding token; the model needs the latter to find the last token of each text."""
    if args.chat_template_path is not None:
        if os.path.isfile(args.chat_template_path):
            tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(args.chat_template_path).chat_template
    pad_token = args.pad_token or tokenizer.pad_token or end_token(tokenizer)
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"The padding token {pad_token!r} is not in the vocabulary: set `tokenizer.pad_token`.")
    tokenizer.pad_token = pad_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """The most tokens a text may have: `max_length`, or less where the model or its tokenizer takes less."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer that knows no limit says 10 to the 30
    known = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return min((limit for limit in (max_length, positions, known) if limit), default=None)


def wrap_classifier(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: WeakToStrongConfig
) -> PreTrainedModel | PeftModel:
    """The model as it is trained: adapter, dtype of its weights, gradient checkpointing, dropout.

    An adapter of another task type (TRL's default is causal language modelling) becomes one that trains the head.
    """
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("`model` has an adapter already: leave `peft_config` out, or merge the adapter first.")
        if peft_config.task_type != "SEQ_CLS":
            logger.info("The adapter's task_type %s becomes SEQ_CLS, which trains the head.", peft_config.task_type)
            peft_config = copy.deepcopy(peft_config)
            peft_config.task_type = "SEQ_CLS"
        # ZeRO-3 gathers parameters of one dtype only
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=quantised or not zero3)
    if isinstance(model, PeftModel):
        trained = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
        if not trained.intersection(_HEADS):
            raise ValueError("The adapter leaves the classification head frozen: make it with task_type='SEQ_CLS'.")
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
            if zero3:
                given = args.gradient_checkpointing_kwargs or {}
                args.gradient_checkpointing_kwargs = {**given, "use_reentrant": True}
    if quantised:
        # As TRL does; updates of DoRA's magnitudes would vanish in bfloat16
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model
