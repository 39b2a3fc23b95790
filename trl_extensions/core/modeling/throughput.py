"""Tokens a second and the share of padding of a pass over many texts, shown beside its progress bar."""

import time
from collections.abc import Sequence
from typing import Any


class Throughput:
    """Counts the batches of one pass.

    Args:
        bar: The `tqdm` bar of that pass.
    """

    def __init__(self, bar) -> None:
        self.bar = bar
        self.tokens = self.laid_out = 0
        self.start = time.perf_counter()

    @property
    def padding_share(self) -> float:
        """Share of what was laid out so far that was padding."""
        return 1 - self.tokens / self.laid_out if self.laid_out else 0.0

    def add(self, lengths: Sequence[int]) -> None:
        """Count a batch by the tokens of its rows, padded to the longest, and move the bar's text along."""
        self.tokens += sum(lengths)
        self.laid_out += len(lengths) * max(lengths)
        rate = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rate:.0f} tokens/s, {self.padding_share:.0%} padding", refresh=False)


class Padding:
    """The share of padding in what an engine computes from here on.

    Args:
        engine: Of `core.generation`; only the one of transformers counts.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._before = engine, _counts(engine)

    @property
    def share(self) -> float | None:
        """None if nothing was counted."""
        tokens, places = (now - before for now, before in zip(_counts(self._engine), self._before, strict=True))
        return 1 - tokens / places if places else None


def _counts(engine: Any) -> tuple[int, int]:
    return getattr(engine, "num_tokens", 0), getattr(engine, "num_places", 0)


def written_in(tokens: int, seconds: float, padding_share: float | None = None) -> str:
    """What a sampler wrote, for a log: tokens, seconds, tokens a second, and the share of padding if it is known."""
    padding = "" if padding_share is None else f", {padding_share:.0%} padding"
    return f"{tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} a second{padding})"
