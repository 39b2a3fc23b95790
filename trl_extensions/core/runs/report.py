"""The run report every method writes: one `report.md` a person reads, its numbers in `report.json`, its figures."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class RunReport:
    """Collects sections under a title, and numbers in `data`, and writes them together."""

    def __init__(self, title: str):
        self._lines = [f"# {title}", ""]
        self.data: dict[str, Any] = {}

    def heading(self, text: str) -> None:
        self._lines += [f"## {text}", ""]

    def text(self, text: str) -> None:
        self._lines += [text, ""]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A Markdown table; bars and line breaks inside cells are escaped."""
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
        file.write(text.encode("utf-8"))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of n; nan for fewer than two values)."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.nan


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", "<br>")
