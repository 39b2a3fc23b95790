"""Batches of CodecLM's pairs: templated, the prompt masked, padded, and weighed by row where that is asked for."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from ..core.training.encoding import end_token_id, pad_rows
from .weighted_loss import LOSS_WEIGHTS, WEIGHT_BY, Pair, RowWeighing, raw_weight, read_pair


IGNORED = -100


@dataclass
class DataCollatorForCodecLM(DataCollatorMixin):
    """Makes batches of rows as CodecLM exports them, for `SFTTrainer`, `Trainer` and loops of your own.

    A row has one of these forms, looked for in this order; other columns are left alone:

    - `input_ids`, with `labels` or `completion_mask`: prepared already, as `SFTTrainer` does. Taken as they are.
    - `prompt` and `completion`, both lists of messages, or both texts (plain, or templated already: a beginning or
      end of sequence that is there is not added again). The completion is learned.
    - `messages`: the assistant's turns at its end are learned, earlier ones are not.
    - `text`, templated already: what follows the last mark that begins an assistant's turn is learned.

    Without weights, batches are those of `SFTTrainer` and its own collator, token for token. With weights there is
    `loss_weights` too; give the trainer `callbacks=[WeightedLoss()]` (`trl_extensions.codeclm.weighted_loss`), and
    `remove_unused_columns=False` so that scores and metadata come this far.

    Args:
        tokenizer: The model's. Without a padding token, its end of sequence fills up.
        weight_by: `None`, or what the loss of a row is multiplied by: "gap", the size of `scores.gap` within
            `gap_range`; "metadata", one over the number of rows with its use case and skills.
        gap_range: Smallest and largest weight by gap, before they are rescaled.
        mean_over: What the mean of the weights is 1 over: the "batch", or the "data" given to `fit`, which does not
            depend on how a step is cut into batches: a batch of one row weighs 1 whatever its gap is.
        pair_counts: Rows of each pair of use case and skills (`weighted_loss.pair_of`), in place of `fit`. Pairs that
            are not in it, as held-out data may have, weigh as one of a single row.
        max_length: Tokens of a row that are kept, from the start, as in `SFTConfig`; `None`: all. Does not apply to
            rows with `input_ids`.
        chat_template: Jinja template used in place of the tokenizer's.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Returns (by calling it on a list of B rows, T being the longest, in tokens):
        `input_ids`, `attention_mask` and `labels` `(B, T)`, int64, padded on the right, labels -100 where nothing is
        learned; with `weight_by`, `loss_weights` `(B,)`, float32.

    Raises:
        ValueError: An argument out of range, a row that cannot be read (its place and id), or weights without `fit`.
    """

    tokenizer: PreTrainedTokenizerBase
    weight_by: str | None = None
    gap_range: tuple[float, float] = (1.0, 6.0)
    mean_over: str = "batch"
    pair_counts: Mapping[Pair, int] | None = None
    max_length: int | None = 1024
    chat_template: str | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self):
        if self.weight_by not in WEIGHT_BY:
            raise ValueError(f'`weight_by` must be None, "gap" or "metadata", got {self.weight_by!r}.')
        if self.mean_over not in ("batch", "data"):
            raise ValueError(f'`mean_over` must be "batch" or "data", got {self.mean_over!r}.')
        low, high = self.gap_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"`gap_range` must be two finite numbers, 0 < low <= high, got {self.gap_range!r}.")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ValueError(f"`max_length` must be None or a whole number of at least 2, got {self.max_length!r}.")
        pad_id = self.tokenizer.pad_token_id
        self._pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        if self._pad_id is None:
            raise ValueError("The tokenizer has neither a padding nor an end token: set `tokenizer.pad_token`.")
        self._data_mean: float | None = None

    def fit(self, dataset: Iterable[Mapping[str, Any]]) -> "DataCollatorForCodecLM":
        """Count the pairs of the data that is trained on (exported rows: a `Dataset` or a list), and take the mean of
        its weights; returns this collator. Raises `ValueError`, naming the row, where one has nothing to weigh by."""
        if self.weight_by is None:
            return self
        if isinstance(dataset, Dataset):  # reading the texts of a large data set takes long
            names = [name for name in ("scores", "metadata", "lineage") if name in dataset.column_names]
            dataset = dataset.select_columns(names) if names else dataset
        rows = {f"row {place}": row for place, row in enumerate(dataset)}
        if not rows:
            raise ValueError("There are no rows to weigh.")
        if self.weight_by == "metadata":
            self.pair_counts = Counter(_of_row(read_pair, row, name) for name, row in rows.items())
        self._data_mean = math.fsum(self._raw_weights(rows)) / len(rows)
        return self

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = {f"row {place} of the batch": row for place, row in enumerate(examples)}
        encoded = [_of_row(self._encode, row, name) for name, row in rows.items()]
        batch = {
            "input_ids": pad_rows([ids for ids, _ in encoded], self._pad_id, self.pad_to_multiple_of),
            "attention_mask": pad_rows([[1] * len(ids) for ids, _ in encoded], 0, self.pad_to_multiple_of),
            "labels": pad_rows([labels for _, labels in encoded], IGNORED, self.pad_to_multiple_of),
        }
        if self.weight_by is not None:
            batch[LOSS_WEIGHTS] = self._weights(rows)
        return batch

    def _raw_weights(self, rows: Mapping[str, Any]) -> list[float]:
        if self.weight_by == "metadata" and self.pair_counts is None:
            raise ValueError('weight_by="metadata" counts pairs: call `collator.fit(train_dataset)` first.')
        own: dict[str, Any] = {"by": self.weight_by, "gap_range": self.gap_range, "counts": self.pair_counts or {}}
        return [_of_row(partial(raw_weight, **own), row, name) for name, row in rows.items()]

    def _weights(self, rows: Mapping[str, Any]) -> torch.Tensor:
        if self.mean_over == "data" and self._data_mean is None:
            raise ValueError('mean_over="data" needs the data: call `collator.fit(train_dataset)` first.')
        if self.mean_over == "batch" and len(rows) == 1:
            warnings.warn('a batch of one row weighs 1, by whatever: take mean_over="data"', stacklevel=3)
        if not RowWeighing.active and get_worker_info() is None:
            warnings.warn(
                f"batches have `{LOSS_WEIGHTS}`, which no trainer looks at by itself: give it "
                "callbacks=[WeightedLoss()], or use `weighted_loss` in your own loop",
                stacklevel=3,
            )
        raw = self._raw_weights(rows)
        mean: Any = self._data_mean if self.mean_over == "data" else math.fsum(raw) / len(raw)
        return torch.tensor([weight / mean for weight in raw], dtype=torch.float32)

    def _encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids of a row and its labels, as `SFTTrainer` makes them."""
        if row.get("input_ids") is not None:
            ids, labels = _prepared(row)
        else:
            prompt, completion = self._split(row)
            encode = self._encode_texts if isinstance(prompt, str) else self._encode_chat
            before, ids = encode(prompt, completion, row)
            # The answer begins where the two part ways: a template may render a prompt alone in another way
            pairs = enumerate(zip(before, ids, strict=False))
            start = next((place for place, (one, two) in pairs if one != two), min(len(before), len(ids)))
            labels = ([IGNORED] * start + ids[start:])[: self.max_length]
            ids = ids[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            limit = f" within the first {self.max_length} tokens (max_length)" if self.max_length else ""
            raise ValueError(f"nothing is left to learn{limit}; shorten the prompt, raise max_length or drop the row")
        return ids, labels

    def _split(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """What is given and what is learned, two texts or two lists of messages, whatever the form of the row."""
        get: Any = row.get
        prompt, completion, messages, text = map(get, ("prompt", "completion", "messages", "text"))
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise ValueError("`completion` is empty")
            return prompt, completion
        if prompt is not None or completion is not None:
            _check_chat("prompt", prompt, completion)
            _check_chat("completion", completion, prompt)
            return list(prompt), list(completion)
        if messages is not None:
            _check_chat("messages", messages, messages)
            start = max((i for i, message in enumerate(messages, 1) if message["role"] != "assistant"), default=0)
            if not start:
                raise ValueError("`messages` has no turn before the answer")
            return list(messages[:start]), list(messages[start:])
        if isinstance(text, str):
            opener = self._opener
            start = text.rfind(opener) + len(opener)
            if start < len(opener):
                raise ValueError(f"`text` has no answer: {opener!r}, which begins one in this template, is not in it")
            return text[:start], text[start:]
        there = sorted(name for name, value in row.items() if value is not None)
        raise ValueError(f"neither `prompt` and `completion`, nor `messages`, `text` or `input_ids`; it has {there}")

    def _encode_texts(self, prompt: str, completion: str, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Of plain or templated text: an end is added where there is none, a beginning is not repeated."""
        tokenizer: Any = self.tokenizer
        end = tokenizer.decode([end_token_id(tokenizer, conversational=True)])
        if not completion.rstrip().endswith((tokenizer.eos_token, end)):
            completion += tokenizer.eos_token
        special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        before, ids = (tokenizer(text=text, add_special_tokens=special) for text in (prompt, prompt + completion))
        return list(before["input_ids"]), list(ids["input_ids"])

    def _encode_chat(self, prompt: list, completion: list, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        tokenizer: Any = self.tokenizer
        if not (self.chat_template or tokenizer.chat_template):
            raise ValueError("a chat, but the tokenizer has no chat template: set one, or give texts")
        tools = row.get("tools")
        options = {
            **(row.get("chat_template_kwargs") or {}),  # which set no other template
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "return_dict": True,
        }
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        return list(before), list(tokenizer.apply_chat_template(prompt + completion, **options)["input_ids"])

    @cached_property
    def _opener(self) -> str:
        """What the template writes before an answer."""
        opener = ""
        if self.chat_template or self.tokenizer.chat_template:
            render = partial(self.tokenizer.apply_chat_template, [{"role": "user", "content": "a"}], tokenize=False)
            bare = str(render(chat_template=self.chat_template))
            whole = str(render(chat_template=self.chat_template, add_generation_prompt=True))
            opener = whole.removeprefix(bare) if whole.startswith(bare) else ""
        if not opener.strip():
            raise ValueError("`text` alone does not tell where the answer begins; give `prompt` and `completion`")
        return opener


def _prepared(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
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


def _check_chat(name: str, value: Any, other: Any) -> None:
    """Refuse what is no list of messages with text, the last of them an assistant's but for a prompt."""
    if not isinstance(value, list | tuple) or not value:
        both = ", or both as texts" if isinstance(value, str) or isinstance(other, str) else ""
        raise ValueError(f"`{name}` must be a list of messages{both}, got {value!r:.60}")
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(role, str) or not (isinstance(content, str) or message.get("tool_calls")):
            raise ValueError(f"a message of `{name}` needs the texts `role` and `content`, got {message!r:.80}")
    if name != "prompt" and value[-1]["role"] != "assistant":
        raise ValueError(f"`{name}` ends with the turn of {value[-1]['role']!r}; there is no answer to learn")
    if name != "prompt" and not (value[-1].get("content") or "").strip() and not value[-1].get("tool_calls"):
        raise ValueError(f"the answer that ends `{name}` is empty")


def _of_row(read: Callable[[Mapping[str, Any]], Any], row: Any, name: str) -> Any:
    """What `read` makes of a row; where it cannot be read, an error that says which one it is."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}: not an object with named columns, but {type(row).__name__}.")
    try:
        return read(row)
    except ValueError as error:
        lineage = row.get("lineage")
        own = lineage.get("id") if isinstance(lineage, Mapping) else None
        raise ValueError(f"{name}{f' ({own})' if own else ''}: {error}.") from error
