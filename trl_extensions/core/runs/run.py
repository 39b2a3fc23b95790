"""A run: stages that leave a file when they are done, settings that bind what was made, one process at a time."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from ..generation import EngineArguments, parse_engine
from ..modeling.batches import free_memory
from ..options import redacted
from .report import write_atomically


# Settings of a trainer that may change between a kill and the restart: they decide where and how fast, not what
MUTABLE_ON_RESUME = {
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id", "log_level",
    "log_level_replica", "logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy",
    "save_total_limit", "hub_token", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
    "resume_from_checkpoint", "dataloader_num_workers", "dataset_num_proc", "use_cpu", "local_rank", "ddp_backend",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "per_device_eval_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage: the method that carries it out, what it is about (a round, a model), the file or folder that says it
    is done, and what progress calls it."""

    name: str
    of: Any
    done: Path
    label: str


class Run:
    """What every method's run does alike. A subclass has a `folder` and a method for each stage, named as the stage
    is; everything it writes goes into the folder, and the same command goes on where a killed one stopped."""

    folder: Path
    processes = 1  # that a launcher gives to training
    # File of settings -> patterns of what is made with them, which is moved away and made anew where others are given
    remade: ClassVar[dict[str, str]] = {}
    pushes = False  # whether the finished model goes to the hub

    def stages(self) -> Iterable[Stage]:
        """All stages in order."""
        raise NotImplementedError

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """File name -> JSON-ready values to keep in it, and whether anything was made with them, so that they bind."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise a one-line `ValueError` for what is missing, before anything is written or loaded."""

    def servers(self) -> Iterable[Any]:
        """Engines that are asked, some of which may be servers."""
        judged = (own.judge for own in vars(self).values() if getattr(own, "judge", None))
        asked = (own for own in vars(self).values() if isinstance(own, EngineArguments))
        return [*asked, *(parse_engine(own, "judge").arguments for own in judged)]

    def trainings(self) -> Iterable[Any]:
        """What is to be trained, as `core.training.preflight.Training`."""
        return ()

    def works(self) -> Iterable[Any]:
        """What there is to do, as `core.runs.plan.Work`."""
        return ()

    def write_report(self) -> Path:
        """Write the report from what lies in the folder."""
        raise NotImplementedError

    def summary(self, report: Path) -> str:
        """What the report that was written says first."""
        return report.read_text(encoding="utf-8").split("\n\n")[1]

    def is_complete(self) -> bool:
        """Whether nothing is left that the same command would go on with."""
        return True

    def needs_processes(self) -> bool:
        """Whether every stage gets a process of its own, which gives a GPU's memory back whatever held it."""
        import torch

        return getattr(getattr(self, "engine_args", None), "engine", None) == "vllm" or torch.cuda.is_available()

    def claim(self) -> None:
        """Write the settings. Where a run was started with others, move away what they made, or refuse to go on."""
        for name in self.settings():
            path, (values, started) = self.folder / name, self.settings()[name]
            behind = [own for pattern in self.remade.get(name, "").split() for own in self.folder.glob(pattern)]
            if started and behind and (changes := changes_of(path, values)):
                aside = next(own for n in count(1) if not (own := self.folder / f"earlier_{n}").exists())
                print(f"made anew, with what was made of it, as {changes}; the earlier is in {aside}", flush=True)
                for own in dict.fromkeys((path, *behind)):
                    (aside / own.relative_to(self.folder)).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(own, aside / own.relative_to(self.folder))
                started = False
            check_resume(path, values, made=str(self.folder), started=started)

    def execute(self, perform: Callable[[str, Any], Any] | None = None) -> Path:
        """Carry out what is not done yet, stages by `perform(name, of)`, and write the report; returns its path."""
        self.check()
        with folder_lock(self.folder):
            self.claim()
            run_stages(self.stages(), perform or self.perform)
            return self.write_report()

    def perform(self, name: str, of: Any) -> None:
        """Carry out one stage in this process."""
        getattr(self, name)(of)


def run_stages(stages: Iterable[Stage], perform: Callable[[str, Any], Any]) -> None:
    """Carry out, in order, what is not done yet, a line of progress each."""
    stages = list(stages)
    for number, stage in enumerate(stages, start=1):
        line = f"[{number}/{len(stages)}] {stage.label}"
        if stage.done.exists():
            print(f"{line} - done already, see {stage.done}", flush=True)
            continue
        print(line, flush=True)
        perform(stage.name, stage.of)
        free_memory()


def mark_done(path: Path, report: Any) -> None:
    """Print a dataclass's `summary` and write its fields to the JSON file that says a stage is done."""
    print(report.summary)
    values = {f.name: getattr(report, f.name) for f in fields(report)}
    write_atomically(path, json.dumps(values, default=str, indent=2) + "\n")


@contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Keep a folder to this process (else `ValueError`) while the block runs; a killed process gives it back."""
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", blocking=False).acquire()
    except Timeout:
        raise ValueError(f"{folder}: another process is working in it; wait for it, or use another folder") from None
    with lock:
        yield


def training_settings(config: Any, mutable: Set[str] = MUTABLE_ON_RESUME) -> dict[str, Any]:
    """The fields of a trainer's configuration, JSON-ready, that a resumed run must share: all but the mutable ones."""
    known = {f.name for f in fields(config)} - mutable
    return {name: value for name, value in config.to_dict().items() if name in known}


def check_resume(path: str | os.PathLike, settings: dict[str, Any], *, made: str, started: bool) -> None:
    """Write JSON-ready settings to a file; or, if anything (called `made`) was `started` with them, refuse others than
    those in it by a `ValueError` that names every difference, or the file if it is missing or broken."""
    path = Path(path)
    if not started:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_as_kept(settings), indent=2, ensure_ascii=False) + "\n")
    elif changes := changes_of(path, settings):
        raise ValueError(f"{made} was made with other settings: {changes}; use the same, or another output")


def changes_of(path: Path, settings: dict[str, Any]) -> str:
    """Every difference between settings and those in a file, in words; a `ValueError` if it is missing or broken."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{path} is missing or not JSON; restore it, or use another output") from None
    return "; ".join(_differences(earlier, _as_kept(settings)))


def _as_kept(settings: dict[str, Any]) -> Any:
    return json.loads(redacted(json.dumps(settings)))  # tuples become lists, as they are in the file


def _differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from _differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif earlier != now:
        was, is_now = (json.dumps(value, ensure_ascii=False) for value in (earlier, now))
        yield f"{name} was {was:.60}, now {is_now:.60}"
