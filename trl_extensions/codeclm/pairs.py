"""From a row of data to tokens: the forms a row may have, what of it is learned, and why it cannot be read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.training.encoding import end_token_id


IGNORED = -100


@dataclass(frozen=True)
class PairEncoder:
    """Tokenises rows as `SFTTrainer` does, the prompt masked.

    Args:
        tokenizer: The model's.
        max_length: Tokens kept, from the start; all of them when left out.
        chat_template: Used in place of the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    chat_template: str | None = None

    def encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids of a row and its labels, -100 on what is not learned.

        Raises:
            ValueError: What is wrong with the row and what to do about it; not which row it is.
        """
        if row.get("input_ids") is not None:
            ids, labels = self._tokenised(row)
        else:
            ids, start = self._ids_and_start(row)
            labels = ([IGNORED] * start + ids[start:])[: self.max_length]
            ids = ids[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            limit = f" within the first {self.max_length} tokens (max_length)" if self.max_length else ""
            raise ValueError(f"nothing is left to learn{limit}; shorten the prompt, raise max_length or drop the row")
        return ids, labels

    def _tokenised(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """A row that a trainer prepared: its labels and its length stand."""
        if row.get("seq_lengths") is not None:
            raise ValueError("`seq_lengths` says that rows were packed into one; leave `packing` off")
        ids = [int(token) for token in row["input_ids"]]
        labels = row.get("labels")
        if labels is None and row.get("completion_mask") is not None:
            labels = [token if of else IGNORED for token, of in zip(ids, row["completion_mask"], strict=False)]
        labels = ids if labels is None else [int(label) for label in labels]
        if len(labels) != len(ids):
            raise ValueError(f"{len(ids)} `input_ids` but {len(labels)} labels; give one for each token")
        return ids, labels

    def _ids_and_start(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        """Token ids, and the place of the first that is learned."""
        if row.get("prompt") is not None or row.get("completion") is not None:
            prompt, completion = row.get("prompt"), row.get("completion")
            if isinstance(prompt, str) and isinstance(completion, str):
                if not completion.strip():
                    raise ValueError("`completion` is empty")
                return self._texts(prompt, completion)
            _check_chat("prompt", prompt, completion)
            _check_chat("completion", completion, prompt)
            return self._chat(prompt, completion, row)
        if row.get("messages") is not None:
            messages = row["messages"]
            _check_chat("messages", messages, messages)
            return self._chat(*_split(messages), row)
        if isinstance(row.get("text"), str):
            opener = self._opener
            start = row["text"].rfind(opener) + len(opener)
            if start < len(opener):
                raise ValueError(f"`text` has no answer: {opener!r}, which begins one in this template, is not in it")
            return self._texts(row["text"][:start], row["text"][start:])
        raise ValueError(
            "neither `prompt` and `completion`, nor `messages`, `text` or `input_ids`; it has "
            f"{sorted(name for name, value in row.items() if value is not None)}"
        )

    def _texts(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Plain or already templated text: an end is added where there is none, a beginning is not repeated."""
        tokenizer = self.tokenizer
        if not completion.rstrip().endswith(self._ends):
            completion += tokenizer.eos_token
        with_special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        ids = list(tokenizer(text=prompt + completion, add_special_tokens=with_special)["input_ids"])
        own = tokenizer(text=prompt, add_special_tokens=with_special)["input_ids"]
        return ids, _common_length(own, ids)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        end = self.tokenizer.decode([end_token_id(self.tokenizer, conversational=True)])
        return self.tokenizer.eos_token, end

    def _chat(self, prompt: list, completion: list, row: Mapping[str, Any]) -> tuple[list[int], int]:
        tools = row.get("tools")
        options = {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "return_dict": True,
            **(row.get("chat_template_kwargs") or {}),
        }
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ValueError(
                "a chat, but the tokenizer has no chat template; set tokenizer.chat_template, or give `prompt` and "
                "`completion` as texts"
            )
        own = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        ids = list(self.tokenizer.apply_chat_template(prompt + completion, **options)["input_ids"])
        return ids, _common_length(own, ids)

    @cached_property
    def _opener(self) -> str:
        """What the template writes before an answer."""
        options = {"chat_template": self.chat_template, "tokenize": False}
        opener = ""
        if self.chat_template or self.tokenizer.chat_template:
            probe = [{"role": "user", "content": "a"}]
            bare = self.tokenizer.apply_chat_template(probe, **options)
            opener = self.tokenizer.apply_chat_template(probe, add_generation_prompt=True, **options)
            opener = opener[len(bare) :] if opener.startswith(bare) else ""
        if not opener.strip():
            raise ValueError(
                "`text` alone does not tell where the answer begins, for the chat template has no mark of its own "
                "there; give `prompt` and `completion`"
            )
        return opener


def _check_chat(name: str, value: Any, other: Any) -> None:
    """Raise `ValueError` unless a value is a list of messages with text, the last of a completion an assistant's."""
    if not isinstance(value, list | tuple) or not value:
        both = ", or both as texts" if isinstance(value, str) or isinstance(other, str) else ""
        raise ValueError(f"`{name}` must be a list of messages{both}, got {value!r:.60}")
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(role, str) or not (isinstance(content, str) or message.get("tool_calls")):
            raise ValueError(f"a message of `{name}` needs the texts `role` and `content`, got {message!r:.80}")
    if name == "prompt":
        return
    if value[-1]["role"] != "assistant":
        raise ValueError(f"`{name}` ends with the turn of {value[-1]['role']!r}; there is no answer to learn")
    if not (value[-1].get("content") or "").strip() and not value[-1].get("tool_calls"):
        raise ValueError(f"the answer that ends `{name}` is empty")


def _split(messages: list) -> tuple[list, list]:
    """The assistant's messages at the end of a conversation, and what comes before them."""
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    if not start:
        raise ValueError("`messages` has no turn before the answer")
    return list(messages[:start]), list(messages[start:])


def _common_length(ids: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with alike: a template may render a prompt alone in another way."""
    pairs = enumerate(zip(ids, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(ids), len(other)))
