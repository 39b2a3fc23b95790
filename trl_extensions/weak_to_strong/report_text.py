"""How the reports of weak-to-strong runs write estimates `{"value", "low", "high"}` and shares."""

from collections.abc import Sequence
from typing import Any


def percent(estimate: dict[str, Any]) -> str:
    """A share in percent with its interval, where it has one."""
    interval = f" ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})" if estimate["low"] is not None else ""
    return f"{100 * estimate['value']:.1f} %{interval}"


def number(estimate: dict[str, Any], digits: int = 2, sign: str = "") -> str:
    """A number with its interval, where it has one; `sign` "+" writes the sign of positive ones too."""
    if estimate["value"] is None:
        return "n/a"
    form = f"{{:{sign}.{digits}f}}".format
    text = form(estimate["value"])
    return text if estimate["low"] is None else f"{text} ({form(estimate['low'])} to {form(estimate['high'])})"


def share(value: float | None) -> str:
    """A share in percent."""
    return "n/a" if value is None else f"{value:.1%}"


def shares(values: Sequence[float]) -> str:
    """Shares of classes."""
    return " / ".join(f"{value:.0%}" for value in values)


def listed(values: Sequence[float | None]) -> str:
    """One number, or those of the two halves of a bootstrap chain."""
    return " and ".join("n/a" if value is None else f"{value:.2f}" for value in values)


def recovered(gap: dict[str, Any]) -> str:
    """A result of `pgr.summarise_pgr` as a sentence."""
    if gap["value"] is None:
        return f"The performance gap recovered is undefined: {gap['reason']}."
    text = f"Performance gap recovered: {number(gap)}"
    if gap["reliable"]:
        return f"{text}."
    return f"{text}; the interval is unreliable, as {gap['undefined_share']:.0%} of resamples have no gap at all."


def pgr_cell(gap: dict[str, Any]) -> str:
    """The same in a table; a question mark says that the interval is unreliable."""
    if gap["value"] is None:
        return f"undefined: {gap['reason']}"
    return number(gap) if gap["reliable"] else f"{number(gap)} ?"
