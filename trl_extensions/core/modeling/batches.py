"""What a pass of many texts through a model needs: batches, a model that shows no trace of it, how fast it goes."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn

_PADDED = 16


def plan_batches(
    lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, numbers: Sequence[int] | None = None
) -> list[list[int]]:
    """Group prompts of similar length, the longest first, so that what does not fit fails at once.

    Where every token written costs a pass over the batch, batches are as few as possible; where they are only read, a
    batch ends before a sixteenth of its budget is padding, for another one soon costs less.

    Gives indices into `lengths` (tokens of each prompt, which stands for as many rows as `numbers` says). A batch has
    one prompt at least and is bounded by `batch_tokens`: rows * (longest prompt + `max_new_tokens`).
    """
    batches: list[list[int]] = []
    rows = longest = padding = 0  # of the last batch
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        own = 1 if numbers is None else numbers[index]
        rows += own
        padding += own * (longest - lengths[index])
        fits = rows * (longest + max_new_tokens) <= batch_tokens
        if batches and fits and (max_new_tokens or padding <= batch_tokens // _PADDED):
            batches[-1].append(index)
        else:
            batches.append([index])
            rows, longest, padding = own, lengths[index], 0
    return batches


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own mode afterwards, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    # Not by `eval()`, which may also swap kernels for ones without a gradient
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from laying 4-bit weights out for inference, through which no gradient flows.

    It does so in place, rounding their scales, at the first forward in eval mode on a processor with avx512_bf16. Call
    this before a model is trained, or compared with one that is; `ValueError` where it was done already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                what = "The model ran in eval mode before, and its 4-bit weights are laid out to pass no gradients on"
                raise ValueError(f"{what}: load it anew, and give it to the trainer before it is run.")


def free_memory() -> None:
    """Give models of a finished stage back before the next one loads its own; loads no torch where there is none."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_batches(
    lengths: Sequence[int],
    batch_tokens: int,
    desc: str,
    *,
    numbers: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[list[int]]:
    """`plan_batches` of texts that are only read, beside a progress bar with tokens a second and the padding share."""
    from tqdm.auto import tqdm

    start, tokens, places = time.perf_counter(), 0, 0
    with tqdm(total=len(lengths), desc=desc, disable=not progress) as bar:
        for indices in plan_batches(lengths, 0, batch_tokens, numbers):
            yield indices
            rows = [1 if numbers is None else numbers[i] for i in indices]
            tokens += sum(number * lengths[i] for number, i in zip(rows, indices, strict=True))
            places += sum(rows) * lengths[indices[0]]  # the longest comes first
            rate = tokens / (time.perf_counter() - start)
            padding = (places - tokens) / max(1, places)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {padding:.0%} padding", refresh=False)
            bar.update(len(indices))


class Padding:
    """The share of padding in what an engine computes from here on; only the one of transformers counts."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._before = engine, (getattr(engine, "num_tokens", 0), getattr(engine, "num_places", 0))

    @property
    def share(self) -> float | None:
        """None if nothing was counted."""
        tokens, places = (getattr(self._engine, name, 0) for name in ("num_tokens", "num_places"))
        tokens, places = tokens - self._before[0], places - self._before[1]
        return 1 - tokens / places if places else None


def written_in(tokens: int, seconds: float, padding_share: float | None = None) -> str:
    """What a sampler wrote, for a log: tokens, seconds, tokens a second, and the share of padding if it is known."""
    padding = "" if padding_share is None else f", {padding_share:.0%} padding"
    return f"{tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} a second{padding})"
