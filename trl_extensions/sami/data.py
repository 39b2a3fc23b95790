"""From rows of prompts and responses to token ids: what `SAMITrainer` does to a dataset before the first step."""

import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..core.training.encoding import encode_completion, encode_prompt, end_token_id
from .templates import TRAINING_TEMPLATE, render


logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ["prompt_input_ids", "completion_input_ids"]


def prepare_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: str,
    prompt_template: str | None = None,
    name: str = "train",
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise SAMI rows. Idempotent: a dataset that has the token columns already is returned as it is.

    Args:
        dataset: Rows with `prompts` and `completions` (lists of C), or `query`, `constitutions` and `completions`.
            `completions[j]` was sampled under `prompts[j]`. Texts or chat messages. An optional `truncated` column
            (C bools) marks responses cut off by the sampler, which then get no end token. Rows with `kept` false, as
            the sampler marks what its filters drop, are left out.
        tokenizer: The trainer's tokenizer.
        max_length: Limit on the tokens of a prompt and a response together, or None.
        overflow: `"error"`, `"drop"` or `"truncate"` for rows beyond `max_length`.
        prompt_template: Rendering of `query` and `constitutions`.
        name: The dataset's name in messages.
        num_proc: Processes for `Dataset.map`.

    Returns:
        The dataset with `prompt_input_ids` (C lists of token ids) and `completion_input_ids` (C lists).

    Raises:
        ValueError: A row or column that cannot be used; the message names it and says what to do.
    """
    if set(TOKEN_COLUMNS) <= set(dataset.column_names):
        return dataset
    _check_columns(dataset.column_names, name)
    dataset = _without_rejected(dataset, name)
    end_ids = {conversational: end_token_id(tokenizer, conversational) for conversational in (False, True)}

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{name} row {index}"
        row = _as_prompts(row, where, tokenizer, prompt_template or TRAINING_TEMPLATE)
        _check_row(row, where)
        tokens = _tokenize_row(row, where, tokenizer, end_ids)
        excess = _excess(tokens, max_length)
        if excess > 0 and overflow == "error":
            raise ValueError(
                f"{where}: its longest prompt and response together are {excess} tokens over max_length={max_length}. "
                'Raise `max_length`, or set `overflow` to "drop" or "truncate".'
            )
        if excess > 0 and overflow == "truncate":
            tokens = _truncate(tokens, max_length, where)
        return {**tokens, "prompts": row["prompts"], "overflow": max(excess, 0)}

    tokenized = dataset.map(tokenize, with_indices=True, num_proc=num_proc, desc=f"Tokenizing {name} dataset")
    return _settle_overflow(tokenized, max_length, overflow, name)


def _without_rejected(dataset: Dataset, name: str) -> Dataset:
    """Leave out what the sampler's filters dropped: its file holds those rows too, with `kept` false."""
    if "kept" not in dataset.column_names:
        return dataset
    kept = [i for i, flag in enumerate(dataset["kept"]) if flag]
    if len(kept) == len(dataset):
        return dataset
    if not kept:
        raise ValueError(
            f"No {name} row is left: all {len(dataset)} are marked `kept: false` by the sampler's filters."
        )
    logger.warning(
        "%d of %d %s rows are marked `kept: false` and left out.", len(dataset) - len(kept), len(dataset), name
    )
    return dataset.select(kept)


def _check_columns(columns: list[str], name: str) -> None:
    if "images" in columns or "image" in columns:
        raise ValueError(f"The {name} dataset has images, which SAMI does not support: use text columns.")
    if "completions" not in columns or not ("prompts" in columns or {"query", "constitutions"} <= set(columns)):
        raise ValueError(
            f"The {name} dataset has the columns {columns}; SAMI needs `prompts` and `completions`, or `query`, "
            "`constitutions` and `completions` (each but `query` a list with one entry per constitution)."
        )


def _as_prompts(row: dict, where: str, tokenizer: PreTrainedTokenizerBase, template: str) -> dict:
    if row.get("prompts") is not None:
        return row
    if not isinstance(row["query"], str) or not isinstance(row["constitutions"], list):
        raise ValueError(f"{where}: `query` must be a text and `constitutions` a list of texts.")
    prompts = [render(template, query=row["query"], constitution=text) for text in row["constitutions"]]
    if tokenizer.chat_template is not None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return {**row, "prompts": prompts}


def _text_of(completion: Any, where: str, j: int) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and len(completion) == 1 and completion[0].get("role") == "assistant":
        return completion[0].get("content") or ""
    raise ValueError(
        f"{where}: `completions[{j}]` must be a text or a list holding one assistant message, got {completion!r:.80}."
    )


def _check_row(row: dict, where: str) -> None:
    prompts, completions = row["prompts"], row["completions"]
    if not isinstance(prompts, list) or not isinstance(completions, list):
        raise ValueError(f"{where}: `prompts` and `completions` must be lists, one entry per constitution.")
    if len(prompts) != len(completions):
        raise ValueError(
            f"{where}: {len(prompts)} prompts but {len(completions)} completions; completions[j] must be the response "
            "sampled under prompts[j]."
        )
    if len(prompts) < 2:
        raise ValueError(
            f"{where}: a single constitution leaves nothing to contrast: give at least 2, or drop the row."
        )
    if all(prompt == prompts[0] for prompt in prompts):
        raise ValueError(f"{where}: all prompts are equal, so no response can be told apart: vary the constitutions.")
    for j, completion in enumerate(completions):
        if not _text_of(completion, where, j).strip():
            raise ValueError(f"{where}: `completions[{j}]` is empty: drop the row or sample it again.")
    truncated = row.get("truncated")
    if truncated is not None and len(truncated) != len(completions):
        raise ValueError(f"{where}: `truncated` has {len(truncated)} entries for {len(completions)} completions.")


def _tokenize_row(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase, end_ids: dict[bool, int]
) -> dict[str, list[list[int]]]:
    prompts, count = row["prompts"], len(row["prompts"])
    truncated = row.get("truncated") or [False] * count
    end_id = end_ids[not isinstance(prompts[0], str)]
    return {
        "prompt_input_ids": [encode_prompt(tokenizer, prompts[k], f"{where}: `prompts[{k}]`") for k in range(count)],
        # Tokenised alone: the same tokens then follow every one of the C prompts
        "completion_input_ids": [
            encode_completion(tokenizer, _text_of(row["completions"][j], where, j), end_id, truncated=truncated[j])
            for j in range(count)
        ],
    }


def _excess(tokens: dict, max_length: int | None) -> int:
    if max_length is None:
        return 0
    longest = max(map(len, tokens["prompt_input_ids"])) + max(map(len, tokens["completion_input_ids"]))
    return longest - max_length


def _truncate(tokens: dict, max_length: int, where: str) -> dict:
    room = max_length - max(map(len, tokens["prompt_input_ids"]))
    if room < 1:
        raise ValueError(
            f"{where}: its longest prompt alone fills max_length={max_length}, which leaves no room for a response: "
            'raise `max_length`, or set `overflow` to "drop".'
        )
    return {**tokens, "completion_input_ids": [ids[:room] for ids in tokens["completion_input_ids"]]}


def _settle_overflow(dataset: Dataset, max_length: int | None, overflow: str, name: str) -> Dataset:
    too_long = [i for i, excess in enumerate(dataset["overflow"]) if excess > 0]
    dataset = dataset.remove_columns("overflow")
    if not too_long:
        return dataset
    verb = "dropped" if overflow == "drop" else "had responses cut short"
    logger.warning(
        "%d of %d %s rows are longer than max_length=%s and were %s (first: row %d).",
        len(too_long), len(dataset), name, max_length, verb, too_long[0],
    )  # fmt: skip
    if overflow == "drop":
        kept = sorted(set(range(len(dataset))) - set(too_long))
        if not kept:
            raise ValueError(f"All {len(dataset)} {name} rows are longer than max_length={max_length}: raise it.")
        dataset = dataset.select(kept)
    return dataset
