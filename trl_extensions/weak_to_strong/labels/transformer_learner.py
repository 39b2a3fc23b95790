"""A transformer as a learner: trained by our trainers on soft labels, or taken as it was saved, and asked."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import ModelConfig, get_quantization_config

from ..._compat import create_model_from_path
from ...core.generation.types import adapter_base, is_adapter_directory, tokenizer_source
from ...core.modeling.batches import free_memory
from ...core.runs.run import MUTABLE_ON_RESUME, training_settings
from ...core.training.load import build_trainer, last_checkpoint
from ...embedded import resolve_model_name
from ..arguments import split_layers
from ..data.examples import Pair
from ..data.prepare import encode_text, end_token
from ..trainers.classification import (
    WeakToStrongTrainer,
    load_classifier,
    load_tokenizer,
    longest_input,
    settle_tokenizer,
)
from ..trainers.configs import WeakToStrongConfig, WeakToStrongRewardConfig
from ..trainers.features import FeatureStore, features, head_of, pair_probabilities, sequence_logits
from ..trainers.reward import WeakToStrongRewardTrainer
from .learners import Rows


class TransformerLearner:
    """Trains a fresh head, and the model or an adapter with it, each time it is fitted.

    `NAME[:4]` means its first 4 layers; `features` is where a linear probe keeps the states of texts.
    """

    def __init__(
        self,
        name: str,
        config: WeakToStrongConfig | WeakToStrongRewardConfig,
        model_args: ModelConfig,
        class_names: list[str],
        features: FeatureStore | None = None,
    ):
        path, layers = split_layers(name)
        self.name, self.class_names, self.features = name, class_names, features
        # An adapter made for language modelling, which is TRL's default, would leave the head untrained
        self.model_args = replace(model_args, model_name_or_path=resolve_model_name(path), lora_task_type="SEQ_CLS")
        self.config: Any = copy.copy(config)
        if layers is not None:
            self.config.model_init_kwargs = (self.config.model_init_kwargs or {}) | {"num_hidden_layers": layers}
        self.trainer: Any = None  # of the last fit
        self.cost: dict[str, float] = {}
        self._frozen: Any = None  # model and tokenizer

    def fit(self, rows: Rows, soft_labels: np.ndarray, *, seed: int, folder: Path, **settings: Any) -> None:
        """Train on soft labels; goes on from the last checkpoint in `folder` where there is one. `settings` are fields
        of the configuration to change, such as the loss; see `Learner.fit` for the rest."""
        config = copy.copy(self.config)
        for name, value in {"output_dir": str(folder), "seed": seed, "data_seed": None, **settings}.items():
            setattr(config, name, value)
        self.trainer = None
        free_memory()
        if getattr(config, "linear_probe", False):
            self.trainer = self._probe(config, rows, soft_labels)
        else:
            trainer_class = WeakToStrongRewardTrainer
            if isinstance(config, WeakToStrongConfig):
                trainer_class, config.class_names = WeakToStrongTrainer, self.class_names
            dataset = Dataset.from_dict(_columns(rows, soft_labels))
            self.trainer = build_trainer(trainer_class, self.model_args, config, dataset, None)
        result = self.trainer.train(resume_from_checkpoint=last_checkpoint(str(folder)))
        self.cost = {"training_seconds": result.metrics["train_runtime"], "steps": result.global_step}

    def predict(self, rows: Rows) -> np.ndarray:
        """Probabilities `(N, K)` of the classes, in the order of the rows."""
        trainer = self.trainer
        if isinstance(rows[0], Pair):
            return pair_probabilities(trainer.model, trainer.processing_class, rows, self.config.max_length).numpy()
        texts = [row.text for row in rows]
        columns = {"text": texts} if self._frozen is None else {"features": self._features(texts)}
        logits = torch.as_tensor(trainer.predict(Dataset.from_dict(columns)).predictions)
        return logits.double().softmax(dim=1).numpy()

    @property
    def settings(self) -> dict[str, Any]:
        return training_settings(self.config, MUTABLE_ON_RESUME | {"seed"}) | asdict(self.model_args)

    def release(self) -> None:
        """Give the memory of the last training back; the next fit starts anew anyway."""
        self.trainer = None
        free_memory()

    def _probe(self, config: WeakToStrongConfig, rows: Rows, soft_labels: np.ndarray) -> WeakToStrongTrainer:
        """A trainer of a new head on the one frozen model that all fits share."""
        self._frozen = self._frozen or self._load_frozen(config)
        model, tokenizer = self._frozen
        set_seed(config.seed)
        with torch.no_grad():
            head_of(model).weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
        columns = _columns(rows, soft_labels)
        columns["features"] = self._features(columns.pop("text"))
        return WeakToStrongTrainer(model, config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)

    def _load_frozen(self, config: WeakToStrongConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        config.model_init_kwargs = {
            "device_map": None,  # one frozen model on one device, also where several are visible
            "revision": self.model_args.model_revision,
            "attn_implementation": self.model_args.attn_implementation,
            "dtype": self.model_args.dtype,
        } | (config.model_init_kwargs or {})
        path = self.model_args.model_name_or_path
        model = load_classifier(path, config, len(self.class_names), self.class_names, None)
        head_of(model).float()  # small steps of a half-precision head would vanish
        tokenizer = load_tokenizer(model, config)
        settle_tokenizer(model, tokenizer, config)
        config.model_init_kwargs = None  # of a name; the trainer is given a model
        return model.to(config.device), tokenizer

    def _features(self, texts: list[str]) -> np.ndarray:
        model, tokenizer = self._frozen

        def compute(missing: list[str]) -> np.ndarray:
            token_ids = _token_ids(model, tokenizer, missing, self.config.max_length)
            return features(model, token_ids, batch_tokens=self.config.probe_batch_tokens)

        return self.features.get(texts, compute)


def _columns(rows: Rows, soft_labels: np.ndarray) -> dict[str, Any]:
    if isinstance(rows[0], Pair):
        columns = {"chosen": [row.chosen for row in rows], "rejected": [row.rejected for row in rows]}
        return columns | {"preference": soft_labels[:, 0].tolist()}
    return {"text": [row.text for row in rows], "soft_labels": soft_labels.tolist()}


def _token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int | None
) -> list[list[int]]:
    limit = longest_input(model, tokenizer, max_length)
    return [encode_text(tokenizer, text, limit)[0] for text in texts]


def saved_class_names(name: str, model_args: ModelConfig, trust_remote_code: bool) -> list[str] | None:
    """What a whole model calls its classes; None of an adapter, and where they are called LABEL_0, LABEL_1, ..."""
    if is_adapter_directory(name):
        return None
    config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    names = [config.id2label[number] for number in range(config.num_labels)]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def predict_saved(
    name: str,
    rows: Rows,
    num_classes: int,
    config: WeakToStrongConfig | WeakToStrongRewardConfig,
    model_args: ModelConfig,
) -> np.ndarray:
    """Probabilities `(N, K)` by a trained classifier or reward model: a whole one, or an adapter on its base."""
    num_labels = 1 if isinstance(rows[0], Pair) else num_classes
    model, tokenizer = load_saved(name, num_labels, model_args, config.trust_remote_code, config.device)
    if isinstance(rows[0], Pair):
        return pair_probabilities(model, tokenizer, rows, longest_input(model, tokenizer, config.max_length)).numpy()
    token_ids = _token_ids(model, tokenizer, [row.text for row in rows], config.max_length)
    return sequence_logits(model, token_ids).double().softmax(dim=1).numpy()


def load_saved(
    name: str, num_labels: int, model_args: ModelConfig, trust_remote_code: bool, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as `model_args` say (dtype, attention, revision, quantisation), and its tokenizer.

    A revision is that of the model, or of an adapter's base. A `ValueError` says if it has not `num_labels` outputs.
    """
    source: dict[str, Any] = {"revision": model_args.model_revision, "trust_remote_code": trust_remote_code}
    options = source | {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype or "float32"}
    quantization = get_quantization_config(model_args)
    options |= {"device_map": None} if quantization is None else {"quantization_config": quantization}
    if is_adapter_directory(name):
        base = adapter_base(name)
        model = create_model_from_path(base, AutoModelForSequenceClassification, num_labels=num_labels, **options)
        try:
            model = PeftModel.from_pretrained(model, name)
        except RuntimeError as error:  # several lines, a tensor each
            if "size mismatch" not in str(error):
                raise
            misfit = f"{name} does not fit {base} with {num_labels} outputs"
            raise ValueError(f"{misfit}: set `task`, or `class_names` to the classes it was trained on.") from error
        source.pop("revision")
    else:
        config = AutoConfig.from_pretrained(name, **source)
        made_for = (config.architectures or [""])[0]
        if made_for and "SequenceClassification" not in made_for and not trust_remote_code:
            raise ValueError(f"{name} is a {made_for} and has no head to ask: give a model that `train` made.")
        if config.num_labels != num_labels:
            misfit = f"{name} has {config.num_labels} outputs where {num_labels} are needed"
            raise ValueError(f"{misfit}: set `task`, or `class_names` to the classes it was trained on.")
        model = create_model_from_path(name, AutoModelForSequenceClassification, **options)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(name), **source)
    tokenizer.pad_token = tokenizer.pad_token or end_token(tokenizer)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.to(device) if quantization is None else model, tokenizer
