"""Read the queries that responses are sampled for."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

DEFAULT_COLUMNS = ("query", "prompt", "text", "instruction", "post", "question")
FIRST_HUMAN_TURN = r"\n\nHuman: (.*?)\n\nAssistant:"
"""`pattern` that takes the first question out of a transcript such as Anthropic/hh-rlhf's column `chosen`."""

_JSON_LINES = (".jsonl", ".jsonl.gz")
_JSON = (".json", ".json.gz")
_CSV = (".csv", ".csv.gz")
_SUFFIXES = (*_JSON_LINES, *_JSON, *_CSV)


@dataclass(frozen=True)
class Query:
    """A query and a stable id: the first 12 hexadecimal digits of the SHA-256 of its text, or of its chat as JSON.

    Args:
        id (`str`): The id.
        text (`str`): The query; of a chat, its last message.
        messages (`list[dict]`, *optional*): The chat, where the source has one.
    """

    id: str
    text: str
    messages: list[dict[str, str]] | None = None

    @classmethod
    def from_text(cls, text: str) -> Query:
        # Half a surrogate pair (a broken emoji in the source) is not UTF-8 and could be neither hashed nor written.
        data = text.encode("utf-8", errors="replace")
        return cls(id=hashlib.sha256(data).hexdigest()[:12], text=data.decode("utf-8"))

    @classmethod
    def from_messages(cls, messages: list[dict[str, str]]) -> Query:
        own = [{"role": message["role"], "content": message["content"]} for message in messages]
        return cls(cls.from_text(json.dumps(own)).id, own[-1]["content"], own)


def load_queries(
    source: str | os.PathLike,
    *,
    column: str | None = None,
    pattern: str | None = None,
    split: str = "train",
    limit: int | None = None,
    chats: bool = False,
) -> list[Query]:
    r"""Read queries from a file or from the hub.

    Empty, unmatched and repeated queries are dropped, and their number is logged.

    Args:
        source (`str` or `os.PathLike`):
            A `.jsonl`, `.json` or `.csv` file (also gzipped), the id of a data set on the hub, or one file of such a
            data set as `hf://datasets/<owner>/<name>/<file>`.
        column (`str`, *optional*):
            Column that holds the query. Defaults to the first present of query, prompt, text, instruction, post,
            question.
        pattern (`str`, *optional*):
            Regular expression with exactly one group, which is the query; `.` matches line breaks too. For the first
            human turn of a transcript use `FIRST_HUMAN_TURN`, `r"\n\nHuman: (.*?)\n\nAssistant:"`.
        split (`str`): Split of a data set on the hub; a file is always read whole.
        limit (`int`, *optional*): Stop after this many queries.
        chats (`bool`): Whether the column may hold lists of chat messages, as TRL's conversational prompts do.

    Returns:
        Distinct queries in the order of the source.

    Raises:
        `ValueError`: one line naming the source, the row (counted from 1) or column, and the remedy.
    """
    source = os.fspath(source)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}; give at least 1, or none for all queries")
    expression = _compile(pattern)
    rows = read_file(Path(source)) if is_file(source) else read_dataset(source, split)
    dropped: Counter[str] = Counter()
    queries: dict[str, Query] = {}
    for value in _values(rows, source, column, chats):
        if isinstance(value, list):
            query = Query.from_messages(value)
        else:
            if expression is not None:
                if not (match := expression.search(value)):
                    dropped["unmatched"] += 1
                    continue
                value = match.group(1) or ""
            query = Query.from_text(value.strip())
        if not query.text:
            dropped["empty"] += 1
        elif query.id in queries:
            dropped["repeated"] += 1
        else:
            queries[query.id] = query
            if len(queries) == limit:
                break
    if dropped:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        logger.warning("%s: %d queries kept, dropped: %s", source, len(queries), counts)
    if not queries:
        raise ValueError(f"{source}: no query left ({dict(dropped) or 'no rows'}); check the column and the pattern")
    return list(queries.values())


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"`pattern` {pattern!r} is not a regular expression ({error}); correct it") from None
    if expression.groups != 1:
        raise ValueError(
            f"`pattern` {pattern!r} has {expression.groups} groups; put exactly one (...) around the query"
        )
    return expression


def _values(
    rows: Iterable[dict[str, Any]], source: str, column: str | None, chats: bool
) -> Iterator[str | list[dict[str, str]]]:
    """The chosen column of each row; a missing value counts as empty text."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {number} is not an object with named columns; write one per row")
        if column is None:
            column = next((name for name in DEFAULT_COLUMNS if name in row), None)
            if column is None:
                raise ValueError(
                    f"{source}: none of the columns {', '.join(DEFAULT_COLUMNS)} is there; name the column of the "
                    f"queries, available: {', '.join(map(str, row))}"
                )
        if column not in row:
            raise ValueError(
                f"{source}: row {number} has no column {column!r}; available: {', '.join(map(str, row)) or 'none'}"
            )
        value = row[column]
        if chats and isinstance(value, list) and value:
            _check_chat(value, f"{source}: row {number}, column {column!r}")
        elif value is not None and not isinstance(value, str):
            raise ValueError(
                f"{source}: row {number}, column {column!r} holds {type(value).__name__}, not text; name a text column"
            )
        yield value or ""


def _check_chat(messages: list[Any], where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: a message needs the texts `role` and `content`, got {message!r:.80}")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the chat ends with an answer; end it with what is to be answered")


def is_file(source: str) -> bool:
    """Whether `source` is meant as a file on this machine; raises where it is one that cannot be read."""
    if source.startswith("hf://"):
        return False
    if Path(source).is_file():
        if not source.endswith(_SUFFIXES):
            raise ValueError(f"{source}: unknown kind of file; use one of {', '.join(_SUFFIXES)}")
        return True
    if source.endswith(_SUFFIXES):
        raise ValueError(f"{source}: no such file; check the path")
    return False


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if path.name.endswith(_CSV):
                yield from csv.DictReader(file)
            elif path.name.endswith(_JSON_LINES):
                yield from _json_lines(file, path)
            else:
                yield from _json_list(file.read(), path)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(
            f"{path}: cannot be read as UTF-8 {''.join(path.suffixes)} ({error}); rewrite the file"
        ) from None


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg}); correct or delete it") from None


def _json_list(content: str, path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON ({error.msg}, line {error.lineno}); if it has one object a line, name it .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(rows).__name__}; write `[{{...}}, ...]`")
    return rows


def read_dataset(source: str, split: str) -> Iterable[dict[str, Any]]:
    """A data set of the hub, or one file of it."""
    from datasets import load_dataset

    try:
        if source.startswith("hf://"):
            builder = "csv" if source.endswith(_CSV) else "json"
            return load_dataset(builder, data_files=source, split="train")
        return load_dataset(source, split=split)
    except Exception as error:  # the library raises many kinds, some of them only with its optional dependencies
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source}: neither a file here nor a data set that can be loaded (split {split!r}): {reason}; check the "
            "name and the network"
        ) from error
