"""Batch layout of TNT: prompts with their completions, padded on the right, and a sign per token."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from .._compat import pad


@dataclass
class DataCollatorForTNT(DataCollatorMixin):
    """Pads rows of `input_ids` and `token_weights` on the right.

    Args:
        pad_token_id: Id that fills the sequences up.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Returns (by calling it on a list of B rows, T being the longest, in tokens):
        `input_ids` and `attention_mask` `(B, T)`; `token_weights` `(B, T)`: +1 on tokens to keep, -1 on unwanted ones,
        0 on what is not scored: the prompt, the padding and each row's first token, which nothing predicts.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [example["input_ids"] for example in examples]
        weights = [[0, *example["token_weights"][1:]] for example in examples]
        return {
            "input_ids": self._pad(sequences, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in sequences], 0),
            "token_weights": self._pad(weights, 0),
        }

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
