"""Which texts go through a model together."""

from collections.abc import Sequence


_PADDED = 16


def plan_batches(
    lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, numbers: Sequence[int] | None = None
) -> list[list[int]]:
    """
    Groups prompts of similar length.

    The longest come first, so that a batch too large for the memory fails at once and not after an hour. Where every
    token written costs a pass over the batch, batches are as few as possible; where they are only read, a batch ends
    before a sixteenth of its budget is padding, for another one soon costs less.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each prompt.
        max_new_tokens (`int`):
            Tokens to be generated for each; 0 if they are only read.
        batch_tokens (`int`):
            Bound on rows * (longest prompt + `max_new_tokens`) of a batch; a batch has one prompt at least.
        numbers (`Sequence[int]`, *optional*):
            Rows that each prompt stands for; one by default.

    Returns:
        `list[list[int]]`: indices into `lengths`, each once.
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
