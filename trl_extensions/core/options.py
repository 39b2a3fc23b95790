"""Options, the fields of dataclasses: how they are declared and checked, and old names, which work for one version."""

import difflib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any, TypeVar


logger = logging.getLogger(__name__)

_Class = TypeVar("_Class", bound=type)

# Name and password in an address, and what is called a key there or in JSON
_SECRET = re.compile(
    r"""(://)[^/\s"'?#]+(?=@)|([?&][\w-]*(?:key|token|secret|password|sig)=)[^&\s"']+"""
    r"""|(\\?"(?:[\w-]*(?:(?:api|access)[_-]?(?:key|token)|secret|password)|token|authorization)\\?": \\?")[^"\\]+""",
    re.IGNORECASE,
)


def option(default: Any, help: str, *choices: str) -> Any:
    """A field of arguments: its default, what `--help` says of it, and what it may be, if that is a few words."""
    return field(default=default, metadata={"help": help} | ({"choices": list(choices)} if choices else {}))


def check_least(arguments: Any, most: int = 10_000_000, **least: int) -> None:
    """Raise a one-line `ValueError` for a field that is no whole number, a smaller one than given here, or one above
    `most`, which no machine would come to the end of."""
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")
        if value > most:
            raise ValueError(f"`{name}` must be at most {most:,}, got {value:,}.")


def check_choices(arguments: Any, *names: str) -> None:
    """Raise a one-line `ValueError` for a field that is none of its choices; YAML files go by the parser's check."""
    for name in names:
        choices, value = arguments.__dataclass_fields__[name].metadata["choices"], getattr(arguments, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What a message says where something known is close to an unknown word; else nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


@functools.cache
def say_once(message: str, *values: str) -> None:
    """Log a warning the first time only: a run reads its sources, and builds trainers, at every stage."""
    logger.warning(message, *values)


def redacted(text: str) -> str:
    """A text to be shown or kept, without the names, passwords and keys of addresses and JSON in it."""
    return _SECRET.sub(lambda found: next(filter(None, found.groups())) + "***", text)


def renamed(**names: str) -> Callable[[_Class], _Class]:
    """Let a dataclass take its fields by their old names too (old="new"), as keyword arguments and as attributes. One
    that inherits from it needs the decorator too, if only as `@renamed()`."""

    def decorate(cls: Any) -> Any:
        known, init = {**old_names(cls), **names}, cls.__init__

        @functools.wraps(init)
        def with_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in kwargs.keys() & known.keys():
                if known[old] in kwargs:
                    raise TypeError(f"`{old}` is now called `{known[old]}`: give one of the two")
                _warn(old, known[old])
                kwargs[known[old]] = kwargs.pop(old)
            init(self, *args, **kwargs)

        cls.__init__ = with_old_names
        cls.__renamed__ = known
        for old, new in names.items():
            setattr(cls, old, _alias(old, new))
        return cls

    return decorate


def old_names(cls: type) -> dict[str, str]:
    """Old name -> new one of a class's fields."""
    return getattr(cls, "__renamed__", {})


def message(old: str, new: str) -> str:
    return f"`{old}` is now called `{new}`; the old name goes in the next version"


def _warn(old: str, new: str) -> None:
    warnings.warn(message(old, new), FutureWarning, stacklevel=3)


def _alias(old: str, new: str) -> property:
    def read(self: Any) -> Any:
        _warn(old, new)
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        _warn(old, new)
        setattr(self, new, value)

    return property(read, write)
