"""The trainers on small data sets of token ids, and one training step of each as a function."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import trl_extensions as te

from ..speed.models import random_tokens
from .models import Size, make_tokenizer


_FOLDER = tempfile.gettempdir() + "/benchmarks-gpu"


@dataclass
class Step:
    """Forward, loss and backward of one batch, as `Trainer` does them, without the optimizer."""

    run: Callable[[], torch.Tensor]
    model: nn.Module
    tokens: int  # of the batch as it is laid out, padding too


def step_of(trainer: Trainer, batch: dict[str, torch.Tensor] | None = None) -> Step:
    """The step of a trainer on the first batch of its data, which is on the device already."""
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    model = trainer.accelerator.prepare_model(trainer.model)
    trainer.model_wrapped = model
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 100  # where a schedule of the loss asks for it
    items = None
    if batch is None:
        batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        (batch,) = batches
    ids = batch["completion_ids"] if "prompt_ids" in batch else batch["input_ids"]
    tokens = ids.numel() + (batch["prompt_ids"].numel() if "prompt_ids" in batch else 0)

    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return trainer.training_step(model, dict(batch), items)

    return Step(run, model, tokens)


def arguments(kind: type, rows: int, cpu: bool, **more: Any) -> Any:
    """Settings of a trainer: bfloat16 autocast, as TRL sets it, and no gradient checkpointing unless asked for."""
    own = {
        "output_dir": _FOLDER, "report_to": "none", "per_device_train_batch_size": rows, "disable_tqdm": True,
        "per_device_eval_batch_size": rows, "gradient_checkpointing": False, "save_strategy": "no", "use_cpu": cpu,
        "bf16": True, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    return kind(**own | more)


def token_rows(size: Size) -> list[list[int]]:
    return random_tokens(size.rows, size.length, size.vocabulary, seed=1)


def labelled(rows: list[list[int]], prompt: int) -> Dataset:
    """Rows for TRL's SFT: prompts are not scored."""
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * prompt + row[prompt:] for row in rows]})


def signed(rows: list[list[int]], prompt: int) -> Dataset:
    """Rows for TNT: one in fifty scored tokens is unwanted."""
    signs = [[0] * prompt + [-1 if i % 50 == 0 else 1 for i in range(len(row) - prompt)] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "token_weights": signs})


def samples(size: Size, prompt: int, response: int) -> list[list[int]]:
    """As many texts as there are rows, four to a prompt."""
    prompts = random_tokens(-(-size.rows // 4), prompt, size.vocabulary, seed=1)
    ends = random_tokens(size.rows, response, size.vocabulary, seed=2)
    return [prompts[i // 4] + end for i, end in enumerate(ends)]


def queries(size: Size, constitutions: int, number: int, prompt: int) -> Dataset:
    own = {"prompt_input_ids": [], "completion_input_ids": []}
    for query in range(number):
        own["prompt_input_ids"].append(random_tokens(constitutions, prompt, size.vocabulary, seed=2 * query))
        own["completion_input_ids"].append(
            random_tokens(constitutions, size.response, size.vocabulary, seed=2 * query + 1)
        )
    return Dataset.from_dict(own)


def sft(model, size: Size, cpu: bool, data: Dataset | None = None, peft=None, **more) -> SFTTrainer:
    data = labelled(token_rows(size), size.prompt) if data is None else data
    args = arguments(SFTConfig, len(data), cpu, max_length=None, **more)
    return SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer(),
                      peft_config=peft)  # fmt: skip


def tnt(model, size: Size, cpu: bool, data: Dataset | None = None, peft=None, **more):
    data = signed(token_rows(size), size.prompt) if data is None else data
    args = arguments(te.TNTConfig, len(data), cpu, max_length=None, **more)
    return te.TNTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer(),
                         peft_config=peft)  # fmt: skip


def token_targets(model, weak, size: Size, cpu: bool, peft=None, **more):
    """Weak-to-strong SFT on the distributions of a weak model."""
    data, tokenizer = labelled(token_rows(size), size.prompt), make_tokenizer()
    args = arguments(te.WeakToStrongSFTConfig, len(data), cpu, max_length=None, **more)
    return te.WeakToStrongSFTTrainer(
        model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=peft,
        weak_model=weak, weak_processing_class=tokenizer,
    )  # fmt: skip


def token_text(model, size: Size, cpu: bool, **more):
    """Weak-to-strong SFT on text, with weights."""
    data = labelled(token_rows(size), size.prompt).add_column("weight", [0.5 + i % 2 for i in range(size.rows)])
    args = arguments(te.WeakToStrongSFTConfig, len(data), cpu, max_length=None, **more)
    return te.WeakToStrongSFTTrainer(model, args, train_dataset=data, processing_class=make_tokenizer())


def sami(model, size: Size, cpu: bool, data: Dataset | None = None, peft=None, **more):
    data = queries(size, 2, size.queries, size.sami_prompt) if data is None else data
    args = arguments(te.SAMIConfig, len(data), cpu, max_length=None, **more)
    return te.SAMITrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer(),
                          peft_config=peft)  # fmt: skip


def sft_like_sami(model, size: Size, cpu: bool, **more) -> SFTTrainer:
    """SFT of as many sequences, tokens and labels as SAMI has with two constitutions."""
    rows = random_tokens(2 * size.queries, size.sami_prompt + 2 * size.response, size.vocabulary, seed=1)
    return sft(model, size, cpu, labelled(rows, size.sami_prompt), **more)


def pairs(size: Size, own: bool) -> Dataset:
    half, length = max(1, size.rows // 2), size.length
    columns = {
        "chosen_ids": random_tokens(half, length, size.vocabulary, seed=1),
        "rejected_ids": random_tokens(half, length, size.vocabulary, seed=2),
    }
    if own:
        columns |= {"preference": [0.8] * half, "weight": [1.0] * half}
    return Dataset.from_dict(columns)


def reward(model, size: Size, cpu: bool, peft=None, **more) -> RewardTrainer:
    data = pairs(size, False)
    args = arguments(RewardConfig, len(data), cpu, max_length=None, **more)
    return RewardTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer(),
                         peft_config=peft)  # fmt: skip


def weak_reward(model, size: Size, cpu: bool, peft=None, **more):
    data = pairs(size, True)
    args = arguments(te.WeakToStrongRewardConfig, len(data), cpu, max_length=None, loss_type="confidence", **more)
    return te.WeakToStrongRewardTrainer(model, args, train_dataset=data, eval_dataset=data,
                                        processing_class=make_tokenizer(), peft_config=peft)  # fmt: skip


def classification(model, size: Size, cpu: bool, peft=None, **more):
    rows = token_rows(size)
    soft = [[0.8, 0.2] if i % 2 else [0.3, 0.7] for i in range(len(rows))]
    data = Dataset.from_dict({"input_ids": rows, "soft_labels": soft})
    args = arguments(te.WeakToStrongConfig, len(data), cpu, max_length=None, loss_type="confidence", **more)
    return te.WeakToStrongTrainer(model, args, train_dataset=data, eval_dataset=data,
                                  processing_class=make_tokenizer(), peft_config=peft)  # fmt: skip


def distillation(model, teacher, size: Size, cpu: bool, peft=None, **more) -> Step:
    """The step of TRL's trainer on the rows of `sft`, given in place of what it would sample."""
    data = Dataset.from_dict({"prompt": ["a"] * size.rows})
    args = arguments(DistillationConfig, size.rows, cpu, beta=0.0, **more)
    trainer = DistillationTrainer(model, teacher, args, train_dataset=data, processing_class=make_tokenizer(),
                                  peft_config=peft)  # fmt: skip
    trainer._prepare_inputs = lambda inputs: inputs
    ids = torch.tensor(token_rows(size), device=trainer.args.device)
    prompt, completion = ids[:, : size.prompt], ids[:, size.prompt :]
    return step_of(trainer, {
        "prompt_ids": prompt, "completion_ids": completion, "prompt_mask": torch.ones_like(prompt),
        "completion_mask": torch.ones_like(completion),
    })  # fmt: skip
