"""Progress of a run: how far, how fast, what it has cost, how long it will take."""

from __future__ import annotations

from types import TracebackType

from ..core.generation.client import Usage


class Progress:
    """A bar for each part of a run, over items; behind it calls, tokens a second and cost.

    Args:
        usage: What the caller counts.
    """

    def __init__(self, usage: Usage):
        self._usage = usage
        self._bar = None

    def begin(self, what: str, total: int | None = None, done: int = 0) -> None:
        """Start a part of the run, of which `done` items are finished; without a total it is calls that count."""
        from tqdm.auto import tqdm

        self._close()
        unit = "call" if total is None else "instruction"
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, mininterval=1.0)
        self._show()

    def heard(self) -> None:
        """A call is answered."""
        if self._bar is not None:
            self._show()
            self._bar.update(self._bar.total is None)

    def advance(self) -> None:
        """An item is finished."""
        self._show()
        self._bar.update()

    def _show(self) -> None:
        usage = self._usage
        rate = usage.num_tokens / max(usage.seconds, 1e-9)
        values = {"calls": usage.calls + usage.reused, "tokens/s": f"{rate:.0f}"}
        values |= {"cost": f"{usage.cost:.2f}"} if usage.cost else {}
        values |= {"failed": usage.failed} if usage.failed else {}
        self._bar.set_postfix(values, refresh=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._show()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
