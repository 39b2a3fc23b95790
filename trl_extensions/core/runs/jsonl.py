"""Append-only JSON lines that survive a kill: every row is on disk before the next one is made."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
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
    """
    Appends rows to a JSON-lines file, one durable line at a time.

    A process killed while it writes leaves at most one half-written last line. Opening the file again moves that
    fragment to `<path>.broken` and logs one line; every complete line stays as it was. A complete last row that only
    lacks its newline gets the newline, so that the next row is not glued to it. Safe to share between threads; a
    second writer of the same file is refused.

    Args:
        path (`str` or `os.PathLike`):
            File to append to. It and its parent directories are created if missing.
        sync_seconds (`float`, *optional*, defaults to `0.0`):
            A row survives the death of this process at once. That of the machine it survives at once with 0, and with
            more after as many seconds, which is faster by far where rows come by the hundred.

    Example:

    ```python
    with JsonlWriter("rows.jsonl") as writer:
        writer.append({"prompt": "Hi", "completion": "Hello."})
    ```

    Raises:
        `ValueError`: if another process is writing to the file.
    """

    def __init__(self, path: str | os.PathLike[str], sync_seconds: float = 0.0) -> None:
        self.path = Path(path)
        self._sync_seconds = sync_seconds
        self._synced = time.monotonic()
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
        if created:
            _sync_directory(self.path.parent)

    def append(self, row: dict[str, Any]) -> int:
        """
        Writes one row and returns once it is on disk.

        Returns:
            `int`: the bytes of its line.

        Text that UTF-8 cannot hold (lone surrogates, which some servers return) is written as `?`.

        Raises:
            `TypeError`: if `row` is not a `dict`, or holds a value JSON cannot express. Nothing is written.
            `ValueError`: if `row` holds NaN or an infinity, or the writer is closed. Nothing is written.
            `OSError`: if the disk refuses the line. What was written of it is taken back.
        """
        if not isinstance(row, dict):
            raise TypeError(f"a row of {self.path} must be a dict, got {type(row).__name__}")
        try:
            data = encode_row(row)
        except (TypeError, ValueError) as error:
            raise type(error)(f"row not written to {self.path}: {error}; columns {sorted(map(str, row))}") from None
        self._write(data)
        return len(data)

    def close(self) -> None:
        """Closes the file. Closing twice does nothing."""
        with self._lock:  # a row that another thread is writing is not cut off
            if not self._file.closed and self._sync_seconds:
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
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

    def _repair_last_line(self) -> None:
        start, tail = self._last_line()
        if not tail:
            return
        if parse_row(tail) is not None:
            self._write(b"\n")
            return
        broken = self.path.with_name(self.path.name + ".broken")
        # The fragment is safe in the second file before the first one loses it.
        with open(broken, "ab") as file:
            file.write(tail + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._file.truncate(start)
        os.fsync(self._file.fileno())
        logger.warning("%s ended in a half-written line (%d bytes): moved it to %s", self.path, len(tail), broken.name)

    def _last_line(self) -> tuple[int, bytes]:
        """Offset and bytes of what follows the last newline, read backwards in blocks."""
        position = self._file.seek(0, os.SEEK_END)
        tail = b""
        while position > 0:
            step = min(position, 1 << 16)
            position -= step
            self._file.seek(position)
            tail = self._file.read(step) + tail
            newline = tail.rfind(b"\n")
            if newline >= 0:
                return position + newline + 1, tail[newline + 1 :]
        return 0, tail


def read_jsonl(path: str | os.PathLike[str], *, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """
    Reads a JSON-lines file.

    Empty lines are skipped. A last line that a crash cut short (no newline and not a complete JSON object) is skipped
    with a logged warning; the file itself is left alone, and [`JsonlWriter`] repairs it when it next appends.

    Args:
        path (`str` or `os.PathLike`):
            File to read, UTF-8.
        required (`Sequence[str]`, *optional*, defaults to `()`):
            Columns every row must have.

    Returns:
        `list[dict]`: the rows in file order.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: naming the file and the line, if a line is not a JSON object or a required column is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path, or write the file first")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line)
        if row is None:
            if number == len(lines):
                logger.warning("%s:%d: skipped a half-written last line (%d bytes)", path, number, len(line))
                continue
            raise ValueError(f"{path}:{number}: {_what_is_wrong(line)}; fix or delete this line")
        missing = [column for column in required if column not in row]
        if missing:
            raise ValueError(
                f"{path}:{number}: column {missing[0]!r} is missing; the row has {sorted(row)}, "
                f"and every row needs {list(required)}"
            )
        rows.append(row)
    return rows


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all; an earlier file is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines(map(encode_row, rows))


def _what_is_wrong(line: bytes) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError as error:
        return f"not valid JSON ({error})"
    return f"expected a JSON object, got {type(value).__name__}"


def _claim(file: IO[bytes]) -> None:
    """Refuse a file that another writer has open; the system forgets the claim of a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{file.name}: another process is writing to it; wait for it, or use another output"
        ) from None
    except OSError:  # a file system without locks
        return


def _sync_directory(directory: Path) -> None:
    """Makes a new file's directory entry durable, where the system lets a directory be opened."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
