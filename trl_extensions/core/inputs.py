"""Read what users bring: rows of any usual format, and the prompts or chats in them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from .generation.types import GenerationParams
from .options import check_least, option, say_once
from .text import pattern_finder


# Tried in this order where none is named; `input` goes behind `instruction`, as in Alpaca
DEFAULT_COLUMNS = ("query", "prompt", "messages", "conversations", "instruction", "text", "post", "question")
# The `pattern` of the first question in a transcript such as Anthropic/hh-rlhf's column `chosen`
FIRST_HUMAN_TURN = r"\n\nHuman: (.*?)\n\nAssistant:"
ANSWER_COLUMNS = ("completion", "response", "output", "answer")
_CHAT_COLUMNS = ("messages", "conversations")
_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_SUFFIXES = (*_KINDS, *(f"{kind}.gz" for kind in _KINDS[:-1]))
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


@dataclass(frozen=True)
class Query:
    """A query (of a chat, its last message) and its id: 12 hexadecimal digits of the SHA-256 of text or chat."""

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


Source: TypeAlias = "str | os.PathLike[str] | Iterable[str | dict[str, Any]]"


def read_rows(source: Source, split: str = "train") -> Iterator[dict[str, Any]]:
    """The rows of a file or a data set; a `ValueError` names the source, the row or line (from 1), and the remedy.

    Args:
        source: A `.jsonl`, `.json` (a list), `.csv`, `.tsv`, `.txt` (a text a line, in column `text`) or `.parquet`
            file, all but the last also gzipped; a folder written by `save_to_disk`; the id of a data set on the hub,
            or one file of such a data set as `hf://datasets/<owner>/<name>/<file>`; or the rows themselves, a
            `datasets.Dataset` or any iterable of dicts or texts.
        split: Split of a data set; a file is always read whole.
    """
    rows: Iterable[Any]
    if isinstance(source, (str, os.PathLike)):
        rows = _read_file(Path(source)) if is_file(source) else read_dataset(os.fspath(source), split)
    else:
        rows = source
    source = name_of(source)
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {number} is not an object with named columns; write one per row")
        if None in row:
            raise ValueError(f"{source}: row {number} has more cells than there are columns; put them into quotes")
        yield row


def load_rows(source: Source, split: str = "train") -> Any:
    """All rows of a file or of an iterable as a list; a `datasets.Dataset`, given or loaded, as it is."""
    if isinstance(source, (str, os.PathLike)) and not is_file(source):
        return read_dataset(os.fspath(source), split)
    return source if hasattr(source, "features") else list(read_rows(source))


def name_of(source: Source) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "rows given"


def name_unused(source: Source, columns: Iterable[str], used: Iterable[str | None]) -> None:
    """Say which columns of a source nothing looks at."""
    if others := [str(name) for name in columns if name not in {*used, "id"}]:
        say_once(f"{name_of(source)}: columns that are not used: {', '.join(others)}")


def is_file(source: str | os.PathLike) -> bool:
    """Whether `source` is meant as a file on this machine; raises where it is one that cannot be read."""
    source = os.fspath(source)
    if source.startswith("hf://"):
        return False
    exists, readable = Path(source).is_file(), source.endswith(_SUFFIXES)
    if exists and not readable:
        raise ValueError(f"{source}: unknown kind of file; use one of {', '.join(_KINDS)}")
    if readable and not exists:
        raise ValueError(f"{source}: no such file; check the path")
    return exists


def read_dataset(source: str, split: str) -> Any:
    """A saved data set, one of the hub, or one file of that, as a `datasets.Dataset`."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if source.startswith("hf://"):
            kind = next((kind[1:] for kind in _KINDS if kind in source[-12:]), "json")
            builder = {"jsonl": "json", "tsv": "csv", "txt": "text"}.get(kind, kind)
            options = {"sep": "\t"} if kind == "tsv" else {}
            return load_dataset(builder, data_files=source, split="train", **options)
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(source)
            return saved[split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(source, split=split)
    except Exception as error:  # the library raises many kinds, some of them only with its optional dependencies
        reason = " ".join(str(error).split())
        problem = f"{source}: neither a file here nor a data set that can be loaded (split {split!r}): {reason}"
        raise ValueError(f"{problem}; check the name, the split and the network") from error


def _read_file(path: Path) -> Iterator[Any]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except ArrowException as error:
            raise ValueError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())})") from None
        return
    csv.field_size_limit(sys.maxsize)  # a law in one cell is longer than the default
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == ".json":
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise ValueError(f"{path}: a {type(rows).__name__}, not a list of objects; write `[{{...}}, ...]`")
                yield from rows
            elif kind == ".jsonl":
                yield from _json_lines(file, path)
            elif kind == ".txt":
                yield from (line.strip() for line in file if line.strip())
            else:
                yield from csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
    except UnicodeDecodeError as error:
        marks = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if marks else "perhaps Shift_JIS or Latin-1"
        raise ValueError(f"{path}: not UTF-8 but {encoding} ({error.reason}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"{path}: line {error.lineno} is not JSON ({error.msg})"
        raise ValueError(f"{problem}; if it has one object a line, name it .jsonl") from None
    except (gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as {''.join(path.suffixes)} ({error}); rewrite the file") from None


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg}); correct or delete it") from None
        if number == 1 and isinstance(row, list) and row and isinstance(row[0], dict):
            raise ValueError(f"{path}: one JSON list, not an object a line; name it .json")
        yield row


def load_queries(
    source: Source,
    *,
    column: str | None = None,
    pattern: str | None = None,
    split: str = "train",
    limit: int | None = None,
    chats: bool = False,
) -> list[Query]:
    r"""Read distinct queries, in the order of the source, from a file or a data set.

    Empty, unmatched and repeated queries are dropped; of a chat that ends with answers these are cut off. How often,
    and which columns are not used, is logged once. A `ValueError` names the source, the row (from 1) or column, and
    the remedy.

    Args:
        source: See `read_rows`; a `split` is that of a data set.
        column: Column that holds the query, as text or as a chat (`role` and `content`, or `from` and `value`).
            Defaults to the first present of `DEFAULT_COLUMNS`.
        pattern: Regular expression with exactly one group, which is the query; `.` matches line breaks too. For the
            first human turn of a transcript use `FIRST_HUMAN_TURN`, `r"\n\nHuman: (.*?)\n\nAssistant:"`.
        limit: Stop after this many queries.
        chats: Whether chats are taken as they are; otherwise they count with their first turn of the user.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}; give at least 1, or none for all queries")
    expression = _compile(pattern)
    counts: Counter[str] = Counter()
    queries: dict[str, Query] = {}
    rows, source = read_rows(source, split), name_of(source)
    for number, row in enumerate(rows, start=1):
        column = column or next((name for name in DEFAULT_COLUMNS if name in row), None)
        if column is None or column not in row:
            missing = f"column {column!r}" if column else f"column for queries ({', '.join(DEFAULT_COLUMNS)})"
            raise ValueError(f"{source}: row {number} has no {missing}; available: {', '.join(map(str, row))}")
        if number == 1:
            name_unused(source, row, (column, "input" if column == "instruction" else None))
        value = row_value(row, column, f"{source}: row {number}, column {column!r}")
        if isinstance(value, list):
            query = _from_chat(value, chats, counts)
        elif expression is None:
            query = Query.from_text(value.strip())
        elif match := next(expression(value), None):
            query = Query.from_text((match.group(1) or "").strip())
        else:
            counts["unmatched"] += 1
            continue
        if not query.text.strip():
            counts["empty"] += 1
        elif query.id in queries:
            counts["repeated"] += 1
        else:
            queries[query.id] = query
            if len(queries) == limit:
                break
    if cut := counts.pop("cut", 0):
        say_once(f"{source}: {cut} chats end with an answer, which is left out: only the questions count")
    if first := counts.pop("first", 0):
        say_once(f"{source}: {first} chats have more than one question and count with the first")
    if counts:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        say_once(f"{source}: {len(queries)} queries kept, dropped: {dropped}")
    if not queries:
        raise ValueError(f"{source}: no query left ({dict(counts) or 'no rows'}); check the column and the pattern")
    return list(queries.values())


def row_value(row: dict[str, Any], column: str, where: str) -> str | list[dict[str, str]]:
    """A column's text, with `input` behind an `instruction`, or its chat as `role` and `content`; "" where it is null,
    and a `ValueError` that begins with `where` if it is neither."""
    value = row[column]
    if isinstance(value, (list, tuple)) and len(value):
        return [_message(message, where) for message in value]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} holds {type(value).__name__}, not text or a chat; name a text column")
    more = row.get("input") if column == "instruction" else None
    if value and isinstance(more, str) and more.strip():
        return f"{value.strip()}\n\n{more.strip()}"
    return value or ""


def answered(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with `prompt` and `completion`, made of its chat (`messages`, `conversations`), whose last message is then
    the completion, or of a prompt and one of `ANSWER_COLUMNS`. A `ValueError` begins with `where`."""
    if "prompt" in row and "completion" in row:
        return row
    chat = next((name for name in _CHAT_COLUMNS if row.get(name)), None)
    if chat is not None:
        own = [message if "role" in message else _message(message, where) for message in row[chat]]
        if own[-1]["role"] != "assistant":
            raise ValueError(f"{where}: its chat does not end with an answer; delete the row, or answer it")
        return {name: row[name] for name in row if name != chat} | {"prompt": own[:-1], "completion": own[-1:]}
    column = next((name for name in DEFAULT_COLUMNS if name in row), None)
    answer = next((name for name in ANSWER_COLUMNS if name in row), None)
    if column is None or answer is None:
        missing = "`prompt`" if column is None else "`completion`"
        raise ValueError(f"{where} has no {missing}, nor `messages`; available: {', '.join(map(str, row))}")
    return {**row, "prompt": row_value(row, column, where), "completion": row_value(row, answer, where)}


def with_ids(rows: Iterable[dict[str, Any]], texts: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Rows with an `id` each, all different: their own, or the start of the SHA-256 of the row, or of its text."""
    given: dict[str | int, dict[str, Any]] = {}
    repeats: Counter[str | int] = Counter()
    rows = list(rows)
    digests = texts or (json.dumps(row, sort_keys=True, default=str) for row in rows)
    for row, text in zip(rows, digests, strict=True):
        own = row.get("id")
        key = own = own if isinstance(own, (str, int)) and own != "" else Query.from_text(text).id
        while key in given:
            repeats[own] += 1
            key = f"{own}-{repeats[own] + 1}"
        given[key] = {**row, "id": key}
    return list(given.values())


def _message(message: Any, where: str) -> dict[str, str]:
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where}: a message needs the texts `role` and `content`, got {message!r:.80}")
    return {"role": _ROLES.get(role, role), "content": content}


def _from_chat(messages: list[dict[str, str]], chats: bool, counts: Counter[str]) -> Query:
    length = len(messages)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    counts["cut"] += len(messages) < length
    if not chats:
        asked = [message["content"].strip() for message in messages if message["role"] == "user"]
        counts["first"] += len(asked) > 1
        return Query.from_text(asked[0] if asked else "")
    return Query.from_messages(messages) if messages else Query.from_text("")


def _compile(pattern: str | None) -> Callable[[str], Iterator[re.Match[str]]] | None:
    if pattern is None:
        return None
    find = pattern_finder(pattern, "`pattern`", re.DOTALL)
    if (groups := re.compile(pattern).groups) != 1:
        raise ValueError(f"`pattern` {pattern!r} has {groups} groups; put one (...) around the query")
    return find


@dataclass
class SourceArguments:
    """Where prompts come from, in every method."""

    prompts: str | None = option(None, "Prompts: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, or a data set.")
    prompt_column: str | None = option(None, "Column of the prompts; guessed if left out.")
    prompt_pattern: str | None = option(None, "Regular expression with one group, the prompt in the column.")
    prompt_split: str = option("train", "Split of a data set.")
    num_prompts: int | None = option(None, "Use at most this many prompts.")

    def __post_init__(self):
        if self.num_prompts is not None:
            check_least(self, num_prompts=1)


@dataclass
class QueryArguments(SourceArguments):
    """Prompts, held-out prompts and how they are answered: the arguments of every method that samples."""

    _chats: ClassVar[bool] = False

    num_eval_prompts: int = option(0, "Prompts held out for evaluation; 0: a fourth of all, 200 at most.")
    temperature: float = option(1.0, "Temperature of random outputs.")
    top_p: float = option(1.0, "Nucleus of random outputs.")
    max_new_tokens: int = option(128, "Longest output, in tokens.")
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end an output."})

    def __post_init__(self):
        super().__post_init__()
        check_least(self, num_eval_prompts=2 * bool(self.num_eval_prompts), max_new_tokens=1)
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.params()

    def params(self, seed: int = 0) -> GenerationParams:
        """How outputs are sampled."""
        return GenerationParams(self.max_new_tokens, self.temperature, self.top_p, tuple(self.stop), seed)

    def load_prompts(self, seed: int) -> tuple[list[Query], list[Query]]:
        """Training and held-out prompts: one seeded shuffle, the first of it held out."""
        if not self.prompts:
            raise ValueError("`prompts` is missing: name a file or data set.")
        prompts = load_queries(
            self.prompts, column=self.prompt_column, pattern=self.prompt_pattern, split=self.prompt_split,
            limit=self.num_prompts, chats=self._chats,
        )  # fmt: skip
        held_out = self.num_eval_prompts or min(max(len(prompts) // 4, 2), 200)
        if len(prompts) < held_out + 1:
            counts = f"{len(prompts)} prompts, of which num_eval_prompts={held_out} are held out"
            raise ValueError(f"{self.prompts} holds {counts}: give more prompts or lower `num_eval_prompts`.")
        random.Random(seed).shuffle(prompts)
        return prompts[held_out:], prompts[:held_out]


@dataclass
class PromptArguments(QueryArguments):
    """`QueryArguments` of the methods that sample outputs to prompts as they stand, whole chats included."""

    _chats: ClassVar[bool] = True

    system_prompt: str | None = option(None, "System message of every chat.")
    plain_prompts: bool = option(False, "Continue prompts as they stand, even if the model has a chat template.")
    greedy: bool = option(True, "Sample one greedy output a prompt.")
    num_samples: int = option(1, "Random outputs a prompt, beside the greedy one.")
    num_eval_samples: int = option(1, "Random outputs a held-out prompt.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, 10_000, num_samples=0, num_eval_samples=0)  # which are listed before they are made
