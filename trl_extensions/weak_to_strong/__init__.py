"""Weak-to-strong: `label` rows by weak models, and train `WeakToStrongTrainer` and its kind on the labels."""

from typing import Any


def label(
    train: Any, unlabelled: Any, weak_models: list[str], *, task: str = "classification", config: Any = None,
    **arguments: Any,
) -> Any:  # fmt: skip
    """Weak labels, a `Dataset`: `weak_models` learn the true labels of `train` and label the rows of `unlabelled`.

    Args:
        train, unlabelled: A file, data set or rows each, see `data.examples.load_examples`, or pairs of `chosen` and
            `rejected` with `task="reward"`. Labels of `unlabelled` are not looked at.
        weak_models: Ids or paths, `NAME[:4]` for the first 4 layers, `sklearn:tfidf-logreg` and the like.
        config: `WeakToStrongConfig` or `WeakToStrongRewardConfig` that weak models are trained with.
        arguments: Of `WeakToStrongArguments`, such as `label_column`, `text_column`, `ensemble`, `calibrate`.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from datasets import ClassLabel
    from trl import ModelConfig

    from .arguments import WeakToStrongArguments
    from .data.prepare import training_set
    from .run import WeakToStrongRun
    from .trainers.configs import WeakToStrongConfig, WeakToStrongRewardConfig

    arguments |= {"task": task, "examples": train, "unlabelled": unlabelled, "weak_models": list(weak_models)}
    with TemporaryDirectory() as folder:
        config = config or (WeakToStrongRewardConfig if task == "reward" else WeakToStrongConfig)(folder)
        run, path = WeakToStrongRun(WeakToStrongArguments(**arguments), config, ModelConfig()), Path(folder)
        labels = path / "weak_labels.jsonl"
        run.make_labels(run.examples(), run.unlabelled_rows(), config.seed, path / "labels", {}, labels)
        rows = training_set(str(labels), "train", is_pairs=run.is_pairs)
    if run.is_pairs:
        return rows
    return rows.add_column("label", [None] * len(rows), feature=ClassLabel(names=run.class_names))
