"""Labelling texts with a classifier: batches in file order, and batches of like lengths by tokens."""

import math
import random

import torch
from torch import nn

from trl_extensions.weak_to_strong.trainers.features import sequence_logits


def make_texts(number: int, vocabulary: int) -> list[list[int]]:
    """Token ids of texts whose lengths scatter as those of real ones do: log-normal, 100 tokens in the middle."""
    draw = random.Random(1)
    lengths = [min(1000, max(8, round(math.exp(draw.gauss(math.log(100), 0.8))))) for _ in range(number)]
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def in_order(model: nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """Eight at a time, as they come, padded to the longest."""
    logits = []
    with torch.no_grad():
        for start in range(0, len(texts), 8):
            rows = [torch.tensor(text) for text in texts[start : start + 8]]
            input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits.append(model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float())
    return torch.cat(logits)


def ours(model: nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """What labels texts in `trl-ext w2s`."""
    return sequence_logits(model, texts, batch_tokens=4096)


PATHS = {"in file order": in_order, "ours": ours}
