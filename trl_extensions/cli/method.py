"""What the commands of all methods share: options and YAML, `train` under a launcher, `run` and its stages."""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from trl_extensions.core.extras import check_run_extra
from trl_extensions.core.options import message, old_names


@dataclass(frozen=True)
class Method:
    """The commands of one method.

    `options` tells from a command's arguments the dataclasses of its options, `make` makes a run of their instances.
    `commands` are functions of the run; accelerate may launch the one called `train`. Added are `run`, and `stage` for
    the stages it starts. `plain` ones get bare arguments. `check_launch` refuses a run that cannot be distributed.
    """

    name: str
    usage: str
    options: Callable[[list[str]], Sequence[type]]
    make: Callable[..., Any]
    commands: dict[str, Callable[[Any], int | None]]
    plain: dict[str, Callable[[list[str]], int | None]] = field(default_factory=dict)
    check_launch: Callable[[Any], None] = lambda run: None

    def main(self, argv: Sequence[str]) -> int:
        """Carry out a command; returns the exit code. What is unknown or wrong raises a `ValueError` of one line."""
        if not argv or argv[0] in ("-h", "--help"):
            print(self.usage)
            return 0 if argv else 2
        # Deprecations between the libraries below are nothing a user of these commands can act on, our own are
        warnings.filterwarnings("ignore", "(?!.*is now called)", FutureWarning)
        command, own = argv[0], list(argv[1:])
        named = {name: partial(self._perform, name) for name in self.commands}
        known = named | self.plain | {"run": self._run, "stage": self._stage}
        if command not in known:
            offered = ", ".join(name for name in known if name != "stage")
            raise ValueError(f"unknown command {command!r}; choose from {offered}")
        if command in ("run", "evaluate") and not {"-h", "--help"} & set(own):
            check_run_extra()  # before hours of work, not behind them
        return known[command](own) or 0

    def parser(self, command: str, argv: list[str]) -> Any:
        return option_parser(f"{self.name} {command}", self.options(argv), quiet=command == "stage")

    def parse(self, command: str, argv: list[str]) -> Any:
        """The run that arguments describe; unknown arguments and YAML keys are refused."""
        return self.make(*self.parser(command, argv).parse_args_and_config(argv))

    def _perform(self, command: str, argv: list[str]) -> int | None:
        if command == "train":
            launch, argv = split_launch_arguments(self.parser(command, argv), argv)
            if launch:
                launch_module(launch, [self.name, command, *argv])
                return 0
        return self.commands[command](self.parse(command, argv))

    def _run(self, argv: list[str]) -> int:
        """All stages; each in a process of its own where that gives a GPU's memory back, or a launcher needs one."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("`run` launches its training itself: call it bare and pass --accelerate_config.")
        launch, own = split_launch_arguments(self.parser("run", argv), argv)
        run = self.parse("run", own)
        if launch:
            self.check_launch(run)

        def in_own_process(name: str, of: Any) -> None:
            stage = [self.name, "stage", name, str(of), *own]
            if launch and name in ("train", "absorb"):
                launch_module(launch, stage)
            elif code := subprocess.call([sys.executable, "-m", "trl_extensions", *stage]):
                raise RuntimeError(f"stage `{name} {of}` ended with exit code {code}; the same command resumes there.")

        path = run.execute(in_own_process if launch or run.needs_processes() else None)
        print(f"\n{run.summary(path)}\n\nreport: {path}")
        return 0 if run.is_complete() else UNFINISHED

    def _stage(self, argv: list[str]) -> None:
        name, of, *own = argv
        run = self.parse("stage", own)
        known = {(stage.name, str(stage.of)): stage.of for stage in run.stages()}
        run.perform(name, known.get((name, of), of))


UNFINISHED = 3
"""Exit code of a run that the same command goes on with."""


def option_parser(command: str, dataclasses: Sequence[Any], quiet: bool = False) -> Any:
    """TRL's parser of options and YAML that knows renamed ones too (`quiet`: without a word), with one-line errors."""
    import yaml
    from trl import TrlParser

    renamed = {old: new for cls in dataclasses for old, new in old_names(cls).items()}
    told = set(renamed) if quiet else set()

    def translate(name: str) -> str:
        old = name.replace("-", "_")  # dashes do too, as in the parser
        if old in renamed and old not in told:
            told.add(old)
            print(f"trl-ext: {message(old, renamed[old])}", file=sys.stderr)
        return renamed.get(old, name)

    class OptionParser(TrlParser):
        def parse_args_and_config(self, args=None, *rest, **options):
            pairs = [item.partition("=") for item in args or ()]
            args = [f"--{translate(i[2:])}{s}{v}" if i.startswith("--") else i + s + v for i, s, v in pairs]
            try:
                return super().parse_args_and_config(args, *rest, **options)
            except yaml.YAMLError as error:  # which names file and line
                raise ValueError(f"--config is not YAML ({' '.join(str(error).split())}); correct it") from None

        def set_defaults_with_config(self, **values):
            return super().set_defaults_with_config(**{translate(name): value for name, value in values.items()})

        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message} (`{self.prog} --help` lists what it takes)")

    return OptionParser(tuple(dataclasses), prog=f"trl-ext {command}", allow_abbrev=False)


def peek(argv: Sequence[str], *names: str) -> list[str]:
    """What the command line, and then its YAML, say about a setting that decides what other settings there are."""
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*(f"--{name}" for name in names), dest="value", nargs="?", const="true")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(argv)
    values = [given.value]
    if given.config:
        with open(given.config, encoding="utf-8") as file:
            try:
                settings = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{given.config} is not YAML ({' '.join(str(error).split())}); correct it") from None
        values += [settings.get(name) for name in names] if isinstance(settings, dict) else []
    return [str(value) for value in values if value is not None]


def split_launch_arguments(parser: Any, argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for `accelerate launch`, which are those the parser does not know, and the others."""
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
