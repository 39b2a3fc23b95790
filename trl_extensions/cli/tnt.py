"""`trl-ext tnt sample | candidates | annotate | train | evaluate | run`: arguments and YAML through TrlParser."""

from collections.abc import Sequence

from .dispatch import dispatch
from .launch import launch_module, refuse_launcher, run_stage, split_launch_arguments


USAGE = """\
usage: trl-ext tnt {sample,candidates,annotate,train,evaluate,run} [--config FILE] [--option VALUE ...]

  sample      sample the model's own outputs to the training prompts into output_dir/outputs.jsonl
  candidates  from logs with flags or complaints (--logs) to output_dir/candidates.yaml, for a person to edit
  annotate    mark what is unwanted in outputs (--dataset_name outputs.jsonl, or --logs with --candidates) into
              output_dir/annotated.jsonl
  train       train on annotated outputs (--dataset_name); takes --accelerate_config and accelerate's own options
  evaluate    compare a patched model with its original on held-out prompts: what went, and what stayed
  run         sample, annotate, train, evaluate, and a report; the same command resumes after a kill

`trl-ext tnt COMMAND --help` lists every option. A recipe YAML serves all of them."""


def main(argv: Sequence[str]) -> int:
    """Run one of the TNT commands.

    Raises:
        ValueError: An argument or a key of the config file is unknown or wrong; one line with the remedy.
    """
    commands = {
        "sample": _sample, "candidates": _candidates, "annotate": _annotate, "train": _train, "evaluate": _evaluate,
        "run": _run, "stage": _stage,
    }  # fmt: skip
    return dispatch(argv, USAGE, commands)


def _parser(command: str):
    from trl import ModelConfig

    from trl_extensions.cli.parser import OneLineParser
    from trl_extensions.core.generation import EngineArguments
    from trl_extensions.tnt.config import AnnotatorArguments, TNTArguments, TNTConfig

    return OneLineParser(
        (TNTArguments, AnnotatorArguments, EngineArguments, TNTConfig, ModelConfig),
        prog=f"trl-ext tnt {command}",
        allow_abbrev=False,
    )


def _parse(command: str, argv: list[str]):
    """The run the arguments describe; unknown arguments and YAML keys are refused."""
    from trl_extensions.embedded import resolve_model_name
    from trl_extensions.tnt.run import TNTRun

    run = TNTRun(*_parser(command).parse_args_and_config(argv))
    for owner, name in ((run.model_args, "model_name_or_path"), (run.args, "original_model")):
        if getattr(owner, name):
            setattr(owner, name, resolve_model_name(getattr(owner, name)))
    return run


def _sample(argv: list[str]) -> None:
    run = _parse("sample", argv)
    if not run.args.prompts or not run.original:
        raise ValueError("`sample` needs `prompts` and `model_name_or_path`.")
    report = run.sample_to(run.original, run.prompts()[0], run.folder / "outputs.jsonl", run.args.num_samples, True)
    print(report.summary)


def _candidates(argv: list[str]) -> None:
    from trl_extensions.tnt.logs import find_candidates, read_logs, write_candidates

    run = _parse("candidates", argv)
    if not run.args.logs:
        raise ValueError("`candidates` needs `logs`, a JSONL of deployed outputs with flags or complaints.")
    candidates, path = find_candidates(read_logs(run.args.logs)), run.folder / "candidates.yaml"
    write_candidates(path, candidates)
    print(f"{path}: {len(candidates)} candidates; edit it, then `trl-ext tnt annotate --logs ... --candidates {path}`")


def _annotate(argv: list[str]) -> None:
    from trl_extensions.core.runs.jsonl import read_jsonl
    from trl_extensions.tnt.annotate import annotate_rows

    run = _parse("annotate", argv)
    output = run.folder / "annotated.jsonl"
    if run.args.logs:
        _annotate_logs(run, output)
        return
    if not run.args.dataset_name:
        raise ValueError("`annotate` needs `dataset_name` (outputs to mark), or `logs` and `candidates`.")
    print(annotate_rows(read_jsonl(run.args.dataset_name), run.annotators(), output).summary)


def _annotate_logs(run, output) -> None:
    from trl_extensions.tnt.annotate import annotate_rows
    from trl_extensions.tnt.logs import load_candidates, read_logs, rows_from_logs

    if not run.annotator_args.candidates:
        raise ValueError("`logs` needs `candidates`: write the file with `trl-ext tnt candidates` and edit it.")
    candidates = load_candidates(run.annotator_args.candidates)
    rows, report = rows_from_logs(read_logs(run.args.logs), candidates)
    print(report.summary)
    # The candidates are marked already; further annotators mark what they find
    print(annotate_rows(rows, run.annotator_args.build(with_candidates=False), output).summary)


def _train(argv: list[str]) -> None:
    launch, own = split_launch_arguments(_parser("train"), argv)
    if launch:
        launch_module(launch, ["tnt", "train", *own])
        return
    run = _parse("train", own)
    if not run.args.dataset_name or not run.original:
        raise ValueError("`train` needs `dataset_name` (annotated outputs) and `model_name_or_path`.")
    run.claim_training()
    run.train()
    print(f"model saved to {run.patched}")


def _evaluate(argv: list[str]) -> None:
    from trl_extensions.tnt.report import verdict

    run = _parse("evaluate", argv)
    run.check()
    print(f"{run.folder / 'evaluation.json'}: {verdict(run.evaluate_alone())}")


def _run(argv: list[str]) -> None:
    import torch

    from trl_extensions.core.runs.report import first_paragraph

    refuse_launcher()
    launch, own = split_launch_arguments(_parser("run"), argv)
    run = _parse("run", own)

    def in_own_process(name: str, side: str) -> None:
        run_stage(["tnt", "stage", name, side, *own], launch if name == "train" else [])

    # A process of its own gives a GPU's memory back whatever held it, and a launcher needs one anyway
    separate = bool(launch) or run.engine_args.engine == "vllm" or torch.cuda.is_available()
    path = run.execute(in_own_process if separate else None)
    print(f"\n{first_paragraph(path)}\n\nreport: {path}")


def _stage(argv: list[str]) -> None:
    name, side = argv[:2]
    _parse("run", argv[2:]).perform(name, side)
