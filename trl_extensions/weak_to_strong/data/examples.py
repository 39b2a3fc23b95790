"""Labelled texts for classification and preference pairs for a reward model: read, and divided without tearing
groups."""

from __future__ import annotations

import logging
import random
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ...core.inputs import Source, load_rows, name_of, name_unused, row_value, with_ids
from ...core.options import say_once


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "prompt", "query", "question", "messages", "conversations", "instruction")
"""Columns tried in this order where none is named."""

_HALVES, _SLICE = 0, 1  # streams of random numbers, so that a slice does not repeat what the halves drew


@dataclass(frozen=True)
class Example:
    """A text and its class: the index of that, or None where unknown. Rows of one group (the same document, question,
    author) must not be split; the id is unique, and the same each time the same source is read."""

    id: str
    text: str
    label: int | None
    group: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two texts, prompts included, in arbitrary order: label 0 if `chosen` is the better one, 1 if `rejected` is, None
    where unknown."""

    id: str
    chosen: str
    rejected: str
    label: int | None
    group: str | None = None


Row = TypeVar("Row", bound=Example | Pair)


def load_examples(
    source: Source,
    *,
    split: str = "train",
    text_template: str | None = None,
    text_column: str | None = None,
    label_column: str | None = "label",
    group_column: str | None = None,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    where: Mapping[str, Any] | None = None,
) -> tuple[list[Example], list[str]]:
    """Read texts with their classes.

    The classes are found in the whole source, before `where` and `limit`, so that two parts of one source agree on
    them. For two sources hand the names returned for the first to the second.

    Args:
        source, split: See `core.inputs.read_rows`.
        text_template: Text with columns in braces, `"Question: {question}\\nClause: {text}"`; `{{` is a brace.
        text_column: Column of the text, or of a chat, which becomes `"User: ...\\n\\nAssistant: ..."`. Defaults to
            the first present of `TEXT_COLUMNS`.
        label_column: Column of the class: its index (0, 1, ..., also as text), true or false, or its name, in which
            case, width and white space do not matter; null for unknown. `None` if there is no such column;
            `class_names` is then needed.
        group_column: Column that says which rows belong together.
        class_names: Names of classes 0, 1, ... Left out: those the data set declares; else the sorted distinct values
            of a column of texts; else "0", "1", ...
        limit, seed: Keep at most this many rows, drawn at random with this seed.
        where: Keep only rows in which each of these columns has this value (compared as text).

    Returns:
        The rows, in the order of the source unless `limit` draws from it, and the names of the K >= 2 classes.
    """
    if text_template is not None and text_column is not None:
        raise ValueError("give `text_template` or `text_column`, not both")
    name, rows, declared = _open_source(source, split)
    labels: list[int | None] = [None] * len(rows)
    if label_column is not None:
        known = declared.get(label_column) if class_names is None else class_names
        names, labels = _read_labels(rows, label_column, known, name)
    elif class_names is not None:
        names = _checked_names(class_names)
    else:
        raise ValueError("without `label_column` the classes are unknown; give `class_names`")
    if text_template is not None:
        pieces = _template_pieces(text_template)
        texts = [_fill(pieces, row, here) for here, row in rows]
        used = [column for _, column in pieces]
    else:
        texts = [_text(row, text_column, here) for here, row in rows]
        used = [text_column or next(column for column in TEXT_COLUMNS if column in rows[0][1])]
        used += ["input"] if used == ["instruction"] else []
    name_unused(name, rows[0][1], (*used, label_column, group_column, *(where or ())))
    examples = [
        Example(key, text, label, _group(row, group_column, here))
        for (here, row), key, text, label in zip(rows, _ids(rows, texts), texts, labels, strict=True)
        if _matches(row, where, here)
    ]
    examples = _limited(examples, name, where, limit, seed)
    by_text = defaultdict(set)
    for example in examples:
        by_text[example.text].add(example.label)
    if bad := sum(len(values - {None}) > 1 for values in by_text.values()):
        logger.warning("%s: %d texts occur with different labels; no model can get all of them right", name, bad)
    return examples, names


def load_pairs(
    source: Source,
    *,
    split: str = "train",
    group_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    where: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Read preference pairs, and swap each with probability 1/2.

    The source has the better text in `chosen` and the worse one in `rejected`. A model could learn that from the
    order, so a coin (seeded by `seed` and the row's id, hence the same in any subset) swaps rows; `label` says where
    the better one went. Pairs of equal texts are left out and counted.

    Every text includes its `prompt`, where the source has that column; chats become text as in `load_examples`. A
    plain prompt and a plain answer are taken as such a user's and assistant's message. An answer of messages that does
    not begin with the assistant's is a whole chat, in which the prompt is not repeated.
    """
    name, rows, _ = _open_source(source, split)
    has_prompts = any("prompt" in row for _, row in rows)
    texts = []
    for here, row in rows:
        prompt = _value(row, "prompt", here) if has_prompts else None
        answers = {column: _value(row, column, here) for column in ("chosen", "rejected")}
        texts.append([_answered(prompt, own, f"{here}, column {column!r}") for column, own in answers.items()])
    pairs, equal = [], 0
    for (here, row), key, both in zip(rows, _ids(rows, map("\x00".join, texts)), texts, strict=True):
        if not _matches(row, where, here):
            continue
        if both[0] == both[1]:
            equal += 1
            continue
        swapped = random.Random(f"{seed}/{key}").random() < 0.5
        first, second = reversed(both) if swapped else both
        pairs.append(Pair(key, first, second, int(swapped), _group(row, group_column, here)))
    if equal:
        logger.warning("%s: left out %d pairs of equal texts", name, equal)
    return _limited(pairs, name, where, limit, seed)


def flatten_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages as one text: `"User: ...\\n\\nAssistant: ..."`."""
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a message needs the texts `role` and `content`, got {message!r:.80}")
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages)


# Rows of a source, and what is in them


def _open_source(source: Source, split: str) -> tuple[str, list[tuple[str, dict[str, Any]]], dict]:
    """Name of the source, its rows with what to call each in messages, and the class names it declares, by column."""
    name, rows = name_of(source), load_rows(source, split)
    features = getattr(rows, "features", None) or {}
    declared = {column: list(feature.names) for column, feature in features.items() if hasattr(feature, "names")}
    numbered = [(f"{name}: row {number}", row) for number, row in enumerate(rows, start=1)]
    if not numbered:
        raise ValueError(f"{name}: there are no rows; check the file")
    return name, numbered, declared


def _value(row: dict[str, Any], column: str, here: str) -> Any:
    if column not in row:
        raise ValueError(f"{here} has no column {column!r}; available: {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _text(row: dict[str, Any], column: str | None, here: str) -> str:
    column = column or next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None:
        tried, known = ", ".join(TEXT_COLUMNS), ", ".join(map(str, row)) or "none"
        raise ValueError(f"{here} has none of the columns {tried}; name the column of the text, available: {known}")
    _value(row, column, here)
    where = f"{here}, column {column!r}"
    return _as_text(row_value(row, column, where), where)


def _as_text(value: Any, here: str) -> str:
    if isinstance(value, (list, tuple)) and value:
        try:
            value = flatten_chat(value)
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{here} holds {type(value).__name__}, not text or messages; name a text column")
    # Half a surrogate pair is not UTF-8 and could be neither hashed nor written.
    value = (value or "").encode("utf-8", errors="replace").decode("utf-8").strip()
    if not value:
        raise ValueError(f"{here} is empty; fill it or delete the row")
    return value


def _answered(prompt: Any, answer: Any, here: str) -> str:
    """An answer with its prompt in front, as `load_pairs` describes it."""
    is_chat = isinstance(answer, (list, tuple)) and len(answer) > 0
    starts_anew = is_chat and isinstance(answer[0], Mapping) and answer[0].get("role") != "assistant"
    if prompt in (None, "", []) or starts_anew:
        return _as_text(answer, here)
    if not is_chat:
        answer = [{"role": "assistant", "content": _as_text(answer, here)}]
    if not isinstance(prompt, (list, tuple)):
        prompt = [{"role": "user", "content": prompt}]
    return _as_text([*prompt, *answer], here)


def _template_pieces(template: str) -> list[tuple[str, str | None]]:
    """Each text of a template and the column behind it, if any."""
    try:
        pieces = [(text, column) for text, column, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"`text_template` {template!r} cannot be read ({error}); write a brace as {{{{") from None
    columns = [column for _, column in pieces if column is not None]
    if not columns or "" in columns:
        raise ValueError(f"`text_template` {template!r} must name columns in braces, such as {{text}}")
    return pieces


def _fill(pieces: list[tuple[str, str | None]], row: dict[str, Any], here: str) -> str:
    values = {}
    for column in (column for _, column in pieces if column is not None):
        value = _value(row, column, here)
        is_plain = isinstance(value, (int, float, str))
        values[column] = "" if value is None else str(value) if is_plain else _as_text(value, here)
    if not any(value.strip() for value in values.values()):
        raise ValueError(f"{here}: the columns {', '.join(values)} of the template are all empty; delete the row")
    return _as_text("".join(text + (values[column] if column else "") for text, column in pieces), here)


def _matches(row: dict[str, Any], where: Mapping[str, Any] | None, here: str) -> bool:
    return all(str(_value(row, column, here)) == str(wanted) for column, wanted in (where or {}).items())


def _group(row: dict[str, Any], column: str | None, here: str) -> str | None:
    value = None if column is None else _value(row, column, here)
    return None if value is None else str(value)


def _ids(rows: Iterable[tuple[str, dict[str, Any]]], texts: Iterable[str]) -> list[str]:
    """Ids, each once: those of the rows, or the first 12 hexadecimal digits of their texts' SHA-256."""
    return [str(row["id"]) for row in with_ids((row for _, row in rows), texts)]


def _limited(rows: list[Row], source: str, where: Mapping[str, Any] | None, limit: int | None, seed: int) -> list[Row]:
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}; give at least 1, or none for all rows")
    if not rows:
        raise ValueError(f"{source}: no row is left" + (f" where {dict(where)}; check the values" if where else ""))
    if limit is not None:
        random.Random(seed).shuffle(rows)
    return rows[:limit]


# Classes


def _read_labels(
    rows: list[tuple[str, dict[str, Any]]], column: str, names: Sequence[str] | None, source: str
) -> tuple[list[str], list[int | None]]:
    """Class names, found in the column if they are not given, and the index of each row's class among them."""
    keys = [_label_key(_value(row, column, here), here) for here, row in rows]
    spelled = merge_spellings((key for key in keys if key is not None), source, names or ())
    keys = [spelled.get(key, key) if key else None for key in keys]
    names = _checked_names(_names_from({key for key in keys if key is not None}, source) if names is None else names)
    index: dict[str | None, int | None] = {None: None} | {name: i for i, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):  # else 1 could mean the class of that name or of that index
        index |= {str(i): i for i in range(len(names))}
    for key, (here, _) in zip(keys, rows, strict=True):
        if key not in index:
            raise ValueError(f"{here}: label {key!r} is none of the classes {', '.join(names)}; correct it or name it")
    return names, [index[key] for key in keys]


def _label_key(value: Any, here: str) -> str | None:
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{here}: label {value!r:.40} is {type(value).__name__}; give a class's index or its name")
    return (value or "").strip() or None


def merge_spellings(labels: Iterable[str], source: str, names: Sequence[str] = ()) -> dict[str, str]:
    """Every label -> its class's name: one of `names`, or else its most frequent spelling; labels that differ in case,
    width or white space only are one class, which is said once."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        spellings[_folded(label)][label] += 1
    given = {_folded(name): name for name in names}
    merged: dict[str, str] = {}
    for fold, own in spellings.items():
        name = given.get(fold) or max(own, key=lambda label: (own[label], label)).strip()
        merged |= {label: label if label in names else name for label in own}
        if len(own) > 1 and len({merged[label] for label in own}) == 1:
            say_once(f"{source}: {', '.join(map(repr, sorted(own)))} are one class, {name!r}")
    return merged


def _folded(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _checked_names(names: Sequence[str]) -> list[str]:
    names = [str(name) for name in names]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`class_names` is {names}; give at least two, each once")
    return names


def _names_from(keys: set[str], source: str) -> list[str]:
    distinct = sorted(keys)
    if not distinct:
        raise ValueError(f"{source}: no row has a label; give `class_names`, or another `label_column`")
    if all(key.isdecimal() for key in distinct):
        highest = max(map(int, distinct))
        if highest > 1 and len(distinct) <= highest:
            absent = next(i for i in range(highest) if str(i) not in keys)
            reason = f"labels go up to {highest}, but {absent} does not occur"
            raise ValueError(f"{source}: {reason}; number the classes from 0, or give `class_names`")
        return [str(i) for i in range(max(highest + 1, 2))]
    if len(distinct) == 1:
        raise ValueError(f"{source}: every label is {distinct[0]!r}; give `class_names` with the other classes")
    return distinct


# Two parts of them


def split_halves(examples: Sequence[Row], *, share: float = 0.5, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into rows whose true labels the weak models see, and rows that they will label (arXiv 2312.09390, 3).

    Returns both parts, neither empty, each in the order of `examples`. Rows of one `group` stay together: the first
    part is filled with groups in random order up to `share` of the rows, or one group beyond it where that is nearer.
    Without groups each class is split by `share`, to within a row.
    """
    return _divide(examples, share, seed, _HALVES)


def take_slice(examples: Sequence[Row], share: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Set a slice of rows aside, for calibration: `(slice, rest)`, otherwise as `split_halves`."""
    return _divide(examples, share, seed, _SLICE)


def _divide(examples: Sequence[Row], share: float, seed: int, stream: int) -> tuple[list[Row], list[Row]]:
    number = len(examples)
    if not 0 < share < 1:
        raise ValueError(f"the share is {share}; give a number between 0 and 1")
    if number < 2:
        raise ValueError(f"{number} rows cannot be split; give at least two")
    random = np.random.default_rng([stream, seed])
    by_group = any(row.group is not None for row in examples)
    first = (_whole_groups if by_group else _by_class)(examples, share, random)
    if not 0 < len(first) < number:
        raise ValueError(f"a share of {share} of {number} rows leaves one part empty; give more rows or another share")
    parts: tuple[list[Row], list[Row]] = ([], [])
    for i, row in enumerate(examples):
        parts[i not in first].append(row)
    return parts


def _by_class(examples: Sequence[Row], share: float, random: np.random.Generator) -> set[int]:
    """Systematic sampling along the rows sorted by class: every class, and all together, gets its share +- 1."""
    labels = [-1 if row.label is None else row.label for row in examples]
    order = sorted(random.permutation(len(examples)).tolist(), key=labels.__getitem__)
    marks = np.floor(np.arange(len(order) + 1) * share + random.random())
    return {i for i, before, after in zip(order, marks, marks[1:], strict=False) if after > before}


def _whole_groups(examples: Sequence[Row], share: float, random: np.random.Generator) -> set[int]:
    groups = defaultdict(list)
    for i, row in enumerate(examples):
        groups[("row", i) if row.group is None else ("group", row.group)].append(i)
    members, wanted = list(groups.values()), share * len(examples)
    if len(members) < 2:
        rows = f"all {len(examples)} rows are of group {examples[0].group!r}, which must stay whole"
        raise ValueError(f"{rows}; give rows of more groups, or no group column")
    first: set[int] = set()
    others: list[list[int]] = []
    for group in (members[place] for place in random.permutation(len(members))):
        if len(first) + len(group) <= wanted:
            first.update(group)
        else:
            others.append(group)
    # One that does not fit may still come nearer than none
    short, nearest = wanted - len(first), min(others, key=len)
    if not first or len(nearest) - short < short:
        first.update(nearest)
    return first
