"""Batches of TNT: rows of one prompt drawn together, completions behind prompts, a sign per token."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.data.data_collator import DataCollatorMixin

from ..core.modeling.shared_prefix import pack_shared_prefix
from ..core.training.encoding import pad_rows


@dataclass
class DataCollatorForTNT(DataCollatorMixin):
    """Pads rows of `input_ids` and `token_weights` on the right.

    With `share_prefix`, rows that begin with the same tokens up to the first scored one stand in one sequence, their
    completions one after another, in batches that need fewer tokens so. Positions restart after the prompt;
    `core.modeling.shared_prefix.attention_mask` keeps completions from seeing each other.

    Returns (by calling it on a list of B rows, T being the longest, in tokens):
        `input_ids` and `attention_mask` `(B, T)`; `token_weights` `(B, T)`: +1 on tokens to keep, -1 on unwanted ones,
        0 on what is not scored: the prompt, the padding and each row's first token, which nothing predicts. Where rows
        share a prompt, there are S < B sequences, and also `num_tokens` `(B,)` of the rows, `position_ids` `(S, T)`,
        and `row_ids` `(S, T)`, the row of a completion's tokens and -1 elsewhere.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    share_prefix: bool = False
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [example["input_ids"] for example in examples]
        weights = [[0, *example["token_weights"][1:]] for example in examples]
        if self.share_prefix:
            groups = defaultdict(list)
            for row, (ids, own) in enumerate(zip(sequences, weights, strict=True)):
                groups[tuple(map(int, ids[: prompt_length(own)]))].append(row)
            # Tokens with and without sharing, padding included
            lengths = [len(p) + sum(len(sequences[row]) - len(p) for row in rows) for p, rows in groups.items()]
            if len(groups) * max(lengths) < len(sequences) * max(map(len, sequences)):
                return self._shared(sequences, weights, groups)
        return self._padded(sequences, weights)

    def _shared(self, sequences, weights, groups: dict[tuple[int, ...], list[int]]) -> dict[str, torch.Tensor]:
        layouts, signs = [], []
        for prompt, rows in groups.items():
            layouts.append(pack_shared_prefix(prompt, [(row, sequences[row][len(prompt) :]) for row in rows]))
            signs.append([0] * len(prompt) + [sign for row in rows for sign in weights[row][len(prompt) :]])
        return {
            # First: transformers reads the batch size off the first tensor, and a batch is counted in rows
            "num_tokens": torch.tensor([len(ids) for ids in sequences]),
            **self._padded([layout.input_ids for layout in layouts], signs),
            "position_ids": pad_rows([layout.position_ids for layout in layouts], 0, self.pad_to_multiple_of),
            "row_ids": pad_rows([layout.group_ids for layout in layouts], -1, self.pad_to_multiple_of),
        }

    def _padded(self, sequences: list[list[int]], weights: list[list[int]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": pad_rows(sequences, self.pad_token_id, self.pad_to_multiple_of),
            "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], 0, self.pad_to_multiple_of),
            "token_weights": pad_rows(weights, 0, self.pad_to_multiple_of),
        }


def prompt_length(token_weights: list[int]) -> int:
    """Tokens before the first scored one; the first token is one of them, as nothing predicts it."""
    return next((place for place, weight in enumerate(token_weights) if weight and place), len(token_weights))


class PromptSampler(Sampler[int]):
    """Row numbers, prompts in random order and rows of a prompt in random order behind each other, by seed and epoch;
    `prompts` has something for each row that tells its prompt from others."""

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
