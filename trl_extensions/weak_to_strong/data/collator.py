"""Batch layout of weak-to-strong classification."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.data.data_collator import DataCollatorMixin

from ..._compat import pad


@dataclass
class DataCollatorForWeakLabels(DataCollatorMixin):
    """Pads texts on the right, or stacks their features, and adds what is known of their labels.

    Args:
        pad_token_id: Id that fills the sequences up.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Returns (by calling it on a list of B rows, T being the longest, in tokens):
        `input_ids` and `attention_mask` `(B, T)`, or `features` `(B, H)` where the rows have them; as far as the rows
        have them `soft_labels` `(B, K)`, `weight` `(B,)` and `label` `(B,)`, the true class or -1.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "features" in examples[0]:
            batch = {"features": _floats(examples, "features")}
        else:
            sequences = [example["input_ids"] for example in examples]
            batch = {
                "input_ids": self._pad(sequences, self.pad_token_id),
                "attention_mask": self._pad([[1] * len(ids) for ids in sequences], 0),
            }
        for name in ("soft_labels", "weight"):
            if name in examples[0]:
                batch[name] = _floats(examples, name)
        if "label" in examples[0]:
            labels = [example["label"] for example in examples]
            batch["label"] = torch.tensor([-1 if label is None else label for label in labels])
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def _floats(examples: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray([example[name] for example in examples], dtype=np.float32))
