"""A transformer as a learner: trained by our trainers on soft labels, asked for its probabilities."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig

from ...core.modeling.memory import free_memory
from ...core.runs.run import MUTABLE_ON_RESUME, training_settings
from ...core.training.load import build_trainer, last_checkpoint
from ...embedded import resolve_model_name
from ..arguments import split_layers
from ..data.examples import Example, Pair
from ..trainers.classification import WeakToStrongTrainer
from ..trainers.classifier import load_classifier, load_tokenizer, longest_input, settle_tokenizer
from ..trainers.configs import WeakToStrongConfig
from ..trainers.feature_store import FeatureStore
from ..trainers.probe import features, head_of
from ..trainers.reward import WeakToStrongRewardTrainer
from ..trainers.reward_config import WeakToStrongRewardConfig
from ..trainers.sequence_logits import pair_probabilities


class TransformerLearner:
    """Trains a fresh head, and the model or an adapter with it, each time it is fitted.

    Args:
        name: Model id, path or the embedded model, `NAME[:4]` for its first 4 layers.
        config: How it is trained; its `output_dir` and `seed` are replaced.
        model_args: LoRA, quantisation and dtype; its model is replaced.
        class_names: What the classes are called; two of a pair.
        features: Where a linear probe keeps the states of texts; needed with `linear_probe`.
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
        self.config = copy.copy(config)
        if layers is not None:
            self.config.model_init_kwargs = (config.model_init_kwargs or {}) | {"num_hidden_layers": layers}
        self.trainer: WeakToStrongTrainer | WeakToStrongRewardTrainer | None = None
        self.cost: dict[str, float] = {}
        self._frozen = None

    def fit(
        self,
        rows: Sequence[Example | Pair],
        soft_labels: np.ndarray,
        weights: np.ndarray | None,
        *,
        seed: int,
        folder: Path,
        **settings: Any,
    ) -> None:
        """Train on soft labels; goes on from the last checkpoint in `folder` where there is one.

        Args:
            rows: N examples or pairs.
            soft_labels: `(N, K)`; of pairs the probabilities that `chosen` and that `rejected` is the better one.
            weights: `(N,)` or None.
            seed: Of the head, the order and dropout.
            folder: For checkpoints and logs.
            settings: Fields of the configuration to change, such as `weak_loss`.
        """
        config = copy.copy(self.config)
        for name, value in {"output_dir": str(folder), "seed": seed, "data_seed": None, **settings}.items():
            setattr(config, name, value)
        self.trainer = None
        free_memory()
        if getattr(config, "linear_probe", False):
            self.trainer = self._probe(config, rows, soft_labels, weights)
        else:
            trainer_class = WeakToStrongRewardTrainer if isinstance(rows[0], Pair) else WeakToStrongTrainer
            dataset = Dataset.from_dict(_columns(rows, soft_labels, weights))
            if trainer_class is WeakToStrongTrainer:
                config.class_names = self.class_names
            self.trainer = build_trainer(trainer_class, self.model_args, config, dataset, None)
        result = self.trainer.train(resume_from_checkpoint=last_checkpoint(str(folder)))
        self.cost = {"training_seconds": result.metrics["train_runtime"], "steps": result.global_step}

    def predict(self, rows: Sequence[Example | Pair]) -> np.ndarray:
        """Probabilities `(N, K)` of the classes, in the order of the rows."""
        if isinstance(rows[0], Pair):
            trainer = self.trainer
            return pair_probabilities(trainer.model, trainer.processing_class, rows, self.config.max_length).numpy()
        columns = {"text": [row.text for row in rows]}
        if self._frozen is not None:
            columns = {"features": self._features(columns["text"])}
        logits = torch.as_tensor(self.trainer.predict(Dataset.from_dict(columns)).predictions)
        return logits.double().softmax(dim=1).numpy()

    @property
    def settings(self) -> dict[str, Any]:
        """What its answers depend on, beside rows and seed."""
        return training_settings(self.config, MUTABLE_ON_RESUME | {"seed"}) | asdict(self.model_args)

    def release(self) -> None:
        """Give the memory of the last training back; the next fit starts anew anyway."""
        self.trainer = None
        free_memory()

    def save(self, folder: Path) -> None:
        """Save the model or adapter, with its head and tokenizer."""
        self.trainer.save_model(str(folder))

    @property
    def is_main_process(self) -> bool:
        return self.trainer is None or self.trainer.is_world_process_zero()

    def _probe(self, config, rows, soft_labels, weights) -> WeakToStrongTrainer:
        """A trainer of a new head on the one frozen model that all fits share."""
        if self._frozen is None:
            self._frozen = self._load_frozen(config)
        model, tokenizer = self._frozen
        set_seed(config.seed)
        with torch.no_grad():
            head_of(model).weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
        columns = _columns(rows, soft_labels, weights)
        columns["features"] = self._features(columns.pop("text"))
        return WeakToStrongTrainer(model, config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)

    def _load_frozen(self, config):
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
            limit = longest_input(model, tokenizer, self.config.max_length)
            token_ids = tokenizer(missing, truncation=limit is not None, max_length=limit)["input_ids"]
            return features(model, token_ids, batch_tokens=self.config.probe_batch_tokens)

        return self.features.get(texts, compute)


def _columns(rows: Sequence[Example | Pair], soft_labels: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    if isinstance(rows[0], Pair):
        columns = {"chosen": [row.chosen for row in rows], "rejected": [row.rejected for row in rows]}
        columns["preference"] = soft_labels[:, 0].tolist()
    else:
        columns = {"text": [row.text for row in rows], "soft_labels": soft_labels.tolist()}
    return columns if weights is None else columns | {"weight": list(weights)}
