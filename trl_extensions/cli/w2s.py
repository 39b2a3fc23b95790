"""`trl-ext w2s label | train | evaluate | run`: arguments and YAML through TrlParser."""

from collections.abc import Sequence

from .dispatch import dispatch, peek
from .launch import launch_module, refuse_launcher, run_stage, split_launch_arguments


USAGE = """\
usage: trl-ext w2s {label,train,evaluate,run} [--config FILE] [--option VALUE ...]

  label     train weak models on examples with true labels and let them label others into output_dir/weak_labels.jsonl;
            with `form: generation`, let them answer prompts and keep the best answers in output_dir/answers
  train     train the strong model on weak labels (--dataset_name) into output_dir/model; takes --accelerate_config and
            accelerate's own options
  evaluate  ask a trained model about test examples; with the weak model's and the ceiling's predictions, the share of
            the gap that was recovered
  run       weak labels, a strong model per loss and seed, the ceiling, and a report; the same command resumes after a
            kill

`form: classification` (the default), `reward` or `generation` says what is labelled, in the YAML or as --form.
`trl-ext w2s COMMAND --form FORM --help` lists every option."""


def main(argv: Sequence[str]) -> int:
    """Run one of the weak-to-strong commands.

    Raises:
        ValueError: An argument or a key of the config file is unknown or wrong; one line with the remedy.
    """
    commands = {"label": _label, "train": _train, "evaluate": _evaluate, "run": _run, "stage": _stage}
    return dispatch(argv, USAGE, commands)


def _form(argv: list[str]) -> str:
    """What the arguments or the YAML they name say about `form`; it decides which options there are."""
    return next(iter(peek(argv, "form")), "classification")


def _parser(command: str, form: str):
    from trl import ModelConfig

    from trl_extensions.cli.parser import OneLineParser
    from trl_extensions.weak_to_strong.arguments import WeakToStrongArguments

    if form == "generation":
        from trl_extensions.core.generation import EngineArguments
        from trl_extensions.weak_to_strong.generation.arguments import GenerationArguments
        from trl_extensions.weak_to_strong.trainers.sft_config import WeakToStrongSFTConfig as Config

        own = (WeakToStrongArguments, GenerationArguments, EngineArguments)
    else:
        own = (WeakToStrongArguments,)
        if form == "reward":
            from trl_extensions.weak_to_strong.trainers.reward_config import WeakToStrongRewardConfig as Config
        else:
            from trl_extensions.weak_to_strong.trainers.configs import WeakToStrongConfig as Config
    return OneLineParser((*own, Config, ModelConfig), prog=f"trl-ext w2s {command}", allow_abbrev=False)


def _parse(command: str, argv: list[str]):
    """The run the arguments describe; unknown arguments and YAML keys are refused."""
    form = _form(argv)
    parsed = _parser(command, form).parse_args_and_config(argv)
    if form == "generation":
        from trl_extensions.embedded import resolve_model_name
        from trl_extensions.weak_to_strong.generation.run import GenerationRun

        if parsed[-1].model_name_or_path:
            parsed[-1].model_name_or_path = resolve_model_name(parsed[-1].model_name_or_path)
        return GenerationRun(*parsed)
    from trl_extensions.weak_to_strong.run import WeakToStrongRun

    return WeakToStrongRun(*parsed)


def _label(argv: list[str]) -> None:
    from trl_extensions.weak_to_strong.commands import label

    print(label(_parse("label", argv)))


def _train(argv: list[str]) -> None:
    from trl_extensions.weak_to_strong.commands import train

    launch, own = split_launch_arguments(_parser("train", _form(argv)), argv)
    if launch:
        launch_module(launch, ["w2s", "train", *own])
        return
    run = _parse("train", own)
    if not run.args.dataset_name or not run.model_args.model_name_or_path:
        raise ValueError("`train` needs `dataset_name` (rows with weak labels) and `model_name_or_path`.")
    print(f"model saved to {train(run)}")


def _evaluate(argv: list[str]) -> None:
    from trl_extensions.weak_to_strong.commands import evaluate

    print(evaluate(_parse("evaluate", argv)))


def _run(argv: list[str]) -> None:
    import torch

    from trl_extensions.core.runs.report import first_paragraph

    refuse_launcher()
    launch, own = split_launch_arguments(_parser("run", _form(argv)), argv)
    run = _parse("run", own)
    if launch and getattr(run.config, "linear_probe", False):
        raise ValueError("`linear_probe` trains a head on one device: call `run` without a launcher's options.")

    def in_own_process(name: str, of: str) -> None:
        run_stage(["w2s", "stage", name, of, *own], launch if name == "train" else [])

    # A process of its own gives a GPU's memory back whatever held it, and a launcher needs one anyway
    separate = bool(launch) or (torch.cuda.is_available() and not getattr(run.config, "linear_probe", False))
    path = run.execute(in_own_process if separate else None)
    print(f"\n{first_paragraph(path)}\n\nreport: {path}")


def _stage(argv: list[str]) -> None:
    name, of = argv[:2]
    _parse("run", argv[2:]).perform(name, of)
