"""A run as a list of stages, each of which leaves a file when it is done and is skipped where that file is."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..modeling.memory import free_memory
from .report import write_atomically


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: What the run calls it.
        of: What it is about: a round, a model.
        done: The file or folder that says it is done.
        label: What progress calls it.
    """

    name: str
    of: Any
    done: Path
    label: str


def perform_missing(stages: Iterable[Stage], perform: Callable[[str, Any], Any]) -> None:
    """Carry out, in order, what is not done yet, a line of progress each.

    Args:
        stages: All stages of the run.
        perform: Carries out one, given its `name` and `of`.
    """
    stages = list(stages)
    for number, stage in enumerate(stages, start=1):
        line = f"[{number}/{len(stages)}] {stage.label}"
        if stage.done.exists():
            print(f"{line} - done already, see {stage.done}", flush=True)
            continue
        print(line, flush=True)
        perform(stage.name, stage.of)
        free_memory()


def finish(path: Path, report: Any) -> None:
    """Print a dataclass's `summary` and write its fields to the JSON file that says a stage is done."""
    print(report.summary)
    values = {f.name: getattr(report, f.name) for f in fields(report)}
    write_atomically(path, json.dumps(values, default=str, indent=2) + "\n")
