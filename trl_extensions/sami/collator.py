"""Batch layout of SAMI: every response behind every prompt of its query."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from .._compat import pad


@dataclass
class DataCollatorForSAMI(DataCollatorMixin):
    """Lays a query with C prompts and C responses out as C x C right-padded sequences.

    Row-major: sequence `k * C + j` of a query is prompt k followed by response j. Queries may differ in C.

    Args:
        pad_token_id: Id that fills the sequences up.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Returns (by calling it on a list of rows):
        `num_constitutions` `(B,)`; `input_ids`, `attention_mask`, `completion_mask` `(sum C^2, T)`; `matched`
        `(sum C^2,)` bool, True where the response was sampled under that prompt.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, masks, matched = [], [], []
        for example in examples:
            for k, prompt in enumerate(example["prompt_input_ids"]):
                for j, completion in enumerate(example["completion_input_ids"]):
                    sequences.append(torch.tensor(prompt + completion))
                    masks.append(torch.tensor([0] * len(prompt) + [1] * len(completion)))
                    matched.append(k == j)
        options = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            # First: transformers reads the batch size off the first tensor, and a batch is counted in queries
            "num_constitutions": torch.tensor([len(example["prompt_input_ids"]) for example in examples]),
            "input_ids": pad(sequences, padding_value=self.pad_token_id, **options),
            "attention_mask": pad([torch.ones_like(ids) for ids in sequences], padding_value=0, **options),
            "completion_mask": pad(masks, padding_value=0, **options),
            "matched": torch.tensor(matched),
        }
