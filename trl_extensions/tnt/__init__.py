import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .annotate import annotate as annotate


def __getattr__(name: str) -> Any:
    if name == "annotate":
        return importlib.import_module(f"{__name__}.annotate")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
