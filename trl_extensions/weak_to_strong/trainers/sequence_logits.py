"""What a sequence classification model makes of token sequences, a few at a time."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..._compat import pad
from ...core.modeling.batches import Throughput, eval_mode, plan_batches
from ..data.examples import Pair


def sequence_logits(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 16384
) -> torch.Tensor:
    """Logits of whole sequences, in batches of like lengths.

    Args:
        model: Sequence classification model or PEFT model of one; its modes are the same afterwards.
        token_ids: N token sequences, one token at least each.
        batch_tokens: Most tokens in a batch, padding included; a longer sequence goes alone.

    Returns:
        `(N, K)` float32 on the CPU, in the order of the sequences.
    """
    padding = model.config.get_text_config().pad_token_id
    logits: list[torch.Tensor | None] = [None] * len(token_ids)
    with eval_mode(model), torch.inference_mode(), tqdm(total=len(token_ids), desc="Scoring texts") as bar:
        count = Throughput(bar)
        for places in plan_batches([len(ids) for ids in token_ids], 0, batch_tokens):
            rows = [torch.as_tensor(token_ids[place]) for place in places]
            inputs = {
                "input_ids": pad(rows, padding_value=padding, padding_side="right"),
                "attention_mask": pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="right"),
            }
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            for place, row in zip(places, model(**inputs, use_cache=False).logits.float().cpu(), strict=True):
                logits[place] = row
            count.add([len(row) for row in rows])
            bar.update(len(places))
    return torch.stack(logits)


def pair_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Pair], max_length: int | None
) -> torch.Tensor:
    """What a reward model makes of pairs: `(N, 2)` probabilities that `chosen` and that `rejected` is the better one.

    Texts end as in training; longer ones than `max_length` tokens are cut at the end, where training drops them.
    """
    texts = [row.chosen for row in rows] + [row.rejected for row in rows]
    ended = [text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token for text in texts]
    token_ids = tokenizer(ended, truncation=max_length is not None, max_length=max_length)["input_ids"]
    rewards = sequence_logits(model, token_ids).squeeze(-1).double()
    return torch.stack([rewards[: len(rows)], rewards[len(rows) :]], dim=1).softmax(dim=1)
