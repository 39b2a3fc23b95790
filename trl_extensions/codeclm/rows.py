"""Read the files of a run row by row, however long they are."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.runs.jsonl import parse_row


logger = logging.getLogger(__name__)


def stream_rows(path: str | os.PathLike, *, skip_unreadable: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Byte offset and content of every row of a JSON-lines file that may still be written to; nothing if it is
    missing. A half-written last line is left out.

    Args:
        path: The file.
        skip_unreadable: Leave out any line that is no JSON object; their number is logged.

    Raises:
        ValueError: A line is no JSON object; names it.
    """
    if not Path(path).exists():
        return
    offset = broken = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = parse_row(line)
            if row is not None:
                yield offset, row
            elif skip_unreadable:
                broken += 1
            elif line.strip() and line.endswith(b"\n"):
                raise ValueError(f"{path}: line {number} is not a JSON object; correct or delete it")
            offset += len(line)
    if broken:
        logger.warning("%s: %d lines cannot be read and are left out", path, broken)
