"""`trl-ext codeclm run | metadata | inspect | export`."""

from collections.abc import Sequence
from typing import Any

from .method import Method, Result, summary_of
from .parser import peek


USAGE = """\
usage: trl-ext codeclm {run,metadata,inspect,export} [--config FILE] [--option VALUE ...]

  run       make instruction-response pairs from seeds or metadata into output_dir/data.jsonl; with `train: true`
            fine-tune the target on them and compare it before and after; the same command resumes after a kill
  metadata  write metadata to edit: of seeds, or proposed for --description "what the instructions should be like"
  inspect   print what became of one instruction: trl-ext codeclm inspect OUTPUT_DIR [ID or row number of data.jsonl]
  export    filter and write the pairs of a run again, e.g. with another --max_rows, or as --format messages

`trl-ext codeclm COMMAND --help` lists the options. A recipe YAML serves all of them."""


def _options(argv: list[str]) -> Sequence[type]:
    from trl import ModelConfig

    from trl_extensions.codeclm.config import CodecLMArguments, CodecLMConfig
    from trl_extensions.codeclm.training import CodecLMTrainingConfig

    return CodecLMArguments, CodecLMConfig, CodecLMTrainingConfig, ModelConfig


def _trains(command: str, argv: list[str]) -> bool:
    wanted = peek(argv, "train")[:1] or ["false"]
    return command in ("run", "stage") and wanted[0].lower() in ("true", "yes", "t", "y", "1")


def _make(*parsed: Any) -> Any:
    from trl_extensions.codeclm.run import CodecLMRun

    return CodecLMRun(*parsed)


def _inspect(argv: list[str]) -> Result:
    from trl_extensions.codeclm.export import describe

    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise ValueError("`inspect` takes the folder of a run and an id, or the number of a row of data.jsonl.")
    which = argv[1] if len(argv) == 2 else "1"
    return Result(describe(argv[0], int(which) if which.isdecimal() else which))


METHOD = Method(
    "codeclm",
    USAGE,
    _options,
    _make,
    {"metadata": lambda run: Result(run.make_metadata()), "export": lambda run: summary_of(run.export())},
    plain={"inspect": _inspect},
    trains=_trains,
)
main = METHOD.main
