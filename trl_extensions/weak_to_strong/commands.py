"""The parts of a run on their own, for people who bring the other parts themselves: label, train, evaluate."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from ..core.generation import is_adapter_directory
from ..core.jsonl import read_jsonl, write_jsonl
from ..core.models import tokenizer_source
from ..core.report import write_atomically
from ..core.training import fit
from ..embedded import resolve_model_name
from .arguments import split_layers
from .evaluation import CEILING, WEAK, Predictions, evaluate_run, scores
from .examples import Pair, load_examples, load_pairs
from .generation_run import GenerationRun
from .keep import to_sft_dataset
from .learners import prediction_rows
from .reward_trainer import WeakToStrongRewardTrainer
from .run import WeakToStrongRun
from .sequence_logits import pair_probabilities, sequence_logits
from .sft_trainer import WeakToStrongSFTTrainer
from .splits import split_halves
from .w2s_trainer import WeakToStrongTrainer


STRONG = "w2s"


def label(run: WeakToStrongRun | GenerationRun) -> str:
    """Let weak models label: rows of `unlabelled`, or the half of the examples they were not trained on.

    Returns:
        Where the labels are, for a person.
    """
    if isinstance(run, GenerationRun):
        run.check_inputs()
        run.claim()
        run.sample()
        run.score()
        return f"answers to train on: {run.folder / 'answers' / 'kept.jsonl'}"
    if not run.args.examples or not run.args.weak_models:
        raise ValueError("`label` needs `examples` with true labels, and `weak_models`.")
    if run.args.unlabelled:
        labelled, target = run.examples(), _unlabelled(run)
    else:
        labelled, target = split_halves(run.examples(), share=run.args.weak_share, seed=run.config.seed)
    made = run.label_with(labelled, target, run.config.seed, run.folder / "labels")
    shutil.copyfile(made, run.folder / "weak_labels.jsonl")
    return f"rows with weak labels: {run.folder / 'weak_labels.jsonl'}"


def train(run: WeakToStrongRun | GenerationRun) -> Path:
    """Train the strong model on rows with weak labels; resumes from its last checkpoint.

    Returns:
        Where the model is.
    """
    source, target = run.args.dataset_name, run.folder / "model"
    rows = (
        read_jsonl(source) if source.endswith(".jsonl") else load_dataset(source, split=run.args.dataset_train_split)
    )
    config, model_args = copy.copy(run.config), run.model_args
    config.output_dir = str(run.folder / "train")
    if isinstance(run, GenerationRun):
        fit(WeakToStrongSFTTrainer, model_args, config, to_sft_dataset(rows), None, target)
        return target
    path, layers = split_layers(model_args.model_name_or_path)
    # An adapter made for language modelling, which is TRL's default, would leave the head untrained
    model_args = replace(model_args, model_name_or_path=resolve_model_name(path), lora_task_type="SEQ_CLS")
    if layers is not None:
        config.model_init_kwargs = (config.model_init_kwargs or {}) | {"num_hidden_layers": layers}
    if isinstance(rows, list):
        rows = _training_columns(rows, source, run.is_pairs)
    fit(WeakToStrongRewardTrainer if run.is_pairs else WeakToStrongTrainer, model_args, config, rows, None, target)
    return target


def evaluate(run: WeakToStrongRun | GenerationRun) -> str:
    """Ask a trained model about test examples, and compare it with the weak one and the ceiling where those are given.

    Returns:
        What came out, for a person.
    """
    if isinstance(run, GenerationRun):
        return _evaluate_answers(run)
    if not run.args.predictions:
        run.args.predictions = str(run.folder / "predictions.jsonl")
        write_jsonl(run.args.predictions, _ask(run))
    models = {STRONG: run.args.predictions, WEAK: run.args.weak_predictions, CEILING: run.args.ceiling_predictions}
    models = {name: Predictions.load(path) for name, path in models.items() if path}
    if WEAK in models:
        evaluation = evaluate_run({run.config.seed: models})
    else:
        evaluation = {"scores": {STRONG: {name: {"value": value} for name, value in scores(models[STRONG]).items()}}}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    own = ", ".join(f"{name} {value['value']:.3f}" for name, value in evaluation["scores"][STRONG].items())
    return f"{run.folder / 'evaluation.json'}: {own}{_recovered(evaluation)}"


def _recovered(evaluation: dict) -> str:
    gap = evaluation.get("pgr", {}).get("accuracy", {}).get(STRONG)
    if gap is None:
        return ""
    if gap["value"] is None:
        return f"; performance gap recovered: undefined, {gap['reason']}"
    return f"; performance gap recovered {gap['value']:.2f} ({gap['low']:.2f} to {gap['high']:.2f})"


def _unlabelled(run: WeakToStrongRun):
    """Rows to label, whose true labels, if they have any, nobody looks at."""
    args, source = run.args, run.args.unlabelled
    if run.is_pairs:
        return [replace(pair, label=None) for pair in load_pairs(source, split=args.examples_split)]
    return load_examples(
        source,
        split=args.examples_split,
        text_template=args.text_template,
        text_column=args.text_column,
        label_column=None,
        class_names=run.class_names,
    )[0]


def _training_columns(rows: list[dict], source: str, is_pairs: bool) -> Dataset:
    """Rows that `label` wrote, or anybody with the trainers' columns."""
    names = ("chosen", "rejected", "prompt", "preference", "weight") if is_pairs else (
        "text", "prompt", "soft_labels", "label", "weight"
    )  # fmt: skip
    if not rows:
        raise ValueError(f"{source} has no rows.")
    columns = {name: [row.get(name) for row in rows] for name in names if rows[0].get(name) is not None}
    if is_pairs and "preference" not in columns and "soft_labels" in rows[0]:
        columns["preference"] = [row["soft_labels"][0] for row in rows]
    return Dataset.from_dict(columns)


def _ask(run: WeakToStrongRun) -> list[dict]:
    """Prediction rows of a trained model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = run.model_args.model_name_or_path
    if not name or not run.args.test_examples:
        raise ValueError("`evaluate` needs `model_name_or_path` and `test_examples`, or `predictions`.")
    rows = run.test_examples()
    num_labels = 1 if run.is_pairs else len(run.class_names)
    if is_adapter_directory(name):
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=num_labels)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(name))
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    model.to(run.config.device)
    if isinstance(rows[0], Pair):
        probs = pair_probabilities(model, tokenizer, rows, run.config.max_length)
    else:
        texts = [row.text for row in rows]
        token_ids = tokenizer(texts, truncation=True, max_length=run.config.max_length)["input_ids"]
        probs = torch.softmax(sequence_logits(model, token_ids).double(), dim=1).numpy()
    return prediction_rows(rows, np.asarray(probs))


def _evaluate_answers(run: GenerationRun) -> str:
    run.check_inputs()
    for side in run.existing_sides():
        run.sample_held_out(side)
        run.score_held_out(side)
    return f"report: {run.evaluate()}"
