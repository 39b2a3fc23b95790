"""An engine in one setting, for commands that need several of them: a model's name, or a dict of `EngineArguments`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import yaml

from . import EngineArguments


_FIELDS = tuple(f.name.removeprefix("engine_") for f in fields(EngineArguments) if f.name != "engine")


@dataclass(frozen=True)
class EngineSpec:
    """What a setting says.

    Args:
        arguments: For `create_engine`.
        prices: Of a million tokens read and a million written, in any currency; zeros if nothing was said.
    """

    arguments: EngineArguments
    prices: tuple[float, float] = (0.0, 0.0)


def parse_engine(value: str | dict[str, Any], name: str) -> EngineSpec:
    """Read the setting of an engine.

    Args:
        value: A model's id or directory, which then runs in this process with transformers; or a dict, or YAML of one,
            with `engine`, `model`, `base_url` and whatever else `EngineArguments` calls `engine_*`, and `prices`: two
            numbers, of a million tokens read and a million written.
        name: The setting, for messages.

    Raises:
        ValueError: One line that names the setting and what is wrong with it.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`{name}` is neither a model's name nor YAML ({reason})") from None
    if isinstance(value, str):
        value = {"model": value}
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a model's name or a dict such as {{model: ...}}, got {value!r}")
    prices = _prices(value.get("prices", (0.0, 0.0)), name)
    unknown = set(value) - {"engine", "prices", *_FIELDS}
    if unknown:
        raise ValueError(
            f"`{name}` has no key {min(unknown, key=str)!r}; it takes engine, prices, {', '.join(_FIELDS)}"
        )
    own = {f"engine_{key}": value[key] for key in _FIELDS if key in value}
    default = "endpoint" if "base_url" in value else "transformers"
    try:
        return EngineSpec(EngineArguments(engine=value.get("engine", default), **own), prices)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}`: {error}") from None


def _prices(value: Any, name: str) -> tuple[float, float]:
    good = isinstance(value, (list, tuple)) and len(value) == 2
    if not good or any(isinstance(p, bool) or not isinstance(p, (int, float)) or p < 0 for p in value):
        raise ValueError(f"`{name}`: `prices` are two numbers, of a million tokens read and written, got {value!r}")
    return float(value[0]), float(value[1])
