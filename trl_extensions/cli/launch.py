"""Arguments of `accelerate launch` on our own command line, and stages of a run in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence


def split_launch_arguments(parser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for `accelerate launch` (with `--accelerate_config` resolved as `trl` does) and the others.

    Args:
        parser: The command's `TrlParser`; what it does not know is the launcher's.
        argv: The command's arguments.
    """
    if not {"--accelerate_config", "--num_processes"} & {item.partition("=")[0] for item in argv}:
        return [], argv
    from trl_extensions._compat import resolve_accelerate_config_argument

    *_, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True, separate_remaining_strings=True)
    remaining = iter(unknown)
    current, own = next(remaining, None), []
    for item in argv:  # what the parser left over is an ordered part of what it was given
        if item == current:
            current = next(remaining, None)
        else:
            own.append(item)
    return resolve_accelerate_config_argument(unknown), own


def launch_module(launch: Sequence[str], arguments: Sequence[str]) -> None:
    """Run a `trl-ext` command under `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args([*launch, "--module", "trl_extensions", *arguments]))


def run_stage(arguments: Sequence[str], launch: Sequence[str] = ()) -> None:
    """Carry out one stage of a run in its own process, under a launcher if `launch` has arguments for one.

    Raises:
        RuntimeError: The stage ended with an error, which it has printed itself.
    """
    if launch:
        launch_module(launch, arguments)
        return
    code = subprocess.call([sys.executable, "-m", "trl_extensions", *arguments])
    if code:
        raise RuntimeError(f"`{' '.join(arguments[:4])}` ended with exit code {code}; the same command resumes there.")


def refuse_launcher() -> None:
    """Raise `ValueError` inside a process that a launcher started, for a command that starts one itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "`run` starts the distributed part itself: call it without a launcher and pass --accelerate_config."
        )
