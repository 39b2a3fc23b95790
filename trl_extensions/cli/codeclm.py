"""`trl-ext codeclm run | metadata | inspect | export`: arguments and YAML through TrlParser."""

from collections.abc import Sequence

from .dispatch import dispatch, peek
from .launch import refuse_launcher, run_stage, split_launch_arguments


USAGE = """\
usage: trl-ext codeclm {run,metadata,inspect,export} [--config FILE] [--option VALUE ...]

  run       make instruction-response pairs from seeds or metadata into output_dir/data.jsonl; with `train: true`
            fine-tune the target on them and compare it before and after; the same command resumes after a kill
  metadata  write metadata to edit: of seeds, or proposed for --description "what the instructions should be like"
  inspect   print what became of one instruction: trl-ext codeclm inspect OUTPUT_DIR [ID or row number of data.jsonl]
  export    filter and write the pairs of a run again, e.g. with another --max_rows, or as --format messages

`trl-ext codeclm COMMAND --help` lists every option; with `--train true` also those of the trainer and the model."""


def main(argv: Sequence[str]) -> int:
    """Run one of the CodecLM commands.

    Raises:
        ValueError: An argument or a key of the config file is unknown or wrong; one line with the remedy.
    """
    commands = {"run": _run, "metadata": _metadata, "inspect": _inspect, "export": _export, "stage": _stage}
    return dispatch(argv, USAGE, commands)


def _parser(command: str, argv: list[str]):
    """With the options of a trainer only where there is one: its defaults ask for a GPU."""
    from trl_extensions.cli.parser import OneLineParser
    from trl_extensions.codeclm.config import CodecLMArguments, CodecLMConfig, FolderArguments

    own: tuple[type, ...] = (FolderArguments,)
    if {"true", "yes", "t", "y", "1"} & {value.lower() for value in peek(argv, "train")}:
        from trl import ModelConfig, SFTConfig

        own = (SFTConfig, ModelConfig)
    return OneLineParser(
        (CodecLMArguments, CodecLMConfig, *own), prog=f"trl-ext codeclm {command}", allow_abbrev=False
    )


def _parse(command: str, argv: list[str]):
    """The run the arguments describe; unknown arguments and YAML keys are refused."""
    from trl_extensions.codeclm.run import CodecLMRun

    return CodecLMRun(*_parser(command, argv).parse_args_and_config(argv))


_UNFINISHED = 3  # exit code of a run that the same command goes on with


def _run(argv: list[str]) -> int:
    from trl_extensions.core.runs.report import first_paragraph

    refuse_launcher()
    launch, own = split_launch_arguments(_parser("run", argv), argv)
    run = _parse("run", own)

    def in_own_process(name: str, of: str) -> None:
        run_stage(["codeclm", "stage", name, *own], launch if name == "train" else [])

    path = run.execute(in_own_process if launch or run.needs_processes() else None)
    print(f"\n{first_paragraph(path)}\n\nreport: {path}")
    return 0 if run.is_complete() else _UNFINISHED


def _stage(argv: list[str]) -> None:
    _parse("run", argv[1:]).perform(argv[0], "")


def _metadata(argv: list[str]) -> None:
    print(_parse("metadata", argv).make_metadata())


def _export(argv: list[str]) -> None:
    print(_parse("export", argv).export().summary)


def _inspect(argv: list[str]) -> None:
    from trl_extensions.codeclm.lineage import describe

    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise ValueError("`inspect` takes the folder of a run and an id, or the number of a row of data.jsonl.")
    which = argv[1] if len(argv) == 2 else "1"
    print(describe(argv[0], int(which) if which.isdecimal() else which))
