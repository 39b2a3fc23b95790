"""Train on sampled rows and leave a whole model behind, or none."""

import gc
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..core.jsonl import read_jsonl
from .sami_config import SAMIConfig
from .sami_trainer import SAMITrainer
from .sampling import load_rows, to_dataset


logger = logging.getLogger(__name__)


def load_training_rows(source: str, split: str) -> Dataset:
    """Rows to train on: the kept ones of a file `sample` wrote, or a data set with the trainer's columns.

    Raises:
        ValueError: A file that is not there, or holds nothing usable.
    """
    if not source.endswith(".jsonl"):
        return load_dataset(source, split=split)
    if not os.path.isfile(source):
        raise ValueError(f"{source}: there is no such file; run `trl-ext sami sample` first.")
    rows = read_jsonl(source)
    return to_dataset(load_rows(source)) if rows and "kept" in rows[0] else Dataset.from_list(rows)


def build_trainer(model_args: ModelConfig, config: SAMIConfig, rows: Dataset, held_out: Dataset | None) -> SAMITrainer:
    """The trainer of a named model with its LoRA and quantisation settings."""
    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (config.model_init_kwargs or {})
    return SAMITrainer(
        model_args.model_name_or_path,
        config,
        train_dataset=rows,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def fit(model_args: ModelConfig, config: SAMIConfig, rows: Dataset, held_out: Dataset | None, target: Path) -> None:
    """Train on rows and leave the model at `target`, whole or not at all; resumes from the last checkpoint.

    Raises:
        ValueError: `target` exists.
    """
    if target.exists():
        raise ValueError(f"{target} exists already and is not overwritten: give another `output_dir`.")
    trainer = build_trainer(model_args, config, rows, held_out)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or last_checkpoint(config.output_dir))
    partial = target.with_name(target.name + ".partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
        trainer.state.save_to_json(str(Path(config.output_dir) / "trainer_state.json"))
    trainer.save_model(str(partial))
    trainer.create_model_card(model_name=target.parent.name)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        os.replace(Path(config.output_dir) / "README.md", partial / "README.md")
        os.replace(partial, target)
    if trainer.accelerator.num_processes > 1:
        trainer.end()


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that was written to its end; the trainer writes its state last."""
    if not os.path.isdir(folder):
        return None
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and left out", path)
        else:
            return str(path)
    return None


def free_memory() -> None:
    """Give models of a finished stage back before the next one loads its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
