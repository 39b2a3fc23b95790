"""Settings that a command has no use for are refused instead of ignored."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any


def refuse_unused(arguments: Any, names: Iterable[str], because: str) -> None:
    """Refuse settings that would have no effect.

    Args:
        arguments: A dataclass; a field with another value than its default counts as set.
        names: Its fields that have no effect.
        because: Ends the sentence "... has no effect", such as "with `form: generation`".

    Raises:
        ValueError: Some of them are set; one line that names them.
        KeyError: A name is no field.
    """
    known = {f.name: f for f in fields(arguments)}
    given = [f"`{name}`" for name in names if getattr(arguments, name) != _default(known[name])]
    if given:
        verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise ValueError(f"{', '.join(given)} {verb} no effect {because}: leave {them} out.")


def _default(f) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()
