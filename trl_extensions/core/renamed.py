"""Old names of options: they work for one version, each with one line of warning."""

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar


_Class = TypeVar("_Class", bound=type)


def renamed(**names: str) -> Callable[[_Class], _Class]:
    """Let a dataclass take its fields by their old names too, as keyword arguments and as attributes.

    A dataclass that inherits from such a one needs the decorator too, if only as `@renamed()`.

    Args:
        names: Old name -> new one.

    Example:

    ```python
    @renamed(form="task")
    @dataclass
    class Arguments:
        task: str = "classification"


    Arguments(form="reward").task  # warns once, and gives "reward"
    ```

    Raises:
        TypeError: An instance is made with both names of one field.
    """

    def decorate(cls: _Class) -> _Class:
        init = cls.__init__

        @functools.wraps(init)
        def with_old_names(self, *args, **kwargs):
            init(self, *args, **translate(cls, kwargs))

        cls.__init__ = with_old_names
        cls._renamed = {**getattr(cls, "_renamed", {}), **names}
        for old, new in names.items():
            setattr(cls, old, _alias(old, new))
        return cls

    return decorate


def old_names(cls: type) -> dict[str, str]:
    """Old name -> new one of a class's fields."""
    return getattr(cls, "_renamed", {})


def translate(cls: type, values: dict) -> dict:
    """The same values by their new names, with one line of warning for each old one."""
    names = old_names(cls)
    translated = {name: value for name, value in values.items() if name not in names}
    for old in values.keys() & names.keys():
        new = names[old]
        if new in values:
            raise TypeError(f"`{old}` is now called `{new}`: give one of the two")
        warnings.warn(message(old, new), FutureWarning, stacklevel=3)
        translated[new] = values[old]
    return translated


def message(old: str, new: str) -> str:
    return f"`{old}` is now called `{new}`; the old name goes in the next version"


def _alias(old: str, new: str) -> property:
    def read(self):
        warnings.warn(message(old, new), FutureWarning, stacklevel=2)
        return getattr(self, new)

    def write(self, value):
        warnings.warn(message(old, new), FutureWarning, stacklevel=2)
        setattr(self, new, value)

    return property(read, write)
