"""Draw rows of one prompt side by side, so that they meet in a batch."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """Row numbers, prompts in random order and rows of a prompt in random order behind each other.

    Args:
        prompts: Something for each row that tells its prompt from others.
        seed: With the epoch it decides the order, in every process alike.
    """

    def __init__(self, prompts: Sequence[Hashable], seed: int):
        groups = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt].append(row)
        self._groups = list(groups.values())
        self._number, self._seed, self.epoch = len(prompts), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch; by transformers before it skips what a resumed epoch has seen."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}/{self.epoch}")
        for group in draw.sample(self._groups, len(self._groups)):
            yield from draw.sample(group, len(group))
