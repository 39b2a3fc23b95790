"""From completions with marked characters to tokens with a sign: what `TNTTrainer` does to a dataset first.

Offsets count Python characters (code points), start at 0 and are half-open: `text[start:end]` is the unwanted part.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from numbers import Integral
from os.path import commonprefix
from typing import Any, NamedTuple

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..core.generation.sampling import completion_text
from ..core.inputs import Source, answered, load_rows, name_of
from ..core.options import say_once
from ..core.training.encoding import encode_prompt, end_token_id


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ["prompt", "completion", "negative_spans", "severities", "truncated"]
PRETOKENISED_COLUMNS = ["input_ids", "labels", "negative_mask"]
TOKEN_COLUMNS = ["input_ids", "token_weights"]

_PRETOKENISED = "pretokenised rows (`input_ids`, `labels` and `negative_mask`)"
_COUNTS = "_tnt_counts"


def load_training_rows(
    source: str, split: str, *, clean_ratio: float | None = None, seed: int = 0,
    more: Sequence[dict[str, Any]] = (), held_off: Callable[[Any], bool] = lambda prompt: False,
) -> Dataset:  # fmt: skip
    """Annotated outputs, or tokenised rows, of any file or data set that `core.inputs.read_rows` reads.

    At most `clean_ratio` clean rows per row with a span are kept, drawn at random. `more` rows count with them; rows
    whose prompt is `held_off` do not.
    """
    found = read_annotated(source, split)
    if found and "input_ids" in found[0]:
        if clean_ratio is not None:
            raise ValueError("`clean_ratio` does not apply to tokenised rows: thin them out yourself.")
        return found if isinstance(found, Dataset) else Dataset.from_list(found)
    every = [*found, *more]
    own = [row for row in every if not held_off(row["prompt"])]
    if len(own) < len(every):
        apart = f"{len(every) - len(own)} of {len(every)} outputs answer prompts held off for validation or test"
        logger.warning("%s, and are not trained on", apart)
        if not any(row.get("negative_spans") for row in own):
            raise ValueError(f"{source}: {apart}, and none of the others has anything unwanted: give more prompts.")
    rows = select_rows(own, clean_ratio, seed)
    if not rows:
        raise ValueError(f"{source}: no rows to train on: sample and annotate more outputs.")
    return Dataset.from_list([{name: row.get(name) for name in TEXT_COLUMNS} for row in rows])


def read_annotated(source: Source, split: str) -> Any:
    """The rows of a file or a data set, with `prompt` and `completion` (see `answered`) unless they are tokenised."""
    found = load_rows(source, split)
    if len(found) and "input_ids" in found[0]:
        return found
    return [answered(row, f"{name_of(source)}: row {number}") for number, row in enumerate(found, start=1)]


def select_rows(rows: list[dict[str, Any]], clean_ratio: float | None, seed: int) -> list[dict[str, Any]]:
    """Rows with text, the clean ones thinned out to `clean_ratio` per row with a span, in their order."""
    written = [row for row in rows if completion_text(row["completion"]).strip()]
    if len(written) < len(rows):
        logger.warning("%d of %d outputs are empty and left out", len(rows) - len(written), len(rows))
    if clean_ratio is None:
        return written
    clean = [place for place, row in enumerate(written) if not row.get("negative_spans")]
    wanted = min(len(clean), round(clean_ratio * (len(written) - len(clean))))
    dropped = set(clean) - set(random.Random(seed).sample(clean, wanted))
    return [row for place, row in enumerate(written) if place not in dropped]


class EncodedRow(NamedTuple):
    """One row of T tokens, prompt and completion."""

    input_ids: list[int]
    token_weights: list  # each of its token as a target: 1 keep, -1 (or minus a severity) unwanted, 0 not scored
    span_ends: list[int]  # for every span (or marked token) the index of the last scored token it touches, or -1


def prepare_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *,
    max_length: int | None, name: str = "train", num_proc: int | None = None,
) -> Dataset:  # fmt: skip
    """Tokenise TNT rows. Idempotent: a dataset that has the token columns already is returned as it is.

    Args:
        dataset: Rows with `prompt` and `completion` (texts or chat messages), or with `messages` that end with the
            assistant's, and, optionally, `negative_spans`: pairs
            [start, end) of character offsets into the completion, or into the last assistant message of a chat, whose
            earlier messages count as prompt; `severities`, a factor above 0 on the weight of each of these spans (1
            where left out); and `truncated` (bool), for completions cut off by the sampler, which get no end token.
            Or pretokenised rows: `input_ids`, `labels` (the id, or -100 where not scored) and
            `negative_mask` (true where unwanted).
        tokenizer: A fast one, unless the rows are pretokenised.
        max_length: Limit on the tokens of a row, or None. Longer rows are cut on the right; one warning counts them,
            and the spans that lay behind the cut.
        name: The dataset's name in messages. Only of "train" are tokens of both signs demanded.

    Returns:
        The dataset with `input_ids` and `token_weights` (+1 keep, -1 unwanted, 0 not scored; where there are
        severities they stand in the place of that 1, and all are floats), less the rows in which no token is scored.
        What cannot be used raises a `ValueError` that names the row and the remedy.
    """
    if set(TOKEN_COLUMNS) <= set(dataset.column_names):
        return dataset
    columns, pretokenised = dataset.column_names, set(PRETOKENISED_COLUMNS) <= set(dataset.column_names)
    if "images" in columns or "image" in columns:
        raise ValueError(f"The {name} dataset has images, which TNT does not support: use text columns.")
    has_text = {"prompt", "completion"} <= set(columns) or {"messages", "conversations"} & set(columns)
    if not pretokenised and not has_text:
        needed = f"`prompt` and `completion`, or `messages` (and `negative_spans`), or {_PRETOKENISED}"
        raise ValueError(f"The {name} dataset has the columns {columns}; TNT needs {needed}.")
    if not pretokenised and not tokenizer.is_fast:
        slow = f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where in the text its tokens lie"
        raise ValueError(f"{slow}: load the fast one, or give {_PRETOKENISED}.")
    if not len(dataset):
        raise ValueError(f"The {name} dataset has no rows.")
    kind = float if "severities" in columns and any(dataset["severities"]) else int  # of all rows, as a column has one

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{name} row {index}"
        whole = encode_token_row(row, where) if pretokenised else encode_text_row(row, tokenizer, where)
        weights = list(map(kind, whole.token_weights[:max_length]))
        counts = {
            "kept": weights.count(1),
            "negative": sum(weight < 0 for weight in weights),
            "cut": len(whole.input_ids) > len(weights),
            "vanished": any(whole.token_weights) and not any(weights),
            "spans_cut": sum(end >= len(weights) for end in whole.span_ends),
            "touches_nothing": -1 in whole.span_ends,
        }
        return {"input_ids": whole.input_ids[:max_length], "token_weights": weights, _COUNTS: counts}

    tokenized = dataset.with_format(None).map(  # of any other format the rows would not be plain lists
        tokenize, with_indices=True, num_proc=num_proc, desc=f"Tokenizing {name} dataset",
        remove_columns=["labels", "negative_mask"] if pretokenised else None,
    )  # fmt: skip
    return _settle(tokenized, max_length, name)


def encode_text_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> EncodedRow:
    """A row of text; the completion is tokenised alone, as `core.training.encoding` does, and its end token kept."""
    prompt, message = _split(row if "completion" in row else answered(row, where), where)
    text, truncated = message["content"], row.get("truncated")
    spans = check_spans(row.get("negative_spans"), len(text), where)
    severities = check_severities(row.get("severities"), len(spans), where)
    if truncated not in (None, False, True):
        raise ValueError(f"{where}: `truncated` must be true or false, got {truncated!r:.80}.")
    try:
        prompt_ids = encode_prompt(tokenizer, prompt, f"{where}: `prompt`")
        if not isinstance(prompt, str):
            shift, text = _as_rendered(tokenizer, prompt, message)
            spans = [(start - shift, end - shift) for start, end in spans]
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
    end_id = end_token_id(tokenizer, not isinstance(prompt, str))
    text = text.removesuffix(tokenizer.decode([end_id]))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), cover_text(encoded["offset_mapping"], text)
    signs: list[float] = [1] * len(ids)
    ends = []
    for span, severity in zip(spans, severities, strict=True):
        touched = [i for i, hit in enumerate(negative_tokens(offsets, [span])) if hit]
        for i in touched:
            signs[i] = min(signs[i], -severity)  # the worst of the spans it is in
        ends.append(len(prompt_ids) + touched[-1] if touched else -1)
    if not (truncated and ids):
        ids, signs = [*ids, end_id], [*signs, 1]
    return EncodedRow(prompt_ids + ids, [0] * len(prompt_ids) + signs, ends)


def encode_token_row(row: dict[str, Any], where: str) -> EncodedRow:
    """A row with `input_ids`, `labels` and `negative_mask` (None: nothing is unwanted)."""
    ids, labels, mask = (row[column] for column in PRETOKENISED_COLUMNS)
    mask = [False] * len(ids or []) if mask is None else mask
    for column, values in zip(PRETOKENISED_COLUMNS, (ids, labels, mask), strict=True):
        if not isinstance(values, list) or len(values) != len(ids):
            got = f"{len(values)} for {len(ids)} `input_ids`" if isinstance(values, list) else f"{values!r:.80}"
            raise ValueError(f"{where}: `{column}` must be a list, one entry per token, got {got}.")
    for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (-100, token):
            raise ValueError(
                f"{where}: `labels[{t}]` is {label}, which is neither -100 (not scored) nor `input_ids[{t}]` "
                f"({token}): labels are not shifted here, and an unwanted token is marked in `negative_mask`."
            )
    signs = [0 if label == -100 else -1 if marked else 1 for label, marked in zip(labels, mask, strict=True)]
    signs[:1] = [0] * len(signs[:1])  # nothing predicts the first token
    return EncodedRow(ids, signs, [t if signs[t] else -1 for t, marked in enumerate(mask) if marked])


def is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and m.get("role") for m in value)


def _split(row: dict[str, Any], where: str) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """The prompt, with all but the last message of a chat's completion, and that message, which spans point into."""
    prompt, completion = row["prompt"], row["completion"]
    for column, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str) and not is_chat(value):
            raise ValueError(f"{where}: `{column}` must be a text or a list of chat messages, got {value!r:.80}.")
    if isinstance(completion, str):
        return prompt, {"role": "assistant", "content": completion}
    if isinstance(prompt, str):
        raise ValueError(f"{where}: `completion` is a chat and `prompt` a text: give both in the same form.")
    last = completion[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise ValueError(f"{where}: `completion` must end with an assistant message of text, got {last!r:.80}.")
    if last.get("tool_calls"):
        raise ValueError(f"{where}: `completion` ends with tool calls, in which no character can be marked: drop it.")
    # A data set fills the keys that other messages have with None, which templates take for given ones
    before = [{key: value for key, value in m.items() if value is not None} for m in prompt + completion[:-1]]
    return before, last


def _as_rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]], message: dict[str, Any]
) -> tuple[int, str]:
    """How many characters in front of a message the chat template drops, and what it writes of the message.

    White space around it may be missing there, or be added. A template that changes more, as those that write or take
    off thoughts, has no say: what stands behind the generation prompt is what the model wrote there.
    """
    opened: Any = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole: Any = tokenizer.apply_chat_template([*prompt, message], tokenize=False)
    content, behind = message["content"], whole[len(opened) :]
    core, written = content.strip(), behind.lstrip()
    if not whole.startswith(opened) or not written.startswith(core):
        say_once("The chat template changes answers: they are trained on as they are, behind its generation prompt.")
        return 0, content
    first = len(content) - len(content.lstrip())
    last = first + len(core)
    # White space is kept as far as the template wrote it: the last of that in front, the first of that behind
    first -= len(commonprefix((content[:first][::-1], behind[: len(behind) - len(written)][::-1])))  # noqa: RUF071
    last += len(commonprefix((content[last:], written[len(core) :])))  # noqa: RUF071 (characters are meant)
    return first, content[first:last]


def _settle(dataset: Dataset, max_length: int | None, name: str) -> Dataset:
    """Warn once of what was cut or dropped, and refuse a training set from which nothing can be learnt."""
    counts = list(dataset[_COUNTS])
    dataset = dataset.remove_columns(_COUNTS)
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    scored = [i for i, count in enumerate(counts) if count["kept"] or count["negative"]]
    unscored = len(counts) - len(scored) - total["vanished"]

    def first(key: str) -> str:
        return next((f" (first: row {i})" for i, count in enumerate(counts) if count[key]), "")

    parts = [
        (total["cut"], f"are longer than max_length={max_length} and were cut on the right{first('cut')}"),
        (total["vanished"], "of these had no completion left and were dropped"),
        (total["spans_cut"], "negative spans lay behind the cut, wholly or in part"),
        (unscored, "have no scored token and were dropped"),
        (total["touches_nothing"], f"have negative spans that touch no scored token{first('touches_nothing')}"),
    ]
    if said := [f"{count} {what}" for count, what in parts if count]:
        logger.warning("Of %d %s rows, %s.", len(counts), name, "; ".join(said))
    if not scored:
        remedy = f"raise max_length={max_length}" if total["vanished"] else "check `labels`, which are all -100"
        raise ValueError(f"No {name} row is left, for none has a scored token: {remedy}.")
    if name == "train" and not total["negative"]:
        cut = f"{total['spans_cut']} negative spans lay behind max_length={max_length}, so raise it"
        remedy = cut if total["spans_cut"] else "mark what is unwanted in `negative_spans` (or `negative_mask`)"
        raise ValueError(f"No token of the {name} dataset is negative, so TNT has nothing to remove: {remedy}.")
    if name == "train" and not total["kept"]:
        remedy = "mark only the unwanted part of each completion, or add rows without spans"
        raise ValueError(f"Every scored token of the {name} dataset is negative, so nothing holds the rest: {remedy}.")
    return dataset if len(scored) == len(counts) else dataset.select(scored)


def check_spans(spans: Any, length: int, where: str, column: str = "negative_spans") -> list[tuple[int, int]]:
    """The spans of one row as pairs of integers, in order; a `ValueError` that names `where` and `column` refuses one
    that is no pair, is reversed, or points outside the text of `length` characters. They may overlap and be empty.
    """
    if spans is None:
        return []
    if isinstance(spans, (str, bytes, dict)) or not hasattr(spans, "__len__"):
        raise ValueError(f"{where}: `{column}` must be a list of [start, end] pairs, got {spans!r:.80}.")
    checked = []
    for i, span in enumerate(spans):
        numbers = [] if isinstance(span, (str, bytes, dict)) or not hasattr(span, "__len__") else list(span)
        whole = all(isinstance(offset, Integral) and not isinstance(offset, bool) for offset in numbers)
        if len(numbers) != 2 or not whole:
            raise ValueError(f"{where}: `{column}[{i}]` must be a pair of integers [start, end], got {span!r:.80}.")
        start, end = map(int, numbers)
        if not 0 <= start <= end <= length:
            raise ValueError(
                f"{where}: `{column}[{i}]` is [{start}, {end}), reversed or outside the completion, of {length} "
                "characters: count from 0, no bytes or UTF-16 units, into the last assistant message of a chat."
            )
        checked.append((start, end))
    return checked


def check_severities(severities: Any, number: int, where: str) -> list[float]:
    """The severities of a row's spans, 1 each where there are none; a `ValueError` names `where` what is no list of
    so many numbers above 0."""
    if severities is None:
        return [1] * number
    values = list(severities) if hasattr(severities, "__len__") and not isinstance(severities, str) else None
    good = values is not None and all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values)
    if values is None or not good or len(values) != number:
        wanted = f"one number above 0 for each of the {number} `negative_spans`"
        raise ValueError(f"{where}: `severities` must be a list with {wanted}, got {severities!r:.80}.")
    return values


def negative_tokens(offsets: Sequence[Sequence[int]], spans: Sequence[Sequence[int]]) -> list[bool]:
    """Which tokens, `(a, b)` in characters, overlap a span: one unwanted character makes a token unwanted.

    An empty span overlaps nothing, and a token without characters (`a == b`) is never negative. The byte tokens of one
    character share its offsets, and so its fate; " here" with its space is unwanted if "here" is.
    """
    spans = [(start, end) for start, end in spans if start < end]
    return [a < b and any(a < end and start < b for start, end in spans) for a, b in offsets]


def cover_text(offsets: Sequence[Sequence[int]], text: str) -> list[tuple[int, int]]:
    """The offsets, widened so that no character between two tokens belongs to none: else, what a span on it alone
    marks would be kept. Some tokenizers trim spaces off offsets, or drop an accent that they merge into its letter.
    Spaces go to the token behind them (as byte-level tokens have them), other characters to the token, or the byte
    tokens of one character, before them.
    """
    covered: list[tuple[int, int]] = []
    end = 0  # of the text covered so far
    for a, b in [*offsets, (len(text), len(text))]:
        if a > end:
            split = end + len(text[end:a].rstrip()) if covered else end
            for i in range(len(covered) - 1, -1, -1):
                if covered[i][1] != end:
                    break
                covered[i] = (covered[i][0], split)
            a = split
        covered.append((a, b))
        end = max(end, b)
    return covered[:-1]
