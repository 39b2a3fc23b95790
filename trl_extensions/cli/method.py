"""What the commands of all methods share: what they print, `train` under a launcher, `run` and its stages."""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl_extensions.core.extras import check_run_extra
from trl_extensions.core.options import did_you_mean

from .parser import help_text, option_parser, wants_help


OUTPUT_OPTIONS = ("--json", "--quiet")


@dataclass
class Result:
    """What came out of a command: for a person, as JSON for `--json`, and the exit code."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    code: int = 0


def tell(argv: Sequence[str], command: Callable[[], Result | None]) -> int:
    """Carry out a command and print its result, as JSON with `--json`, and nothing else with `--quiet`."""
    as_json, quiet = "--json" in argv, "--quiet" in argv
    with _honest_bars(quiet), _only_the_result(quiet) if as_json or quiet else contextlib.nullcontext():
        result = command() or Result("")
    if as_json:
        print(json.dumps(result.data or {"text": result.text}, default=str, ensure_ascii=False))
    elif result.text:
        print(result.text)
    return result.code


def summary_of(report: Any) -> Result:
    """Of a dataclass with a `summary`."""
    return Result(report.summary, asdict(report))


def saved(run: Any, path: Any, generates: bool = True) -> Result:
    """Of training: where the model is, and what to do with it."""
    from trl_extensions.core.runs.publish import finish

    if run.config.process_index:
        return Result("")
    return Result(f"model saved to {path}\n{finish(run, Path(path), {}, run.pushes, generates)}", {"model": path})


@dataclass(frozen=True)
class Method:
    """The commands of one method.

    `options` tells from a command's arguments the dataclasses of its options, `make` makes a run of their instances.
    `commands` are functions of the run; accelerate may launch the one called `train`. Added are `run`, and `stage` for
    the stages it starts. `plain` ones get bare arguments. `check_launch` refuses a run that cannot be distributed, and
    `trains` says whether a command, given its arguments, has a use for the settings of a trainer.
    """

    name: str
    usage: str
    options: Callable[[list[str]], Sequence[type]]
    make: Callable[..., Any]
    commands: dict[str, Callable[[Any], Result]]
    plain: dict[str, Callable[[list[str]], Result]] = field(default_factory=dict)
    check_launch: Callable[[Any], None] = lambda run: None
    trains: Callable[[str, list[str]], bool] = lambda command, argv: True

    def main(self, argv: Sequence[str]) -> int:
        """Carry out a command; returns the exit code. What is unknown or wrong raises a `ValueError` of one line."""
        if not argv or argv[0] in ("-h", "--help"):
            print(self.usage)
            return 0 if argv else 2
        # Deprecations between the libraries below are nothing a user of these commands can act on, our own are
        warnings.filterwarnings("ignore", "(?!.*is now called)", FutureWarning)
        command, own = argv[0], [item for item in argv[1:] if item not in OUTPUT_OPTIONS]
        named = {name: partial(self._perform, name) for name in self.commands}
        known = named | self.plain | {"run": self._run, "stage": self._stage}
        if command not in known:
            offered = [name for name in known if name != "stage"]
            hint = did_you_mean(command, offered) or f"; choose from {', '.join(offered)}"
            raise ValueError(f"unknown command {command!r}{hint}")
        if wants_help(own) and command not in self.plain:
            print(help_text(f"{self.name} {command}", self.options, own))
            return 0
        if command in ("run", "evaluate"):
            check_run_extra()  # before hours of work, not behind them
        return tell(argv, lambda: known[command](own))

    def parser(self, command: str, argv: list[str]) -> Any:
        quiet, trains = command == "stage", self.trains(command, argv)
        name, options = f"{self.name} {command}", self.options(argv)
        return option_parser(name, options, quiet, trains=trains, output_dir=self.name)

    def parse(self, command: str, argv: list[str]) -> Any:
        """The run that arguments describe; unknown arguments and YAML keys are refused."""
        run = self.make(*self.parser(command, argv).parse_args_and_config(argv))
        trainer: Any = getattr(run, "output", getattr(run, "config", None))
        if getattr(trainer, "push_to_hub", False):  # once, when all is done, not a `train` folder by every trainer
            run.pushes, trainer.push_to_hub = True, False
        return run

    def _perform(self, command: str, argv: list[str]) -> Result | None:
        if command == "train":
            launch, argv = split_launch_arguments(self.parser(command, argv), argv)
            if launch:
                processes_of(launch)
                launch_module(launch, [self.name, command, *argv])
                return None
        return self.commands[command](self.parse(command, argv))

    def _run(self, argv: list[str]) -> Result:
        """All stages; each in a process of its own where that gives a GPU's memory back, or a launcher needs one. With
        `--dry_run` what can be checked beforehand, and what the stages would take."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("`run` launches its training itself: call it bare and pass --accelerate_config.")
        dry_run, argv = "--dry_run" in argv, [item for item in argv if item != "--dry_run"]
        launch, own = split_launch_arguments(self.parser("run", argv), argv)
        run = self.parse("run", own)
        if launch:
            self.check_launch(run)
            run.processes = processes_of(launch)
        run.check()
        if dry_run or not all(stage.done.exists() for stage in run.stages()):
            from trl_extensions.core.training.preflight import rehearse

            weightless = rehearse(run)
        if dry_run:
            from trl_extensions.core.runs.plan import estimate

            return Result(*estimate(list(run.works()), weightless, getattr(run, "output", run.config)))

        def in_own_process(name: str, of: Any) -> None:
            stage = [self.name, "stage", name, str(of), *own]
            if launch and name in ("train", "absorb"):
                launch_module(launch, stage)
            elif code := subprocess.call([sys.executable, "-m", "trl_extensions", *stage]):
                raise RuntimeError(f"stage `{name} {of}` ended with exit code {code}; the same command resumes there.")

        path = run.execute(in_own_process if launch or run.needs_processes() else None)
        data = {"report": str(path), "complete": run.is_complete()}
        data |= json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        text = f"\n{run.summary(path)}\n\nreport: {path}"
        if trained := [stage.done for stage in run.stages() if stage.done.name == "model" and stage.done.exists()]:
            from trl_extensions.core.runs.publish import finish

            data["model"] = trained[-1]
            text += f"\nmodel:  {trained[-1]}\n{finish(run, trained[-1], data, run.pushes)}"
        return Result(text, data, 0 if run.is_complete() else UNFINISHED)

    def _stage(self, argv: list[str]) -> None:
        name, of, *own = argv
        run = self.parse("stage", own)
        known = {(stage.name, str(stage.of)): stage.of for stage in run.stages()}
        run.perform(name, known.get((name, of), of))


UNFINISHED = 3
"""Exit code of a run that the same command goes on with."""


@contextlib.contextmanager
def _only_the_result(quiet: bool) -> Iterator[None]:
    """Until it is printed, stdout is stderr, or nowhere; of processes that are started here too."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if quiet else sys.stderr):
        os.dup2(nowhere.fileno() if quiet else 2, 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


@contextlib.contextmanager
def _honest_bars(quiet: bool) -> Iterator[None]:
    """No progress bars; or, where stderr is no terminal, a line every half minute and at the end, without returns."""
    if quiet:
        names = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
        os.environ.update(dict.fromkeys(names, "1"))
    if sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    def display(bar, msg=None, pos=None):
        now = time.monotonic()
        if msg is None and (bar.disable or now - vars(bar).setdefault("_told", now) > 30):
            bar._told = now
            bar.fp.write(f"{bar}" + "\n" * (not bar.disable))  # closing, which disables a bar first, ends the line

    own: Any = tqdm
    before = own.display, own.clear
    own.display, own.clear = display, lambda *given, **options: None
    try:
        yield
    finally:
        own.display, own.clear = before


def split_launch_arguments(parser: Any, argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for `accelerate launch`, which are those the parser does not know, and the others."""
    if not {"--accelerate_config", "--num_processes"} & {item.partition("=")[0] for item in argv}:
        return [], argv
    from trl_extensions._compat import resolve_accelerate_config_argument

    parser.launching = True
    unknown = parser.parse_known_args(argv)[1]
    remaining = iter(unknown)
    current, own = next(remaining, None), []
    for item in argv:  # what the parser left over is an ordered part of what it was given
        if item == current:
            current = next(remaining, None)
        else:
            own.append(item)
    return resolve_accelerate_config_argument(unknown), own


def processes_of(launch: Sequence[str]) -> int:
    """Processes that `accelerate launch` starts by these arguments and their file; `ValueError` for a bad one."""
    from accelerate.commands.launch import launch_command_parser

    from trl_extensions._compat import validate_launch_command

    args = launch_command_parser().parse_args([*launch, "--module", "trl_extensions"])
    try:
        args = validate_launch_command(args)[0]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--accelerate_config: {' '.join(str(error).split())}") from None
    return 1 if args.cpu else args.num_processes or 1


def launch_module(launch: Sequence[str], arguments: Sequence[str]) -> None:
    """Run a `trl-ext` command under `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args([*launch, "--module", "trl_extensions", *arguments]))
