"""Batch layouts of SAMI: every response behind every prompt of its query, with or without repeating the prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from ..core.modeling.shared_prefix import PackedBatch, pack_shared_prefix
from ..core.training.encoding import pad_rows


@dataclass
class DataCollatorForSAMI(DataCollatorMixin):
    """Lays out queries with C prompts and C responses each, padded on the right. Queries may differ in C.

    Pairs are numbered row-major: pair `k * C + j` of a query is prompt k followed by response j.

    With `share_prefix` there is one sequence per prompt with all C responses behind it, instead of one per pair:
    positions restart after the prompt, and `core.modeling.shared_prefix.attention_mask` keeps responses from seeing
    each other. Padded lengths are rounded up to `pad_to_multiple_of`.

    Returns (by calling it on a list of rows):
        `num_constitutions` `(B,)`; `input_ids`, `attention_mask`, `pair_ids` `(S, T)`, the last holding the number of
        the pair on response tokens and -1 elsewhere; `matched` `(sum C^2,)` bool, True where the response was sampled
        under that prompt; with `share_prefix` also `position_ids` `(S, T)`. Of rows with `plain_input_ids`, the query
        without a constitution, the same behind that prompt: `plain_input_ids`, `plain_pair_ids`, ...; there is one
        pair to a response.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    share_prefix: bool = False
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packed, plain = list[PackedBatch](), list[PackedBatch]()
        matched: list[bool] = []
        number = 0  # of responses so far
        for example in examples:
            completions = example["completion_input_ids"]
            for k, prompt in enumerate(example["prompt_input_ids"]):
                numbered = [(len(matched) + j, completion) for j, completion in enumerate(completions)]
                matched += [k == j for j in range(len(completions))]
                packed += self._behind(prompt, numbered)
            if "plain_input_ids" in example:
                plain += self._behind(example["plain_input_ids"], list(enumerate(completions, number)))
                number += len(completions)
        # First: transformers reads the batch size off the first tensor, and a batch is counted in queries
        batch = {"num_constitutions": torch.tensor([len(example["prompt_input_ids"]) for example in examples])}
        batch |= self._padded(packed) | {"matched": torch.tensor(matched)}
        return batch | ({f"plain_{name}": own for name, own in self._padded(plain).items()} if plain else {})

    def _behind(self, prompt: list[int], numbered: list[tuple[int, list[int]]]) -> list[PackedBatch]:
        groups = [numbered] if self.share_prefix else [[one] for one in numbered]
        return [pack_shared_prefix(prompt, group) for group in groups]

    def _padded(self, packed: list[PackedBatch]) -> dict[str, torch.Tensor]:
        sequences, pair_ids, position_ids = zip(*packed, strict=True)
        batch = {
            "input_ids": pad_rows(sequences, self.pad_token_id, self.pad_to_multiple_of),
            "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], 0, self.pad_to_multiple_of),
            "pair_ids": pad_rows(pair_ids, -1, self.pad_to_multiple_of),
        }
        if self.share_prefix:
            batch["position_ids"] = pad_rows(position_ids, 0, self.pad_to_multiple_of)
        return batch
