"""Packages that only some commands need."""

import importlib
import importlib.util
from typing import Any


RUN = ("datasketch", "matplotlib", "rouge_score", "sacrebleu", "scipy", "sklearn")  # what the extra `run` installs


def import_extra(module: str, extra: str = "run") -> Any:
    """A module of a package that an extra of this one installs; an `ImportError` of one line says how."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needed = f"{module.partition('.')[0]} is needed here and cannot be imported ({error})"
        raise ImportError(f"{needed}: pip install 'trl-extensions[{extra}]'") from None


def check_run_extra() -> None:
    """Raise the error of `import_extra` for the first package of the extra `run` that is missing, and load none."""
    for package in RUN:
        if importlib.util.find_spec(package) is None:
            import_extra(package)
