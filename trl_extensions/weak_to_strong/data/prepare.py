"""Rows with weak labels: read from a file or a data set, then tokenised with their soft labels for the trainers."""

import copy
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..._compat import get_config_model_id
from ...core import inputs
from ...core.inputs import is_file, read_dataset
from ..labels.calibrate import confidence
from .collator import check_row_values
from .examples import merge_spellings


logger = logging.getLogger(__name__)

ROW_COLUMNS = ["input_ids", "features", "soft_labels", "weight", "label"]
"""Columns of prepared rows, see `prepare_rows`."""

_CLASS_COLUMNS = ("text", "prompt", "messages", "soft_labels", "label", "weight")
_PAIR_COLUMNS = ("chosen", "rejected", "prompt", "soft_labels", "preference", "weight")
_TOLERANCE = 1e-3
_OVERLONG = "_w2s_overlong"


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """All rows of a file or a data set; a `ValueError` names the source and the row that cannot be read."""
    rows = list(inputs.read_rows(source, split))
    if not rows:
        raise ValueError(f"{source} has no rows: check where they come from.")
    if {".csv", ".tsv"} & set(Path(source).suffixes):
        rows = [{name: _from_csv(name, value) for name, value in row.items()} for row in rows]
    return rows


def answered_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Rows with `prompt` and `completion`, made of chats where need be, see `core.inputs.answered`."""
    rows = enumerate(read_rows(source, split), start=1)
    return [inputs.answered(row, f"{source}: row {number}") for number, row in rows]


def source_settings(source: str, split: str) -> dict[str, str]:
    """What tells two sources of rows apart: the content of a file, the name and split of a data set."""
    if is_file(source):
        return {"rows_sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest()}
    return {"dataset_name": source, "dataset_train_split": split}


def training_set(source: str, split: str, *, is_pairs: bool) -> Dataset:
    """Rows for `WeakToStrongTrainer`, or pairs for `WeakToStrongRewardTrainer`, from a file or a data set.

    Of a file the trainers' columns are taken, unless they are empty in every row; a data set is left as it is. The
    first of a pair's `soft_labels` is its `preference` where it has none.
    """
    if is_file(source):
        rows = read_rows(source, split)
        columns = {name: [row.get(name) for row in rows] for name in (_PAIR_COLUMNS if is_pairs else _CLASS_COLUMNS)}
        dataset = Dataset.from_dict({n: values for n, values in columns.items() if any(v is not None for v in values)})
    else:
        dataset = read_dataset(source, split)
    if not is_pairs or "soft_labels" not in dataset.column_names:
        return dataset
    has_preferences = "preference" in dataset.column_names
    preferences = list(dataset["preference"]) if has_preferences else [None] * len(dataset)
    for place, soft in enumerate(dataset["soft_labels"]):
        if preferences[place] is None:
            if not isinstance(soft, list) or len(soft) != 2:
                missing = f"row {place + 1} has no `preference`, and its `soft_labels` are {soft!r:.80}"
                raise ValueError(f"{source}: {missing}: give a preference or two probabilities, or delete it.")
            preferences[place] = soft[0]
    old = ["preference", "soft_labels"] if has_preferences else ["soft_labels"]
    return dataset.remove_columns(old).add_column("preference", preferences)


def _from_csv(name: str, value: Any) -> Any:
    """A CSV file has nothing but texts."""
    if value == "":
        return None
    if name == "truncated":
        return value.lower() == "true"
    if name == "label":
        return int(value) if value.isdecimal() else value
    if name not in ("soft_labels", "preference", "weight"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value  # refused with its row later


def prepare_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_labels: int,
    class_names: list[str] | None = None,
    max_length: int | None = None,
    overlong_policy: str = "truncate",
    name: str = "train",
    labelled: bool = True,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise texts and check their labels. Idempotent: rows it made come out as they went in.

    Args:
        dataset: Rows with `text`, or `prompt` (text, or chat messages for the chat template), `messages`, `input_ids`
            or `features`; `soft_labels` (K floats that sum to 1) or `label` (class number or name), which stands for a
            one-hot soft label. A row with both keeps `label` as its true class, which only accuracy looks at.
            Optionally `weight`.
        tokenizer: The trainer's tokenizer.
        num_labels, class_names: K, the classes of the model, and their names.
        max_length: Limit on the tokens of a row, or None.
        overlong_policy: What happens to longer rows: "truncate" on the right, "drop" or "error"; counted in a warning.
        name: The dataset's name in messages. Of "train", a class that no row belongs to is warned about.
        labelled: Whether rows must have labels; without them there is no `soft_labels` column.
        num_proc: Processes for `Dataset.map`.

    Returns:
        The dataset with `ROW_COLUMNS` as far as they are known; `weight` is 1 where none was given.
    """
    columns = dataset.column_names
    if not len(dataset):
        raise ValueError(f"The {name} dataset has no rows.")
    sources = ("features", "input_ids", "text", "prompt", "messages")
    source = next((column for column in sources if column in columns), None)
    if source is None:
        raise ValueError(f"The {name} dataset needs `text` or `prompt` (or `input_ids` or `features`), has {columns}.")
    of_labels = [column for column in ("soft_labels", "label") if column in columns]
    has_labels = bool(of_labels)
    if has_labels and not labelled:  # labels of only some rows are of no use
        given = zip(*(dataset[column] for column in of_labels), strict=True)
        has_labels = all(any(value is not None for value in values) for values in given)
    if labelled and not has_labels:
        raise ValueError(f"The {name} dataset has neither `soft_labels` nor `label`: give one of them.")
    check_row_values(dataset, "weight", name)

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{name} row {index}"
        out: dict[str, Any] = {"weight": float(row.get("weight", 1.0)), _OVERLONG: False}
        if source != "features":
            out["input_ids"], out[_OVERLONG] = _encode(row[source], source, tokenizer, max_length, where)
            if out[_OVERLONG] and overlong_policy == "error":
                remedy = "shorten it, raise `max_length`, or set `overlong_policy` to truncate or drop"
                raise ValueError(f"{where}: `{source}` is longer than {max_length} tokens: {remedy}.")
        if has_labels:
            out["label"] = class_number(row.get("label"), num_labels, class_names, where)
            out["soft_labels"] = _soft_labels(row.get("soft_labels"), out["label"], num_labels, where)
        return out

    dropped = [] if has_labels else of_labels
    types = {column: feature for column, feature in dataset.features.items() if column not in dropped}
    types |= {"weight": Value("float64"), _OVERLONG: Value("bool")}
    if source != "features":
        types["input_ids"] = [Value("int64")]
    if has_labels:
        types |= {"soft_labels": [Value("float64")], "label": Value("int64")}
    prepared = dataset.with_format(None).map(
        prepare,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=dropped,
        features=Features(types),
        desc=f"Preparing {name} dataset",
    )
    prepared = _settle_overlong(prepared, max_length, overlong_policy, name)
    if name == "train" and has_labels:
        said = set(np.asarray(prepared["soft_labels"]).argmax(axis=1).tolist())
        absent = [repr(class_names[k]) if class_names else str(k) for k in range(num_labels) if k not in said]
        if absent:
            logger.warning(
                "No weak label of the train dataset is class %s: the model has little to learn it from. Check the "
                "weak model, or leave the class out.",
                ", ".join(absent),
            )
    return prepared


def classes_of(dataset: Dataset) -> tuple[int, list[str] | None]:
    """Number of classes, and their names where the data tells them: from the length of the first soft label; else from
    a `ClassLabel` column, the sorted distinct texts of `label`, or the highest class number."""
    feature = dataset.features.get("label")
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    if "soft_labels" in dataset.column_names and len(dataset) and dataset[0]["soft_labels"]:
        number = len(dataset[0]["soft_labels"])
        return number, names if names and len(names) == number else None
    if names:
        return len(names), names
    labels = {value for value in dataset["label"] if value is not None} if feature is not None else set()
    if labels and all(isinstance(value, str) for value in labels):
        names = sorted(set(merge_spellings([own for own in dataset["label"] if own is not None], "labels").values()))
        number = len(names)
    else:
        number = max((value for value in labels if isinstance(value, int)), default=0) + 1
    if number < 2:
        raise ValueError("The train dataset does not show 2 classes: set `num_labels` or `class_names`.")
    return number, names


def class_number(value: Any, num_labels: int, class_names: list[str] | None, where: str) -> int | None:
    """The class a `label` names, or None for None."""
    if value is None:
        return None
    if isinstance(value, str):
        names = class_names or []
        value = merge_spellings([value], where, names)[value]
        if value not in names:
            known = f"is not one of {', '.join(map(repr, names))}" if names else "needs `class_names`"
            raise ValueError(f"{where}: `label` {value!r:.80} {known}: correct it, or set `class_names`.")
        return names.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_labels:
        raise ValueError(f"{where}: `label` must be a class number from 0 to {num_labels - 1}, got {value!r:.80}.")
    return value


def mean_soft_label(dataset: Dataset) -> np.ndarray:
    """Class shares `(K,)` of prepared rows, whatever they weigh: the prior of the confidence loss."""
    return np.mean(np.asarray(dataset["soft_labels"]), axis=0)


def confidence_weights(soft_labels: np.ndarray) -> np.ndarray:
    """How sure soft labels are, see `calibrate.confidence`, scaled to a mean of 1: `(N, K)` -> `(N,)`."""
    sure = confidence(soft_labels)
    if not sure.mean() > 1e-9:
        raise ValueError("Every soft label is uniform, so none is more certain: set `weight_by_confidence` to False.")
    return sure / sure.mean()


def weigh_by_confidence(dataset: Dataset) -> Dataset:
    """Prepared rows with their `weight` multiplied by `confidence_weights`."""
    weights = confidence_weights(np.asarray(dataset["soft_labels"])) * np.asarray(dataset["weight"])
    return dataset.remove_columns("weight").add_column("weight", weights)


def _encode(
    value: Any, source: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, where: str
) -> tuple[list[int], bool]:
    """Token ids, at most `max_length`, and whether there were more."""
    if source == "input_ids":
        ids = value
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"{where}: `input_ids` must be a list of token ids, one at least, got {value!r:.80}.")
    elif isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: `{source}` is empty: drop the row.")
        ids, overlong = encode_text(tokenizer, value, max_length)
        if overlong:
            return ids, True
    elif source != "text" and isinstance(value, list) and value:
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: `{source}` is a chat, but the tokenizer has no chat template: give texts.")
        try:
            # A data set fills the keys that other messages have with None, which templates take for given ones
            messages = [{key: own for key, own in message.items() if own is not None} for message in value]
            ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        except (TemplateError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: the chat template refuses `{source}`: {error}") from error
    else:
        allowed = "a text" if source == "text" else "a text or a list of chat messages"
        raise ValueError(f"{where}: `{source}` must be {allowed}, got {value!r:.80}.")
    if not ids:
        raise ValueError(f"{where}: `{source}` has no tokens: drop the row.")
    return list(ids[:max_length]), max_length is not None and len(ids) > max_length


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None
) -> tuple[list[int], bool]:
    """Token ids of a text, at most `max_length`, cut so that special tokens at its end stay; and whether it was cut. A
    rendered chat template that wrote the beginning-of-sequence token does not get a second one."""
    ids = tokenizer(text, truncation=False)["input_ids"]
    again = int(ids[:2] == [tokenizer.bos_token_id] * 2)
    if max_length is None or len(ids) - again <= max_length:
        return ids[again:], False
    return tokenizer(text, truncation=True, max_length=max_length + again)["input_ids"][again:], True


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends a text; of a tokenizer without one (GPT-1) its unknown token, which is in the vocabulary. A
    `ValueError` where there is neither."""
    token = tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        raise ValueError("The tokenizer has no end-of-sequence token: set `tokenizer.eos_token`, or `eos_token`.")
    return token


def with_end_token(args: Any, model: Any, processing_class: Any) -> Any:
    """The arguments of a trainer of TRL, which cannot do without an end token: a copy that names one, for a tokenizer
    that has none. The trainer tells the model, and pads with it where there is no padding token either."""
    if args.eos_token is not None:
        return args
    if processing_class is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        try:
            processing_class = AutoTokenizer.from_pretrained(
                name, revision=revision or "main", trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError):  # TRL says what is wrong, or finds a processor
            return args
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.eos_token is None:
        args = copy.copy(args)
        args.eos_token = end_token(tokenizer)
    return args


def _soft_labels(values: Any, label: int | None, num_labels: int, where: str) -> list[float]:
    if values is None:
        if label is None:
            raise ValueError(f"{where} has neither `soft_labels` nor `label`: give one of them, or drop the row.")
        return [float(k == label) for k in range(num_labels)]
    if not isinstance(values, list) or len(values) != num_labels:
        raise ValueError(f"{where}: `soft_labels` must be {num_labels} probabilities, got {values!r:.80}.")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"{where}: `soft_labels` must be finite numbers of at least 0, got {values!r:.80}.")
    total = sum(values)
    if abs(total - 1) > _TOLERANCE:
        raise ValueError(f"{where}: `soft_labels` sum to {total:.6g} instead of 1: normalise them.")
    # Left alone where only rounding is at stake, so that rows prepared twice stay the same
    return [value / total if abs(total - 1) > 1e-9 else float(value) for value in values]


def _settle_overlong(dataset: Dataset, max_length: int | None, policy: str, name: str) -> Dataset:
    """Say once how many rows were too long, and drop them if told to."""
    too_long = list(dataset[_OVERLONG])
    dataset = dataset.remove_columns(_OVERLONG)
    if not any(too_long):
        return dataset
    done = "dropped" if policy == "drop" else "cut"
    logger.warning(
        "Of %d %s rows, %d are longer than %s tokens and were %s (first: row %d).",
        len(too_long), name, sum(too_long), max_length, done, too_long.index(True),
    )  # fmt: skip
    if policy != "drop":
        return dataset
    if all(too_long):
        raise ValueError(f"No {name} row is left, for all are longer than {max_length} tokens: raise `max_length`.")
    return dataset.select([index for index, drop in enumerate(too_long) if not drop])
