"""Fine-tune on CodecLM's pairs, and what the pairs that were held out say of it without any judge."""

import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer

from ..core.generation import EngineArguments, ModelSource, TransformersEngine
from ..core.modeling.batches import eval_mode
from ..core.runs.report import write_atomically
from ..core.stats import bootstrap_ratio
from ..core.training.load import RunsHere, fit, settle
from ..core.training.step_average import StopsAtNonFinite
from .collator import IGNORED, DataCollatorForCodecLM
from .export import load_pairs
from .weighted_loss import WEIGHT_BY, WeightedLoss


logger = logging.getLogger(__name__)


@dataclass
class CodecLMTrainingConfig(RunsHere, SFTConfig):
    """`SFTConfig`, for the machine that is there."""


def split_pairs(rows: Sequence[dict[str, Any]], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out, both in their order: of the latter at least one if the share is above 0, and
    never all. Raises `ValueError` where the share is not in [0, 1), or there is only one row to split."""
    if not 0 <= share < 1:
        raise ValueError(f"The share of pairs held out must be at least 0 and below 1, got {share!r}.")
    if share and len(rows) < 2:
        raise ValueError("There is one pair only, and none to hold out: make more, or hold out a share of 0.")
    number = min(len(rows) - 1, max(1, round(share * len(rows)))) if share else 0
    held_out = set(random.Random(seed).sample(range(len(rows)), number))
    train = [row for place, row in enumerate(rows) if place not in held_out]
    return train, [rows[place] for place in sorted(held_out)]


def train_on_data(
    model_args: ModelConfig,
    config: SFTConfig,
    data: Path,
    target: Path,
    weight_by: str | None = None,
    *,
    validation: float = 0.0,
) -> None:
    """Fine-tune a model on exported pairs (`data.jsonl`) with `SFTTrainer`, and leave it at `target`.

    LoRA and QLoRA are in `model_args`; the same call again goes on from the last checkpoint. `weight_by` is as in
    `DataCollatorForCodecLM`, the mean over all training pairs being 1, and `validation` the share of pairs held out
    (`split_pairs` with the seed of `config`). Raises a `ValueError` where there are no pairs, settings do not go with
    weights, the model has no chat template, or `target` exists.
    """
    if weight_by not in WEIGHT_BY:
        raise ValueError(f'`weight_by` must be "gap", "metadata" or left out, got {weight_by!r}.')
    if weight_by is not None:
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(config, name):
                raise ValueError(f"`{name}` puts rows together, which cannot be weighed then: set it to False.")
        if isinstance(own := config.dataset_kwargs, dict) and own.get("skip_prepare_dataset"):
            raise ValueError("`skip_prepare_dataset` does not work with weighted rows here: leave it out.")
        config.remove_unused_columns = False
    train, held_out = split_pairs(load_pairs(data), validation, config.seed)
    is_chat = not config.chat_template_path and not isinstance(train[0]["prompt"], str)
    if is_chat and not ModelSource(model_args, EngineArguments(), config.trust_remote_code).is_conversational():
        model = model_args.model_name_or_path
        raise ValueError(f"{model} has no chat template, but the pairs are chats: set `chat_template_path`.")
    columns = ("prompt", "completion", *{None: (), "gap": ("scores",), "metadata": ("metadata",)}[weight_by])
    rows, others = (
        Dataset.from_list([{own: row[own] for own in columns} | {"lineage": {"id": row["id"]}} for row in part])
        for part in (train, held_out)
    )
    trainer: Any = partial(_trainer, weight_by)
    fit(trainer, model_args, config, rows, others if held_out else None, target)


class _Trainer(StopsAtNonFinite, SFTTrainer):
    pass


def _trainer(weight_by: str | None, *args: Any, **options: Any) -> Any:
    """An `SFTTrainer`; with weights, one that has another collator and a callback."""
    trainer: Any = _Trainer(*args, **options)
    settle(trainer)
    given, left, limit = len(options["train_dataset"]), len(trainer.train_dataset), trainer.args.max_length
    if left < given and not trainer.args.packing:
        logger.warning("%d of %d pairs are left out: their prompts fill max_length=%s", given - left, given, limit)
    if not left:
        raise ValueError(f"No pair is left to train on at max_length={limit}: raise it.")
    if weight_by is not None:
        options = {"mean_over": "data", "pad_to_multiple_of": trainer.args.pad_to_multiple_of}
        collator = DataCollatorForCodecLM(trainer.processing_class, weight_by, **options)
        trainer.data_collator = collator.fit(trainer.train_dataset)
        trainer.add_callback(WeightedLoss())
    return trainer


def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    max_length: int | None,
) -> list[tuple[float, int]]:
    """For each row the negative log-likelihood of its completion in nats, and the tokens scored; (0, 0) where the
    prompt fills `max_length`. One row at a time: the numbers do not depend on what else is in a batch."""
    collator, results = DataCollatorForCodecLM(tokenizer, max_length=None), []
    with eval_mode(model), torch.inference_mode():
        for row in rows:
            batch = collator([row])
            ids, labels = (batch[name][:, :max_length].to(model.device) for name in ("input_ids", "labels"))
            scored = labels[0, 1:] != IGNORED
            if not scored.any():
                results.append((0.0, 0))
                continue
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1][scored]
            logprobs = logits.float().log_softmax(-1).gather(1, labels[0, 1:][scored, None])
            results.append((-logprobs.double().sum().item(), int(scored.sum())))
    return results


def compare_held_out(
    rows: Sequence[Mapping[str, Any]],
    before: Callable[[], TransformersEngine],
    after: Callable[[], TransformersEngine],
    output: Path,
    *,
    max_length: int | None = 1024,
) -> dict[str, Any]:
    """Negative log-likelihood of held-out pairs before and after training, in nats per completion token.

    It needs no judge: the completions are what the better model wrote, so lower is closer to it. `before` and `after`
    load the models; one is in memory at a time. Written to `output` and returned are `before`, `after` and `change`
    with `nats_per_token` and its bootstrap `interval` over rows (`None` for fewer than two; that of the change is
    paired), `rows`, `tokens`, and `skipped`: rows whose prompts fill `max_length`.
    """
    losses = {}
    for name, load in (("before", before), ("after", after)):
        engine = load()
        losses[name] = completion_losses(engine.model, engine.tokenizer, rows, max_length)
        del engine
    tokens = [count for _, count in losses["after"]]
    if not sum(tokens):
        raise ValueError(f"no held-out pair has a completion within max_length={max_length}: raise it.")
    scored = sum(count > 0 for count in tokens)
    result: dict[str, Any] = {"rows": scored, "skipped": len(tokens) - scored, "tokens": sum(tokens)}
    for name, rows_of in losses.items():
        result[name] = _per_token([nats for nats, _ in rows_of], [count for _, count in rows_of])
    changes = [new - old for (new, _), (old, _) in zip(losses["after"], losses["before"], strict=True)]
    result["change"] = _per_token(changes, tokens)
    write_atomically(output, json.dumps(result, indent=2) + "\n")
    return result


def _per_token(nats: list[float], tokens: list[int]) -> dict[str, Any]:
    low, high = bootstrap_ratio(nats, tokens)
    interval = None if math.isnan(low) else [low, high]
    return {"nats_per_token": math.fsum(nats) / sum(tokens), "interval": interval}
