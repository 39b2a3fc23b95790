"""How prompts and ends become tokens and batches: one place for training, scoring and sampling."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


_MARKER = "Xq7"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], where: str) -> list[int]:
    """Token ids of a text, or of a chat up to the start of the assistant's turn, after which a response begins.

    Text that brings its own beginning-of-sequence token (a rendered template) does not get a second one. `ValueError`,
    in which the prompt is called `where`, for a chat without a template, or a prompt without tokens.
    """
    if isinstance(prompt, str):
        has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = list(tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"])
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()  # of a tokenizer that closes every text
    elif not tokenizer.chat_template:
        raise ValueError(f"{where} is a chat, but the tokenizer has no chat template: set it, or give text prompts")
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError(f"{where} is empty: a response needs at least one token before it")
    return list(ids)


def end_token_id(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> int:
    """The token a finished response ends with: the end-of-sequence token or, for a chat, what the template puts behind
    an assistant's message (`<end_of_turn>` or `<|end|>` with some models, which never write the other one there)."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token: set `tokenizer.eos_token`.")
    if not conversational or not tokenizer.chat_template:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARKER}]
    behind = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_MARKER)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else tokenizer.eos_token_id


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, text: str, end_id: int, *, truncated: bool = False
) -> list[int]:
    """Token ids of a response, tokenised alone, with its end unless the sampler cut it off before it came to one."""
    ids = list(tokenizer(text.removesuffix(str(tokenizer.decode([end_id]))), add_special_tokens=False)["input_ids"])
    return ids if truncated and ids else [*ids, end_id]


def pad_rows(rows: Sequence[Sequence[int]], value: int, multiple_of: int | None = None) -> torch.Tensor:
    """Rows as one int64 tensor, filled up with `value` on the right, to a multiple of a number where one is given."""
    longest = max(map(len, rows))
    length = longest if multiple_of is None else -(-longest // multiple_of) * multiple_of
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
