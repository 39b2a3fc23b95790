"""Batches of CodecLM's pairs: templated, the prompt masked, padded, and weighed by row where that is asked for."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from ..core.training.encoding import end_token_id, pad_rows
from .weighted_loss import LOSS_WEIGHTS, WEIGHT_BY, Pair, RowWeighing, count_pairs, mean_one, raw_weight, read_pair


IGNORED = -100
MEAN_OVER = ("batch", "data")


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
            `gap_range`; "metadata", one over the number of rows with its use case and skills, so that each such pair
            counts alike, however many rows it has.
        gap_range: Smallest and largest weight by gap, before they are rescaled. Pairs kept at the published threshold
            have gaps above 3; by default none counts more than twice as much as another then.
        mean_over: What the mean of the weights is 1 over: the "batch", or the "data" given to `fit`. A batch of one
            row weighs 1 whatever its gap is, so with batches of a few rows, accumulated or spread over devices, take
            "data": it does not depend on how a step is cut.
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
        ValueError: An argument out of range; a row that cannot be read, with its place in the batch and its id; or
            weights that need `fit` first.
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
        if self.mean_over not in MEAN_OVER:
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
        if hasattr(dataset, "column_names"):  # reading the texts of a large data set takes long
            names = [name for name in ("scores", "metadata", "lineage") if name in (dataset.column_names or [])]
            dataset = dataset.select_columns(names) if names else dataset
        rows = list(dataset)
        if not rows:
            raise ValueError("There are no rows to weigh.")
        if self.weight_by == "metadata":
            self.pair_counts = count_pairs(_of_row(read_pair, row, f"row {i}") for i, row in enumerate(rows))
        self._data_mean = math.fsum(self._raw(row, f"row {i}") for i, row in enumerate(rows)) / len(rows)
        return self

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = [f"row {place} of the batch" for place in range(len(examples))]
        encoded = [_of_row(self._encode, row, name) for row, name in zip(examples, names, strict=True)]
        batch = {
            "input_ids": pad_rows([ids for ids, _ in encoded], self._pad_id, self.pad_to_multiple_of),
            "attention_mask": pad_rows([[1] * len(ids) for ids, _ in encoded], 0, self.pad_to_multiple_of),
            "labels": pad_rows([labels for _, labels in encoded], IGNORED, self.pad_to_multiple_of),
        }
        if self.weight_by is not None:
            raw = [self._raw(row, name) for row, name in zip(examples, names, strict=True)]
            batch[LOSS_WEIGHTS] = torch.tensor(self._rescaled(raw), dtype=torch.float32)
        return batch

    # Weights

    def _raw(self, row: Mapping[str, Any], name: str) -> float:
        if self.weight_by == "metadata" and self.pair_counts is None:
            raise ValueError(
                'weight_by="metadata" needs to know how many rows each pair has: call `collator.fit(train_dataset)` '
                "first, or give `pair_counts`."
            )
        return _of_row(lambda r: raw_weight(r, self.weight_by, self.gap_range, self.pair_counts or {}), row, name)

    def _rescaled(self, raw: list[float]) -> list[float]:
        if self.mean_over == "data" and self._data_mean is None:
            raise ValueError('mean_over="data" needs the data: call `collator.fit(train_dataset)` first.')
        if self.mean_over == "batch" and len(raw) == 1:
            warnings.warn(
                'a batch of one row weighs 1, whatever it is weighed by: take mean_over="data"', stacklevel=2
            )
        if not RowWeighing.active and get_worker_info() is None:
            warnings.warn(
                f"batches have `{LOSS_WEIGHTS}`, which no trainer looks at by itself: give it "
                "callbacks=[WeightedLoss()], or use `weighted_loss` in your own loop",
                stacklevel=2,
            )
        return mean_one(raw, self._data_mean if self.mean_over == "data" else None)

    # From a row to tokens, as `SFTTrainer` makes them

    def _encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids of a row and its labels."""
        if row.get("input_ids") is not None:
            ids, labels = _prepared(row)
        else:
            ids, start = self._ids_and_start(row)
            labels = ([IGNORED] * start + ids[start:])[: self.max_length]
            ids = ids[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            limit = f" within the first {self.max_length} tokens (max_length)" if self.max_length else ""
            raise ValueError(f"nothing is left to learn{limit}; shorten the prompt, raise max_length or drop the row")
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
            return self._chat(list(prompt), list(completion), row)
        if row.get("messages") is not None:
            messages = row["messages"]
            _check_chat("messages", messages, messages)
            start = max((i for i, message in enumerate(messages, 1) if message["role"] != "assistant"), default=0)
            if not start:
                raise ValueError("`messages` has no turn before the answer")
            return self._chat(list(messages[:start]), list(messages[start:]), row)
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
        end = tokenizer.decode([end_token_id(tokenizer, conversational=True)])
        if not completion.rstrip().endswith((tokenizer.eos_token, end)):
            completion += tokenizer.eos_token
        with_special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        ids = list(tokenizer(text=prompt + completion, add_special_tokens=with_special)["input_ids"])
        return ids, _common_length(tokenizer(text=prompt, add_special_tokens=with_special)["input_ids"], ids)

    def _chat(self, prompt: list, completion: list, row: Mapping[str, Any]) -> tuple[list[int], int]:
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ValueError(
                "a chat, but the tokenizer has no chat template; set tokenizer.chat_template, or give `prompt` and "
                "`completion` as texts"
            )
        tools = row.get("tools")
        options = {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "return_dict": True,
            **(row.get("chat_template_kwargs") or {}),
        }
        own = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        ids = list(self.tokenizer.apply_chat_template(prompt + completion, **options)["input_ids"])
        return ids, _common_length(own, ids)

    @cached_property
    def _opener(self) -> str:
        """What the template writes before an answer."""
        opener = ""
        if self.chat_template or self.tokenizer.chat_template:
            options = {"chat_template": self.chat_template, "tokenize": False}
            probe = [{"role": "user", "content": "a"}]
            bare = self.tokenizer.apply_chat_template(probe, **options)
            whole = self.tokenizer.apply_chat_template(probe, add_generation_prompt=True, **options)
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


def _common_length(ids: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with alike: a template may render a prompt alone in another way."""
    pairs = enumerate(zip(ids, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(ids), len(other)))


def _of_row(read: Callable[[Mapping[str, Any]], Any], row: Any, name: str) -> Any:
    """What `read` makes of a row; where it cannot be read, an error that says which one it is."""
    try:
        if not isinstance(row, Mapping):
            raise ValueError(f"not an object with named columns, but {type(row).__name__}")
        return read(row)
    except ValueError as error:
        lineage = row.get("lineage") if isinstance(row, Mapping) else None
        own = lineage.get("id") if isinstance(lineage, Mapping) else None
        raise ValueError(f"{name}{f' ({own})' if own else ''}: {error}.") from error
