"""Weak-to-strong: `label` rows by weak models, and train `WeakToStrongTrainer` and its kind on the labels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

    from ..core.inputs import Source


def label(
    train: "Source", unlabelled: "Source", weak_models: Sequence[str], *, task: str = "classification",
    config: Any = None, **arguments: Any,
) -> "Dataset":  # fmt: skip
    """Weak labels: `weak_models` learn the true labels of `train` and label the rows of `unlabelled`.

    Args:
        train, unlabelled: A file, data set or rows each, see `data.examples.load_examples`; with `task="reward"` pairs
            of `chosen` and `rejected`. Labels of `unlabelled` are not looked at.
        weak_models: Ids or paths, `NAME[:4]` for the first 4 layers, `sklearn:tfidf-logreg` and the like.
        config: `WeakToStrongConfig` or `WeakToStrongRewardConfig` that weak models are trained with.
        arguments: Of `WeakToStrongArguments`, such as `label_column`, `text_column`, `ensemble`, `calibrate`.

    Returns:
        `text` and `soft_labels`, with the classes' names, or `chosen`, `rejected` and `preference`.
    """
    from tempfile import TemporaryDirectory

    from datasets import ClassLabel
    from trl import ModelConfig

    from .arguments import WeakToStrongArguments
    from .data.prepare import training_set
    from .run import WeakToStrongRun
    from .trainers.configs import WeakToStrongConfig, WeakToStrongRewardConfig

    own: Any = {"task": task, "examples": train, "unlabelled": unlabelled, "weak_models": list(weak_models)}
    with TemporaryDirectory() as folder:
        config = config or (WeakToStrongRewardConfig if task == "reward" else WeakToStrongConfig)(folder)
        run = WeakToStrongRun(WeakToStrongArguments(**own, **arguments), config, ModelConfig())
        path = run.folder / "weak_labels.jsonl"
        run.make_labels(run.examples(), run.unlabelled_rows(), config.seed, run.folder / "labels", {}, path)
        rows = training_set(str(path), "train", is_pairs=run.is_pairs)
    if run.is_pairs:
        return rows
    return rows.add_column("label", [None] * len(rows), feature=ClassLabel(names=run.class_names))
