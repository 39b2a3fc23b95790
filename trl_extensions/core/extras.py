"""Packages that only some commands need."""

import importlib
from typing import Any


def import_extra(module: str, extra: str = "run") -> Any:
    """A module of a package that an extra of this one installs.

    Raises:
        ImportError: It is missing; one line that says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed here and cannot be imported ({error}): pip install 'trl-extensions[{extra}]'"
        ) from None
