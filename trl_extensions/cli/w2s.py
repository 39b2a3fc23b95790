"""`trl-ext w2s label | train | evaluate | run`."""

import json
from collections.abc import Sequence
from typing import Any

from trl_extensions.embedded import resolve_model_name

from .method import Method, Result, saved
from .parser import peek


USAGE = """\
usage: trl-ext w2s {label,train,evaluate,run} [--config FILE] [--option VALUE ...]

  label     train weak models on examples with true labels and let them label others into output_dir/weak_labels.jsonl;
            with `task: generation`, let them answer prompts and keep the best answers in output_dir/answers
  train     train the strong model on weak labels (--dataset_name) into output_dir/model; takes --accelerate_config and
            accelerate's own options
  evaluate  ask a trained model about test examples; with the weak model's and the ceiling's predictions, the share of
            the gap that was recovered
  run       weak labels, a strong model per loss and seed, the ceiling, and a report; the same command resumes after a
            kill

`task: classification` (the default), `reward` or `generation` says what is labelled, in the YAML or as --task.
`trl-ext w2s COMMAND --task TASK --help` lists every option."""


def _options(argv: list[str]) -> Sequence[type]:
    """The task, by the arguments or the YAML they name, decides which options there are."""
    from trl import ModelConfig

    from trl_extensions.weak_to_strong.arguments import WeakToStrongArguments

    task = next(iter(peek(argv, "task", "form")), "classification")
    if task == "generation":
        from trl_extensions import WeakToStrongSFTConfig
        from trl_extensions.core.generation import EngineArguments
        from trl_extensions.weak_to_strong.arguments import GenerationArguments

        return WeakToStrongArguments, GenerationArguments, EngineArguments, WeakToStrongSFTConfig, ModelConfig
    from trl_extensions import WeakToStrongConfig, WeakToStrongRewardConfig

    return WeakToStrongArguments, WeakToStrongRewardConfig if task == "reward" else WeakToStrongConfig, ModelConfig


def _make(*parsed: Any) -> Any:
    if parsed[0].task == "generation":
        from trl_extensions.weak_to_strong.generation.run import GenerationRun

        if parsed[-1].model_name_or_path:
            parsed[-1].model_name_or_path = resolve_model_name(parsed[-1].model_name_or_path)
        return GenerationRun(*parsed)
    from trl_extensions.weak_to_strong.run import WeakToStrongRun

    return WeakToStrongRun(*parsed)


def _parts(run: Any) -> Any:
    """The module with the functions `label`, `train` and `evaluate` of a run."""
    from trl_extensions.weak_to_strong import run as labels
    from trl_extensions.weak_to_strong.generation import run as answers

    return answers if run.args.task == "generation" else labels


def _train(run: Any) -> Result:
    if not run.args.dataset_name or not run.model_args.model_name_or_path:
        raise ValueError("`train` needs `dataset_name` (rows with weak labels) and `model_name_or_path`.")
    return saved(run, _parts(run).train(run), generates=run.args.task == "generation")


def _evaluate(run: Any) -> Result:
    text = _parts(run).evaluate(run)
    return Result(text, json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8")))


def _check_launch(run: Any) -> None:
    if getattr(run.config, "linear_probe", False):
        raise ValueError("`linear_probe` trains a head on one device: call `run` without a launcher's options.")


METHOD = Method(
    "w2s",
    USAGE,
    _options,
    _make,
    {
        "label": lambda run: Result(_parts(run).label(run)),
        "train": _train,
        "evaluate": _evaluate,
    },
    check_launch=_check_launch,
    trains=lambda command, argv: command != "evaluate",
)
main = METHOD.main
