"""What a linear probe looks at: the pooled state of each text under a frozen backbone, computed once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...core.modeling.batches import Throughput, eval_mode, plan_batches


def head_of(model: PreTrainedModel) -> nn.Module:
    """The linear head that reads the last token's state.

    Raises:
        ValueError: The model pools in another way.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"`linear_probe` needs a model whose head is a linear layer `score` on the last token, which "
            f"{type(model).__name__} is not: set it to False and freeze the backbone yourself."
        )
    return head


def features(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 16384, progress: bool = True
) -> np.ndarray:
    """States that the `score` head reads: of the last token that is not padding, as transformers pools them.

    Args:
        model: Sequence classification model with a `score` head, unwrapped; its modes are the same afterwards.
        token_ids: N token sequences, one token at least each.
        batch_tokens: Most tokens in a batch, padding included; a longer text goes alone.
        progress: Show a progress bar.

    Returns:
        `(N, H)` float32, in the order of the texts.

    Raises:
        ValueError: The model pools in another way.
    """
    head_of(model)
    backbone = getattr(model, model.base_model_prefix)
    device = backbone.get_input_embeddings().weight.device
    pad = model.config.get_text_config().pad_token_id
    states = np.zeros((len(token_ids), model.config.get_text_config().hidden_size), dtype=np.float32)
    with (
        eval_mode(model),
        torch.inference_mode(),
        tqdm(total=len(token_ids), desc="Computing features", disable=not progress) as bar,
    ):
        count = Throughput(bar)
        for rows in plan_batches([len(ids) for ids in token_ids], 0, batch_tokens):
            states[rows] = _pooled(backbone, [token_ids[row] for row in rows], pad, device)
            count.add([len(token_ids[row]) for row in rows])
            bar.update(len(rows))
    return states


def _pooled(backbone: nn.Module, rows: list[Sequence[int]], pad: int | None, device: torch.device) -> np.ndarray:
    lengths = torch.tensor([len(ids) for ids in rows])
    places = torch.arange(int(lengths.max()))
    mask = (places < lengths[:, None]).long()
    ids = torch.full(mask.shape, 0 if pad is None else pad)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.as_tensor(tokens)
    # A text may end in the padding token itself, which then does not count
    counted = mask.bool() if pad is None else ids != pad
    last = (places * counted).argmax(dim=-1)
    states = backbone(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, return_dict=True
    ).last_hidden_state
    return states[torch.arange(len(rows), device=states.device), last.to(states.device)].float().cpu().numpy()
