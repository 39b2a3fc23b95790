"""The kept pairs of a run as training data, and the history of each."""

import json
import os
import random
import re
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

from ..core.generation import parse_engine
from ..core.generation.replies import Unreadable, answer_text
from ..core.runs.jsonl import encode_row, parse_row, read_jsonl
from ..core.runs.report import quoted, replacing, write_atomically
from ..embedded import public_name
from .config import CodecLMConfig
from .pipeline.filters import InstructionFilters, Screens, count_words, plain_words


_SCREENED_AT_ONCE = 64
_OF_TRAINING = ("prompt", "completion", "metadata", "scores")


def stream_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Byte offset and content of every row of a JSON-lines file, if it is there; a half-written last line is left out.
    Raises `ValueError`, naming the line, for any other that is no row."""
    if not Path(path).exists():
        return
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = parse_row(line)
            if row is not None:
                yield offset, row
            elif line.strip() and line.endswith(b"\n"):
                raise ValueError(f"{path}: line {number} is not a JSON object; correct or delete it")
            offset += len(line)


@dataclass(frozen=True)
class ExportReport:
    """Of an export: the data, finished instructions, those kept by the run, those in the data (`rows`), why others of
    `kept` are not, and by benchmark file the instructions dropped because of it."""

    path: Path
    items: int
    kept: int
    rows: int
    reasons: dict[str, int]
    contaminated: dict[str, int]

    @property
    def summary(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{self.path}: {self.rows} pairs of {self.kept} kept, left out: {dropped or 'none'}"


def export(
    folder: str | os.PathLike, config: CodecLMConfig, seed: int = 0, *, layout: str = "prompt_completion"
) -> ExportReport:
    """Write `data.jsonl` from the items of a run: in order of their ids, whatever order they were finished in.

    The instruction filters are applied again, to the versions that were kept: against each other, in order of id, and
    against all seeds. Also written are `export.json`, the counts, and `export_drops.jsonl`, the reason for each kept
    item that is not in the data. `layout` is "prompt_completion", TRL's conversational columns, or "messages", one
    column in their place; `seed` is that of the draw for `max_rows`. Raises a `ValueError` that names line or id if
    there is no `items.jsonl`, an item cannot be read, or two have the same id.
    """
    if layout not in ("prompt_completion", "messages"):
        raise ValueError(f"`layout` must be prompt_completion or messages, got {layout!r}.")
    folder = Path(folder)
    items, filters = folder / "items.jsonl", InstructionFilters(config)
    places, seeds, total = _survey(items)
    for text in seeds:
        filters.add(f"the seed {text[:60]!r}", text)
    reasons: Counter[str] = Counter()
    contaminated: Counter[str] = Counter()
    with replacing(folder / "export_drops.jsonl") as drops, open(items, "rb") as source:

        def drop(id: str, reason: str) -> None:
            reasons[reason] += 1
            detail = filters.details.pop(id, "")
            if reason == "contaminated":
                contaminated[detail.rpartition(", row ")[0]] += 1
            drops.write(encode_row({"id": id, "reason": reason, "detail": detail or None}))

        good = array("Q", _good_offsets(source, places, config, filters, drop))
        chosen = set(range(len(good)))
        if config.max_rows is not None and len(good) > config.max_rows:
            chosen = set(random.Random(seed).sample(range(len(good)), config.max_rows))
        with replacing(folder / "data.jsonl") as data:
            for number, offset in enumerate(good):
                item = _item_at(source, offset)
                if number in chosen:
                    data.write(encode_row(exported_row(item, layout)))
                else:
                    drop(item["id"], "not drawn")
    numbers = total, len(places), len(chosen)
    report = ExportReport(folder / "data.jsonl", *numbers, dict(sorted(reasons.items())), dict(contaminated))
    values = asdict(report) | {"path": report.path.name, "layout": layout}
    write_atomically(folder / "export.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "README.md", dataset_card(config, report))
    return report


def dataset_card(config: CodecLMConfig, report: ExportReport) -> str:
    """The card of `data.jsonl` as a data set of the hub: where it comes from and how it was chosen."""
    from huggingface_hub import DatasetCardData

    files = [{"config_name": "default", "data_files": report.path.name}]
    languages, tags = config.languages or None, ["synthetic", "codeclm", "instruction-tuning"]
    head = DatasetCardData(language=languages, task_categories=["text-generation"], tags=tags, configs=files)
    roles = {role: getattr(config, role) for role in ("strong", "target", "scorer") if getattr(config, role)}
    models = [
        f"{role}: {public_name(str(parse_engine(own, role).arguments.engine_model))}" for role, own in roles.items()
    ]
    left_out = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items()) or "none"
    source = Path(config.prompts or config.metadata or "").name or "metadata"
    lines = (
        f"Instructions that language models made from `{source}`, with answers, by CodecLM (arXiv 2404.05875).",
        f"Models: {quoted('; '.join(models))}.",
        f"{report.rows} pairs of {report.items} instructions. Kept by `selection: {config.selection}` were "
        f"{report.kept}; of these left out: {quoted(left_out)}.",
        "Nobody has read the pairs. What licence they can have depends on those of the seeds and of the models.",
    )
    return f"---\n{head.to_yaml()}\n---\n\n# Instruction data by CodecLM\n\n" + "\n\n".join(lines) + "\n"


def exported_row(item: dict[str, Any], layout: str = "prompt_completion") -> dict[str, Any]:
    """The row of training data that a kept item becomes."""
    version, answer = _kept_version(item)
    prompt = [{"role": "user", "content": version["instruction"]}]
    completion = [{"role": "assistant", "content": answer}]
    rounds = item["rounds"][: item["iteration"]]
    columns = {"prompt": prompt, "completion": completion}
    return (columns if layout == "prompt_completion" else {"messages": prompt + completion}) | {
        "metadata": {name: item["metadata"][name] for name in ("use_case", "skills")},
        "scores": version.get("scores"),
        **{name: item[name] for name in ("winner", "iteration")},
        "lineage": {
            **{name: item.get(name) for name in ("id", "seed", "scoring")},
            "basic": rounds[0]["instruction"],
            "rewrites": [{name: own.get(name) for name in ("action", "instruction")} for own in rounds[1:]],
            "gaps": [own["scores"]["gap"] for own in rounds if own.get("scores")],
        },
    }


def _survey(path: Path) -> tuple[list[tuple[str, int]], list[str], int]:
    """Ids and offsets of the kept items in order of id (i2 before i10), all seeds, and the number of all items."""
    if not path.exists():
        raise ValueError(f"{path} is missing: nothing to export; run `trl-ext codeclm run` first")
    places: list[tuple[str, int]] = []
    seeds = {text for _, row in stream_rows(path.with_name("metadata.jsonl")) for text in row.get("seeds") or ()}
    total = 0
    for offset, item in stream_rows(path):
        total += 1
        if item.get("seed"):
            seeds.add(item["seed"])
        if item["outcome"] == "kept":
            places.append((item["id"], offset))
    places.sort(key=lambda place: (re.sub("[0-9]+", lambda digits: digits[0].zfill(20), place[0]), place[0]))
    for (id, _), (following, _) in pairwise(places):
        if id == following:
            raise ValueError(f"{path}: two items have the id {id!r}; delete one of them")
    return places, sorted(seeds), total


def _good_offsets(
    source: IO[bytes],
    places: list[tuple[str, int]],
    config: CodecLMConfig,
    filters: InstructionFilters,
    drop: Callable[[str, str], None],
) -> Iterator[int]:
    """Offset of each kept pair that all filters let pass."""
    screens = Screens(config)
    waiting = iter(places)
    while batch := list(islice(waiting, _SCREENED_AT_ONCE)):
        passed = []
        for id, offset in batch:
            item = _item_at(source, offset)
            version, answer = _kept_version(item)
            truncated = (version.get("truncated") or {}).get(item["winner"])
            reason = _wrong_answer(answer, truncated, config)
            if config.language and not reason and (language := filters.foreign(answer)):
                reason, filters.details[id] = "language", language
            if reason := reason or filters.check(id, version["instruction"]):
                drop(id, reason)
            else:
                passed.append((id, offset, (version["instruction"], answer)))
        found = screens.find([pair for *_, pair in passed])
        for (id, offset, _), screen in zip(passed, found, strict=True):
            if screen:
                drop(id, f"screened: {screen}")
            else:
                yield offset


def _wrong_answer(answer: str, truncated: bool | None, config: CodecLMConfig) -> str | None:
    if truncated and not config.keep_truncated:
        return "cut off"
    try:
        if answer_text(answer) != answer.strip():  # of a run of an earlier version
            return "thoughts in it"
    except Unreadable:
        return "thoughts in it"
    most = config.max_answer_words
    return "answer too long" if most is not None and count_words(plain_words(answer)) > most else None


def _kept_version(item: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The round that was kept, and the winner's answer in it."""
    try:
        version = item["rounds"][item["iteration"] - 1]
        return version, version["answers"][item["winner"]]
    except (KeyError, IndexError, TypeError):
        id = item.get("id")
        what = "lacks its version or the winner's answer; delete its line and run again"
        raise ValueError(f"items.jsonl: item {id!r} is kept, but {what}") from None


def _item_at(source: IO[bytes], offset: int) -> dict[str, Any]:
    source.seek(offset)
    return json.loads(source.readline())


def load_pairs(data: Path) -> list[dict[str, Any]]:
    """Exported rows, with an `id` of their own: that of their lineage, or their place in the file."""
    rows = read_jsonl(data, required=("prompt", "completion"))
    if not rows:
        raise ValueError(f"{data} holds no pairs to train on: the report says what was dropped.")
    ids = [(row.get("lineage") or {}).get("id", f"row {place}") for place, row in enumerate(rows)]
    return [{"id": own} | {name: row.get(name) for name in _OF_TRAINING} for own, row in zip(ids, rows, strict=True)]


# The history of one instruction, to be read in a terminal


def describe(folder: str | os.PathLike, id_or_row: str | int, *, longest: int | None = None) -> str:
    """What became of an instruction, by its id or the number of its row in `data.jsonl` (from 1), and its row of
    `items.jsonl` as YAML, texts cut after `longest` characters. `ValueError`, with the closest ids, if there is none.
    """
    import yaml

    folder, id = Path(folder), str(id_or_row)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the `output_dir` of a run")
    exported = [row["lineage"]["id"] for _, row in stream_rows(folder / "data.jsonl")]
    if id.isdecimal():
        if not 1 <= int(id) <= len(exported):
            raise ValueError(f"{folder / 'data.jsonl'} has {len(exported)} rows, no row {id}; they are counted from 1")
        id = exported[int(id) - 1]
    item = _find(folder / "items.jsonl", "id", id) or _find(folder / "basics.jsonl", "id", id)
    if item is None:
        known = sorted({row["id"] for name in ("items", "basics") for _, row in stream_rows(folder / f"{name}.jsonl")})
        at = bisect(known, id)
        there = f"there is {', '.join(known[max(0, at - 2) : at + 1])}" if known else "the run has not come to any yet"
        raise ValueError(f"{folder} has no instruction {id!r}; {there}")
    lines = [f"{id}: {_outcome(item)}"]
    if id in exported:
        lines.append(f"exported as row {exported.index(id) + 1} of data.jsonl")
    elif drop := _find(folder / "export_drops.jsonl", "id", id):
        lines.append(f"not exported: {drop['reason']}" + (f" ({drop['detail']})" if drop.get("detail") else ""))
    shown = {name: value for name, value in item.items() if name not in ("id", "outcome", "reason") and value}
    if aside := _find(folder / "set_aside.jsonl", "about", id):
        shown["set_aside"] = aside

    class Dumper(yaml.SafeDumper):
        """Texts of several lines as they are, not in quotation marks."""

    style = {True: "|", False: None}
    tag = "tag:yaml.org,2002:str"
    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(tag, text, style=style["\n" in text]))
    text = yaml.dump(_cut(shown, longest), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    return _printable("\n".join(lines) + "\n" + text)


def _outcome(item: dict[str, Any]) -> str:
    if "outcome" not in item:
        return "not finished yet; the same run goes on with it"
    if item["outcome"] == "kept":
        return f"kept as version {item.get('iteration')}, with the {item.get('winner')} model's answer"
    return item["outcome"].replace("_", " ") + (f": {item['reason']}" if item.get("reason") else "")


def _find(path: Path, name: str, value: str) -> dict[str, Any] | None:
    return next((row for _, row in stream_rows(path) if row.get(name) == value), None)


def _cut(value: Any, longest: int | None) -> Any:
    """A value with its texts cut, without carriage returns and white space that YAML would have to quote."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        own = {name: _cut(part, longest) for name, part in pairs}
        return own if isinstance(value, dict) else list(own.values())
    if not isinstance(value, str):
        return value
    text = "\n".join(line.rstrip() for line in value.strip().splitlines())
    too_long = longest is not None and len(text) > longest
    return f"{text[:longest].rstrip()} [... {len(text)} characters]" if too_long else text


def _printable(text: str) -> str:
    """Without signs that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000\xa0" else json.dumps(c)[1:-1] for c in text)
