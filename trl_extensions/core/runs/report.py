"""The run report every method writes: one `report.md` a person reads, its numbers in `report.json`, its figures."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


# What begins markup in Markdown of any kind; a backslash takes that from it, or an entity where not all have one
_MARKUP = re.compile(r"[\\`*|<~]|&(?=#?\w+;)|:(?=//)|(?<=www)\.|\](?=[(\[:])|!(?=\[)|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", "&": "&amp;", ":": "&#58;", "~": "&#126;"}
# Control characters, those that turn the direction of what follows, halves of surrogate pairs
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Markdown(str):
    """A text that is Markdown already; a report takes it as it is."""


def quoted(text: str, longest: int = 1500) -> Markdown:
    """What a model or a person wrote, as one line of Markdown that shows just that: no markup, link, picture or HTML,
    nothing that acts unseen, and no more than `longest` characters. For every name and text in a report."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    lines = [_UNSEEN.sub("\ufffd", line) for line in text.strip("\r\n").splitlines()]
    return Markdown("<br>".join(_MARKUP.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), line) for line in lines))


class RunReport:
    """Collects sections under a title, and numbers in `data`, and writes them together. Titles and cells are quoted;
    `text` takes Markdown."""

    def __init__(self, title: str):
        self._lines = [f"# {quoted(title)}", ""]
        self.data: dict[str, Any] = {}

    def verdict(self, kind: str, sentence: str, numbers: str = "") -> None:
        """What came of it, first of all: a sentence, kept under "verdict" in `data` with its kind, and its numbers."""
        self.text(f"**{sentence}** {numbers}".rstrip())
        self.data["verdict"] = {"kind": kind, "text": sentence}

    def heading(self, text: str) -> None:
        self._lines += [f"## {quoted(text)}", ""]

    def text(self, text: str) -> None:
        self._lines += [text, ""]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A Markdown table of numbers and of texts, which are `quoted` but for those that are `Markdown`."""
        table = [header, ["---"] * len(header), *rows]
        self._lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table] + [""]

    def figure(self, name: str, caption: str) -> None:
        self._lines += [f"![{caption}]({name})", "", f"*{caption}*", ""]

    def write(self, folder: str | os.PathLike) -> Path:
        """Write `report.md` and `report.json` (what is in `data`) into a folder; returns the path of the former."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", json.dumps(self.data, indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / "report.md", "\n".join(self._lines).rstrip() + "\n")
        return folder / "report.md"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` once it is whole and on disk; on an error it is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace a file's text so that a kill leaves the old or the new one, never a part."""
    with replacing(Path(path)) as file:
        file.write(text.encode("utf-8", errors="replace"))  # halves of surrogate pairs cannot be written


NOT_TRAINED = "Training did nothing, its loss did not fall: raise `learning_rate`, or train for longer."


def first_true(*cases: tuple[str, Any, str]) -> tuple[str, str]:
    """Kind and sentence of the first case `(kind, whether it holds, sentence)` that holds: how verdicts are found."""
    return next((kind, sentence) for kind, holds, sentence in cases if holds)


def loss_stayed(log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last third of the losses in a trainer's `log_history` is, on average, not below the first third."""
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    part = max(1, len(losses) // 3)
    return len(losses) > 1 and sum(losses[-part:]) >= sum(losses[:part])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of n; nan for fewer than two values)."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.nan


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value if isinstance(value, Markdown) else quoted(str(value))
