"""`trl-ext sami sample | train | evaluate | run`: arguments and YAML through TrlParser, one YAML for all four."""

from collections.abc import Sequence

from .dispatch import dispatch
from .launch import launch_module, refuse_launcher, run_stage, split_launch_arguments


USAGE = """\
usage: trl-ext sami {sample,train,evaluate,run} [--config FILE] [--option VALUE ...]

  sample    sample responses to the training queries into output_dir/samples.jsonl
  train     train on sampled rows (--dataset_name rows.jsonl); takes --accelerate_config and accelerate's own options
  evaluate  mutual information, KL and lengths of a model on held-out queries
  run       rounds of sample, train and evaluate, and a report; the same command resumes after a kill

`trl-ext sami COMMAND --help` lists every option. A recipe YAML serves all four commands."""


def main(argv: Sequence[str]) -> int:
    """Run one of the SAMI commands.

    Raises:
        ValueError: An argument or a key of the config file is unknown or wrong; one line with the remedy.
    """
    commands = {"sample": _sample, "train": _train, "evaluate": _evaluate, "run": _run, "stage": _stage}
    return dispatch(argv, USAGE, commands)


def _parser(command: str):
    from trl import ModelConfig

    from trl_extensions.cli.parser import OneLineParser
    from trl_extensions.core.generation import EngineArguments
    from trl_extensions.sami.config import SAMIArguments, SAMIConfig

    return OneLineParser(
        (SAMIArguments, EngineArguments, SAMIConfig, ModelConfig), prog=f"trl-ext sami {command}", allow_abbrev=False
    )


def _parse(command: str, argv: list[str]):
    """The run the arguments describe; unknown arguments and YAML keys are refused."""
    from trl_extensions.embedded import resolve_model_name
    from trl_extensions.sami.run import SAMIRun

    run = SAMIRun(*_parser(command).parse_args_and_config(argv))
    model = run.model_args.model_name_or_path
    if model:
        run.model_args.model_name_or_path = resolve_model_name(model)
    return run


def _sample(argv: list[str]) -> None:
    print(_parse("sample", argv).sample().summary)


def _train(argv: list[str]) -> int:
    launch, own = split_launch_arguments(_parser("train"), argv)
    if launch:
        launch_module(launch, ["sami", "train", *own])
        return 0
    run = _parse("train", own)
    run.train()
    print(f"model saved to {run.folder / 'model'}")
    return 0


def _evaluate(argv: list[str]) -> None:
    run = _parse("evaluate", argv)
    result = run.evaluate()
    bound = result["mi_bound"]
    kl = f"{result['kl']['mean']:.3f} nats per token" if "kl" in result else "not measured (set `original_model`)"
    print(
        f"{run.folder / 'evaluation.json'}: MI bound {bound['mean']:.3f} ± {bound['se']:.3f} nats of "
        f"{result['max_bound']:.2f} on {result['num_queries']} queries, KL to the original {kl}, "
        f"{result['length']:.0f} tokens per response"
    )
    if "win_rate" in result:
        judged = result["win_rate"]
        print(
            f"{run.folder / 'win_rate.json'}: {judged['wins']} wins, {judged['ties']} ties, {judged['losses']} losses "
            f"against {run.args.judge_against}, {judged['unread']} unread"
        )
    elif run.args.judge:
        print("not judged: set `judge_against` to the eval_samples.jsonl of another model")


def _run(argv: list[str]) -> None:
    import torch

    from trl_extensions.sami.report import summary_of

    refuse_launcher()
    launch, own = split_launch_arguments(_parser("run"), argv)
    run = _parse("run", own)

    def in_own_process(name: str, round_: int) -> None:
        run_stage(["sami", "stage", name, str(round_), *own], launch if name == "train" else [])

    # A process of its own gives a GPU's memory back whatever held it, and a launcher needs one anyway
    separate = bool(launch) or run.engine_args.engine == "vllm" or torch.cuda.is_available()
    path = run.execute(in_own_process if separate else None)
    print(f"\n{summary_of(path)}\n\nreport: {path}")


def _stage(argv: list[str]) -> None:
    name, round_ = argv[0], int(argv[1])
    _parse("run", argv[2:]).perform(name, round_)
