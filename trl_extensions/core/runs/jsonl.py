"""Append-only JSON lines that survive a kill: every row is on disk before the next one is made."""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from .report import replacing


logger = logging.getLogger(__name__)


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row a line holds, or `None` if the line is not one complete JSON object in UTF-8."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        return None
    return row if isinstance(row, dict) else None


def encode_row(row: dict[str, Any]) -> bytes:
    """The line of a row. Half a surrogate pair (a broken emoji), which UTF-8 cannot hold, becomes `?`."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="replace")


class JsonlWriter:
    """Appends rows to a JSON-lines file, one durable line at a time. Use it as a context manager, or `close` it.

    A kill leaves at most one half-written last line; opening the file again moves it to `<path>.broken` and logs that.
    Safe to share between threads; a `ValueError` refuses a file that another process is writing to. A row survives the
    death of the process at once, and that of the machine after `sync_seconds`, of which more than 0 are faster by far.
    """

    def __init__(self, path: str | os.PathLike[str], sync_seconds: float = 0.0) -> None:
        self.path = Path(path)
        self._sync_seconds, self._synced = sync_seconds, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        created = not self.path.exists()
        self._lock = threading.Lock()
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            _claim(self._file)
            self._repair_last_line()
        except BaseException:
            self._file.close()
            raise
        if created and os.name != "nt":  # the directory's new entry
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and return once it is on disk. What JSON cannot express is refused and what the disk refuses
        (`OSError`) taken back, so that nothing is written."""
        if not isinstance(row, dict):
            raise TypeError(f"a row of {self.path} must be a dict, got {type(row).__name__}")
        try:
            data = encode_row(row)
        except (TypeError, ValueError) as error:
            raise type(error)(f"row not written to {self.path}: {error}; columns {sorted(map(str, row))}") from None
        with self._lock:
            size = self._file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(data)
                while rest:  # an unbuffered write may be short
                    rest = rest[self._file.write(rest) :]
                if time.monotonic() - self._synced >= self._sync_seconds:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()
            except OSError as error:
                # Without this, a full disk would leave a fragment that the next row is glued to.
                self._file.truncate(size)
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        with self._lock:  # a row that another thread is writing is not cut off
            if not self._file.closed and self._sync_seconds:
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _repair_last_line(self) -> None:
        if not self._file.seek(0, os.SEEK_END):
            return
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        if not tail:
            return
        if parse_row(tail) is not None:
            self._file.write(b"\n")
        else:
            broken = self.path.with_name(self.path.name + ".broken")
            with open(broken, "ab") as file:  # the fragment is safe here before the file itself loses it
                file.write(tail + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._file.truncate(start)
            logger.warning("%s ended in a half-written line: moved its %d bytes to %s", self.path, len(tail), broken)
        os.fsync(self._file.fileno())


def read_jsonl(path: str | os.PathLike[str], *, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Empty lines are skipped, and with a warning a last line that a crash cut short;
    another one that is no JSON object, or lacks a column `required`, raises a `ValueError` with file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path, or write the file first")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line)
        if row is not None:
            if missing := [column for column in required if column not in row]:
                raise ValueError(f"{path}:{number}: column {missing[0]!r} is missing; the row has {sorted(row)}")
            rows.append(row)
        elif number == len(lines) and not line.lstrip().startswith(b"["):  # a whole list is no fragment of an object
            logger.warning("%s:%d: skipped a half-written last line (%d bytes)", path, number, len(line))
        else:
            raise ValueError(f"{path}:{number}: {_what_is_wrong(line)}; fix or delete this line")
    return rows


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all; an earlier file is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines(map(encode_row, rows))


def _what_is_wrong(line: bytes) -> str:
    try:
        return f"expected a JSON object, got {type(json.loads(line)).__name__}"
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError as error:
        return f"not valid JSON ({error})"


def _claim(file: IO[bytes]) -> None:
    """Refuse a file that another writer has open; the system forgets the claim of a process that dies."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name}: another process is writing to it; wait, or use another output") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        return
