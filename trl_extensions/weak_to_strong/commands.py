"""The parts of a run on their own, for people who bring the other parts themselves: label, train, evaluate."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.runs.jsonl import read_jsonl, write_jsonl
from ..core.runs.report import write_atomically
from ..core.runs.run import check_resume
from ..core.training.load import fit, last_checkpoint
from ..embedded import resolve_model_name
from .arguments import split_layers
from .data.examples import Pair, load_examples, load_pairs, split_halves
from .data.prepare import read_rows, source_settings, training_set
from .evaluation import CEILING, WEAK, Predictions, evaluate_run, scores
from .generation.run import GenerationRun, strong_settings
from .labels.learners import prediction_rows
from .labels.saved_model import load_saved, saved_class_names
from .run import WeakToStrongRun
from .trainers.classification import WeakToStrongTrainer
from .trainers.classifier import longest_input
from .trainers.reward import WeakToStrongRewardTrainer
from .trainers.sequence_logits import pair_probabilities, sequence_logits


STRONG = "w2s"


def label(run: WeakToStrongRun | GenerationRun) -> str:
    """Let weak models label: rows of `unlabelled`, or the half of the examples they were not trained on.

    Test examples, where given, are predicted too, into `weak_predictions.jsonl`, which `evaluate` takes.

    Returns:
        Where the labels are, for a person.
    """
    if isinstance(run, GenerationRun):
        run.check_inputs()
        run.claim()
        return f"answers to train on: {run.make_answers()}"
    if not run.args.examples or not run.args.weak_models:
        raise ValueError("`label` needs `examples` with true labels, and `weak_models`.")
    if run.args.unlabelled:
        labelled, target = run.examples(), _unlabelled(run)
    else:
        labelled, target = split_halves(run.examples(), share=run.args.weak_share, seed=run.config.seed)
    extra = {"test": run.test_examples()} if run.args.test_examples else {}
    run.claim()
    made = run.label_with(labelled, target, run.config.seed, run.folder / "labels", extra)
    for name in extra:
        write_jsonl(run.folder / "weak_predictions.jsonl", read_jsonl(made.with_name(f"{name}.jsonl")))
    write_jsonl(run.folder / "weak_labels.jsonl", read_jsonl(made))
    return f"rows with weak labels: {run.folder / 'weak_labels.jsonl'}"


def train(run: WeakToStrongRun | GenerationRun) -> Path:
    """Train the strong model on rows with weak labels; resumes from its last checkpoint.

    Returns:
        Where the model is.

    Raises:
        ValueError: Rows or settings that cannot be used, or others than those of the training to be resumed.
    """
    source, split, target = run.args.dataset_name, run.args.dataset_train_split, run.folder / "model"
    if isinstance(run, GenerationRun):
        rows = read_rows(source, split)
        _claim_training(run)
        run.train_on(rows, run.folder / "train", target)
        return target
    config, model_args = copy.copy(run.config), run.model_args
    config.output_dir = str(run.folder / "train")
    path, layers = split_layers(model_args.model_name_or_path)
    if layers is not None and model_args.use_peft:
        raise ValueError(
            f"{model_args.model_name_or_path} with `use_peft`: a saved adapter does not know that its base was cut; "
            "train without an adapter, or on the whole model."
        )
    dataset = training_set(source, split, is_pairs=run.is_pairs)
    _claim_training(run)
    # An adapter made for language modelling, which is TRL's default, would leave the head untrained
    model_args = replace(model_args, model_name_or_path=resolve_model_name(path), lora_task_type="SEQ_CLS")
    if layers is not None:
        config.model_init_kwargs = (config.model_init_kwargs or {}) | {"num_hidden_layers": layers}
    trainer_class = WeakToStrongRewardTrainer if run.is_pairs else WeakToStrongTrainer
    fit(trainer_class, model_args, config, dataset, None, target)
    return target


def _claim_training(run: WeakToStrongRun | GenerationRun) -> None:
    """Write what the model is trained with, or refuse to go on with other settings or rows."""
    if run.config.process_index:
        return
    settings = {"form": run.args.form} | strong_settings(run.config, run.model_args)
    settings |= source_settings(run.args.dataset_name, run.args.dataset_train_split)
    if isinstance(run, GenerationRun):
        settings["keep_truncated"] = run.generation_args.keep_truncated
    target = run.folder / "model"
    in_use = target.exists() or any(last_checkpoint(str(folder)) for folder in run.folder.glob("train*"))
    check_resume(run.folder / "training_settings.json", settings, made=str(target), started=in_use)


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
        evaluation = evaluate_run({run.config.seed: models}, groups=_groups(run))
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


def _groups(run: WeakToStrongRun) -> dict[str, str | None] | None:
    """Group of each test row, where rows have some."""
    if not run.args.group_column:
        return None
    if not run.args.test_examples:
        raise ValueError("`group_column` needs `test_examples`, which says what group each prediction belongs to.")
    return {row.id: row.group for row in run.test_examples()}


def _unlabelled(run: WeakToStrongRun):
    """Rows to label, whose true labels, if they have any, nobody looks at."""
    args, source = run.args, run.args.unlabelled
    options = {"split": args.examples_split, "group_column": args.group_column}
    if run.is_pairs:
        return [replace(pair, label=None) for pair in load_pairs(source, **options)]
    return load_examples(
        source,
        text_template=args.text_template,
        text_column=args.text_column,
        label_column=None,
        class_names=run.class_names,
        **options,
    )[0]


def _ask(run: WeakToStrongRun) -> list[dict]:
    """Prediction rows of a trained model."""
    import torch

    config, model_args = run.config, run.model_args
    if not model_args.model_name_or_path or not run.args.test_examples:
        raise ValueError("`evaluate` needs `model_name_or_path` and `test_examples`, or `predictions`.")
    name = resolve_model_name(model_args.model_name_or_path)
    if not run.is_pairs:
        _take_class_names(run, name)
    rows = run.test_examples()
    num_labels = 1 if run.is_pairs else len(run.class_names)
    model, tokenizer = load_saved(name, num_labels, model_args, config.trust_remote_code, config.device)
    max_length = longest_input(model, tokenizer, config.max_length)
    if isinstance(rows[0], Pair):
        probs = pair_probabilities(model, tokenizer, rows, max_length)
    else:
        texts = [row.text for row in rows]
        token_ids = tokenizer(texts, truncation=max_length is not None, max_length=max_length)["input_ids"]
        probs = torch.softmax(sequence_logits(model, token_ids).double(), dim=1).numpy()
    return prediction_rows(rows, np.asarray(probs))


def _take_class_names(run: WeakToStrongRun, name: str) -> None:
    """Read the test labels with the class names the model was trained with, where it knows them."""
    names = saved_class_names(name, run.model_args, run.config.trust_remote_code)
    if names is None:
        return
    if run.config.class_names not in (None, names):
        raise ValueError(
            f"{name} has the classes {names}, not {run.config.class_names}: leave `class_names` out, or give another "
            "model."
        )
    run.config.class_names = names


def _evaluate_answers(run: GenerationRun) -> str:
    run.check_inputs()
    for side in run.existing_sides():
        run.sample_held_out(side)
        run.score_held_out(side)
    return f"report: {run.evaluate()}"
