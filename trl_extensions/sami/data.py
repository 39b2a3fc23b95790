"""SAMI's rows: how a query becomes a prompt, where rows are read from, how they become token ids for the trainer."""

import logging
import os
import string
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..core import inputs
from ..core.generation.types import Prompt
from ..core.runs.jsonl import read_jsonl
from ..core.training.encoding import encode_completion, encode_prompt, end_token_id


logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ["prompt_input_ids", "completion_input_ids"]
TRAINING_TEMPLATE = "Question: {query}\n\nWrite an answer that follows these rules:\n{constitution}\n\nAnswer:"


def check_template(template: str, name: str) -> None:
    """Raise a one-line `ValueError`, which calls it `name`, unless a template has just {query} and {constitution}."""
    needed = "{query} and {constitution}"
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is not a valid template ({error}): write {needed}, other braces twice.") from None
    if {field for field, _, _ in parts} != {"query", "constitution"} or any(spec or how for _, spec, how in parts):
        raise ValueError(f"`{name}` must have the fields {needed}, just so and no others, got {template!r:.200}.")


def render(template: str, *, query: str, constitution: str, conversational: bool) -> Prompt:
    """A checked template filled in, as one user message or plain text; braces in what is filled in are left alone."""
    text = template.format(query=query, constitution=constitution)
    return [{"role": "user", "content": text}] if conversational else text


def load_rows(path: str | os.PathLike, kept_only: bool = True) -> list[dict[str, Any]]:
    """Rows written by `sample_rows`, in the order of their queries; `kept_only` leaves out what filters dropped."""
    columns = ("id", "index", "prompts", "completions", "truncated", "kept")
    rows = [row for row in read_jsonl(path, required=columns) if row["kept"] or not kept_only]
    return sorted(rows, key=lambda row: row["index"])


def to_dataset(rows: Sequence[dict[str, Any]], same_order: bool = False) -> Dataset:
    """Sampled rows as a data set for `SAMITrainer`: columns `id`, `prompts`, `completions`, `truncated`, and
    `query` where rows have it. With `same_order` the prompts have the principles in the order and wording the
    responses were sampled under."""
    if not rows:
        raise ValueError("no rows to train on; sample more queries or loosen the filters")
    columns = {name: name for name in ("id", "prompts", "completions", "truncated")}
    columns |= {"prompts": "sampled_prompts"} if same_order else {}
    columns |= {"query": "query"} if "query" in rows[0] else {}
    return Dataset.from_list([{name: row[source] for name, source in columns.items()} for row in rows])


def load_training_rows(source: str, split: str) -> Dataset:
    """Rows to train on: the kept ones of a file `sample` wrote, or a file or data set with the trainer's columns."""
    rows = inputs.load_rows(source, split)
    if isinstance(rows, Dataset):
        return rows
    return to_dataset(load_rows(source)) if rows and "kept" in rows[0] else Dataset.from_list(rows)


def prepare_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overlong_policy: str,
    prompt_template: str | None = None,
    score_end: bool = True,
    plain: bool = False,
    name: str = "train",
    num_proc: int | None = None,
) -> Dataset:
    """Add `prompt_input_ids` and `completion_input_ids` (C lists of token ids each) to rows that have none yet.

    Rows have `prompts` and `completions` (lists of C), or `query`, `constitutions` and `completions`, texts or chats;
    `completions[j]` was sampled under `prompts[j]`. Where `truncated` (C bools) is true, the sampler cut a response
    off, which then gets no end token. With `plain` rows get `plain_input_ids` too, those of `plain_prompt` or else of
    `query` alone. Rows with `kept` false are left out. A `ValueError` names the row or column,
    of the dataset called `name`, that cannot be used. Settings: see `SAMIConfig`.

    `constitutions` are rendered as they are. Nothing can be drawn anew in them: if the order or wording of principles
    differs between them and is that of the sampling, it tells them apart, and a log line says so.
    """
    if {*TOKEN_COLUMNS, *(["plain_input_ids"] if plain else [])} <= set(dataset.column_names):
        return dataset
    _check_columns(dataset.column_names, name)
    if "kept" in dataset.column_names:
        marked = "are marked `kept: false` by the sampler's filters"
        dataset = _keep(dataset, [bool(kept) for kept in dataset["kept"]], name, marked)
    if "prompts" not in dataset.column_names:
        as_given = "their order and wording of principles is trained on: draw both anew after sampling"
        logger.warning("The constitutions of the %s dataset are used as they are; %s.", name, as_given)
    template = prompt_template or TRAINING_TEMPLATE
    end_ids = {conversational: end_token_id(tokenizer, conversational) for conversational in (False, True)}

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{name} row {index}"
        prompts = row.get("prompts")
        if prompts is None:
            if not isinstance(row["query"], str) or not isinstance(row["constitutions"], list):
                raise ValueError(f"{where}: `query` must be a text and `constitutions` a list of texts.")
            query, rules, chat = row["query"], row["constitutions"], tokenizer.chat_template is not None
            prompts = [render(template, query=query, constitution=own, conversational=chat) for own in rules]
        texts = _checked_texts(row, prompts, where)
        truncated = row.get("truncated") or [False] * len(texts)
        end_id = end_ids[not isinstance(prompts[0], str)]
        prompt_ids = [encode_prompt(tokenizer, own, f"{where}: `prompts[{k}]`") for k, own in enumerate(prompts)]
        # Tokenised alone: the same tokens then follow every one of the C prompts
        completion_ids = [
            encode_completion(tokenizer, text, end_id, truncated=cut or not score_end)
            for text, cut in zip(texts, truncated, strict=True)
        ]
        own: dict[str, list[int]] = {}
        if plain:
            own["plain_input_ids"] = encode_prompt(tokenizer, _plain_prompt(row, prompts, where), f"{where}: `query`")
        longest = max(map(len, [*prompt_ids, *own.values()]))
        excess = 0 if max_length is None else max(longest + max(map(len, completion_ids)) - max_length, 0)
        if excess and overlong_policy == "error":
            over = f"its longest prompt and response together are {excess} tokens over max_length={max_length}"
            raise ValueError(f'{where}: {over}; raise that, or set `overlong_policy` to "drop" or "truncate".')
        if max_length is not None and excess and overlong_policy == "truncate":
            if longest >= max_length:
                raise ValueError(f"{where}: its longest prompt alone fills max_length={max_length}; raise that.")
            completion_ids = [ids[: max_length - longest] for ids in completion_ids]
        tokens = dict(zip(TOKEN_COLUMNS, (prompt_ids, completion_ids), strict=True))
        return {**tokens, **own, "prompts": prompts, "excess": excess}

    tokenized = dataset.map(tokenize, with_indices=True, num_proc=num_proc, desc=f"Tokenizing {name} dataset")
    fits = [not excess for excess in tokenized["excess"]]
    tokenized = tokenized.remove_columns("excess")
    if overlong_policy == "drop":
        return _keep(tokenized, fits, name, f"are longer than max_length={max_length}")
    if cut := fits.count(False):
        logger.warning("Responses of %d of %d %s rows were cut to max_length=%d.", cut, len(fits), name, max_length)
    return tokenized


def _plain_prompt(row: dict[str, Any], prompts: list[Prompt], where: str) -> Prompt:
    given = row.get("plain_prompt") or row.get("query")
    if not given:
        raise ValueError(f"{where}: `preserve_weight` needs the query without a constitution, as `plain_prompt`.")
    is_text = isinstance(given, str) and not isinstance(prompts[0], str)
    return [{"role": "user", "content": given}] if is_text else given


def _check_columns(columns: list[str], name: str) -> None:
    if "images" in columns or "image" in columns:
        raise ValueError(f"The {name} dataset has images, which SAMI does not support: use text columns.")
    if "completions" not in columns or not ("prompts" in columns or {"query", "constitutions"} <= set(columns)):
        needed = "`prompts` and `completions`, or `query`, `constitutions` and `completions`"
        raise ValueError(f"The {name} dataset has the columns {columns}; SAMI needs {needed} (see docs/sami.md).")


def _keep(dataset: Dataset, kept: list[bool], name: str, why: str) -> Dataset:
    """The rows that are kept, with a warning that the others `why`."""
    if not any(kept):
        raise ValueError(f"No {name} row is left: all {len(kept)} {why}.")
    if number := kept.count(False):
        first = kept.index(False)
        logger.warning("%d of %d %s rows %s and are left out (first: row %d).", number, len(kept), name, why, first)
    return dataset.select([i for i, flag in enumerate(kept) if flag]) if number else dataset


def _checked_texts(row: dict, prompts: Any, where: str) -> list[str]:
    """The texts of a row's completions, if they and its prompts are something to learn from."""
    completions, truncated = row["completions"], row.get("truncated")
    if not isinstance(prompts, list) or not isinstance(completions, list) or len(prompts) != len(completions):
        raise ValueError(f"{where}: `prompts` and `completions` must be lists of equal length, one entry each.")
    if all(prompt == prompts[0] for prompt in prompts[1:]):
        raise ValueError(f"{where}: there must be at least 2 prompts, not all equal: vary the constitutions.")
    if truncated is not None and len(truncated) != len(completions):
        raise ValueError(f"{where}: `truncated` has {len(truncated)} entries for {len(completions)} completions.")
    texts = []
    for j, completion in enumerate(completions):
        if isinstance(completion, list) and len(completion) == 1 and completion[0].get("role") == "assistant":
            completion = completion[0].get("content") or ""
        if not isinstance(completion, str):
            form = "a text or a list holding one assistant message"
            raise ValueError(f"{where}: `completions[{j}]` must be {form}, got {completion!r:.80}.")
        if not completion.strip():
            raise ValueError(f"{where}: `completions[{j}]` is empty: drop the row or sample it again.")
        texts.append(completion)
    return texts
