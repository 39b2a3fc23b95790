"""Packages that only some commands need."""

import importlib
import importlib.util
from typing import Any


RUN = ("datasketch", "matplotlib", "rouge_score", "sacrebleu", "scipy", "sklearn")  # what the extra `run` installs
_INSTALLED_AS = {"sklearn": "scikit-learn", "profanity_check": "alt-profanity-check"}


def import_extra(module: str) -> Any:
    """A module of a package that an extra of this one installs; an `ImportError` of one line says how, by the name of
    that package: this one's own may be somebody else's on the package index."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        package = _INSTALLED_AS.get(name, name.replace("_", "-"))
        raise ImportError(f"{name} is needed here and cannot be imported ({error}): pip install {package}") from None


def check_run_extra() -> None:
    """Raise the error of `import_extra` for the first package of the extra `run` that is missing, and load none."""
    for package in RUN:
        if importlib.util.find_spec(package) is None:
            import_extra(package)
