"""Packages that only some commands need."""

import importlib
import importlib.util
from importlib.metadata import requires
from typing import Any

from packaging.requirements import Requirement


RUN = ("datasketch", "matplotlib", "rouge_score", "sacrebleu", "scipy", "sklearn")  # what the extra `run` installs


def import_extra(module: str, extra: str = "run") -> Any:
    """A module of a package that an extra of this one installs; an `ImportError` of one line says how."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needed = f"{module.partition('.')[0]} is needed here and cannot be imported ({error})"
        raise ImportError(f"{needed}: pip install {' '.join(sorted(packages_of(extra)))}") from None


def packages_of(extra: str) -> set[str]:
    """What an extra installs, by name: this package's own may be somebody else's on the package index."""
    own = [one for one in map(Requirement, requires("trl-extensions") or ()) if one.marker]
    wanted = [one for one in own if one.marker.evaluate({"extra": extra})]  # type: ignore[union-attr]
    found = {one.name for one in wanted if one.name != "trl-extensions"}
    return found.union(*(packages_of(more) for one in wanted if one.name == "trl-extensions" for more in one.extras))


def check_run_extra() -> None:
    """Raise the error of `import_extra` for the first package of the extra `run` that is missing, and load none."""
    for package in RUN:
        if importlib.util.find_spec(package) is None:
            import_extra(package)
