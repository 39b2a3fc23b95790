"""What classifiers make of texts outside of training: pooled states for a linear probe, logits, what pairs score."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.modeling.batches import eval_mode, in_batches
from ...core.training.encoding import pad_rows
from ..data.examples import Pair
from ..data.prepare import end_token


_CHUNK = 1024


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The linear head that reads the last token's state; `ValueError` for a model that pools in another way."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        needed = "`linear_probe` needs a model whose head is a linear layer `score` on the last token"
        raise ValueError(f"{needed}, which {type(model).__name__} is not: set it to False.")
    return head


def head_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """What the head makes of pooled states."""
    head = head_of(model)
    return head(states.to(head.weight))


def features(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 16384, progress: bool = True
) -> np.ndarray:
    """States `(N, H)`, float32, that the `score` head reads of N texts: of the last token that is not padding, as
    transformers pools them. Batches have at most `batch_tokens` tokens, padding included; a longer text goes alone."""
    head_of(model)
    backbone = getattr(model, model.base_model_prefix)
    device = backbone.get_input_embeddings().weight.device
    pad = model.config.get_text_config().pad_token_id
    pooled = np.zeros((len(token_ids), model.config.get_text_config().hidden_size), dtype=np.float32)
    with eval_mode(model), torch.inference_mode():
        for places in in_batches(list(map(len, token_ids)), batch_tokens, "Computing features", progress=progress):
            ids, mask = _padded([token_ids[place] for place in places], 0 if pad is None else pad)
            # A text may end in the padding token itself, which then does not count
            counted = mask.bool() if pad is None else ids != pad
            last = (torch.arange(ids.shape[1]) * counted).argmax(dim=-1)
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            states = backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
            of_rows = torch.arange(len(places), device=states.device), last.to(states.device)
            pooled[places] = states[of_rows].float().cpu().numpy()
    return pooled


def _padded(rows: list[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask."""
    return pad_rows(rows, pad), pad_rows([[1] * len(row) for row in rows], 0)


class FeatureStore:
    """What a frozen model makes of texts, computed when first asked for and kept over seeds, losses and restarts, in
    a `.npz` file of one model and one `max_length`."""

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        self._states: np.ndarray | None = None
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as stored:
                    self._places = {key: place for place, key in enumerate(stored["keys"].tolist())}
                    self._states = stored["states"]
            except (ValueError, TypeError, KeyError, EOFError, BadZipFile):  # the first for pickles too
                raise ValueError(f"{path} is no cache of features; delete it, and it is made anew") from None

    def get(self, texts: Sequence[str], compute: Callable[[list[str]], np.ndarray]) -> np.ndarray:
        """States `(N, H)`, float32, of N texts. `compute` gives those of texts that are not stored yet, 1,024 at a
        time, which are on disk before the next."""
        keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        texts_of = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._places}
        # Neighbours in length share a chunk, and so need little padding
        missing = sorted(texts_of.items(), key=lambda item: len(item[1]))
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            states = np.asarray(compute([text for _, text in chunk]), dtype=np.float32)
            self._states = states if self._states is None else np.concatenate([self._states, states])
            self._places |= {key: len(self._places) + place for place, (key, _) in enumerate(chunk)}
            self._save()
        return self._states[[self._places[key] for key in keys]]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, keys=np.array(list(self._places)), states=self._states)
        os.replace(partial, self.path)


def sequence_logits(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 16384
) -> torch.Tensor:
    """Logits `(N, K)` of a classifier, float32 on the CPU, of N token sequences, batched like those of `features`."""
    padding = model.config.get_text_config().pad_token_id
    logits: list[torch.Tensor | None] = [None] * len(token_ids)
    with eval_mode(model), torch.inference_mode():
        for places in in_batches(list(map(len, token_ids)), batch_tokens, "Scoring texts"):
            ids, mask = _padded([token_ids[place] for place in places], padding)
            inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            for place, row in zip(places, model(**inputs, use_cache=False).logits.float().cpu(), strict=True):
                logits[place] = row
    return torch.stack(logits)


def pair_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Pair], max_length: int | None
) -> torch.Tensor:
    """`(N, 2)` probabilities of a reward model that `chosen` and that `rejected` is the better one of a pair.

    Texts end as in training; longer ones than `max_length` tokens are cut at the end, where training drops them.
    """
    texts = [row.chosen for row in rows] + [row.rejected for row in rows]
    end = end_token(tokenizer)
    ended = [text if text.endswith(end) else text + end for text in texts]
    token_ids = tokenizer(ended, truncation=max_length is not None, max_length=max_length)["input_ids"]
    rewards = sequence_logits(model, token_ids).squeeze(-1).double()
    return torch.stack([rewards[: len(rows)], rewards[len(rows) :]], dim=1).softmax(dim=1)
