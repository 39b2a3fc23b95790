"""Calls of language models on disk: every finished one is a line of a file, and none is made twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from ..runs.jsonl import JsonlWriter, parse_row
from .types import Generation, GenerationParams, Prompt


logger = logging.getLogger(__name__)

_KEY = b'{"key": "'
_KEY_LENGTH = 32


@dataclass(frozen=True)
class Call:
    """A question to a language model.

    Args:
        step: What it is asked for, such as "encode".
        engine: Name of the engine that is asked.
        prompt: Text or chat.
        params: How the answer is decoded; its seed tells equal questions apart.
        options: If there are any, the answer is not written: what is asked for is the log-probability, in nats, that
            it begins with each of them.
    """

    step: str
    engine: str
    prompt: Prompt
    params: GenerationParams
    options: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits that stand for all of it."""
        content = [self.step, self.engine, self.prompt, self.params.as_dict(), self.options]
        data = json.dumps(content, sort_keys=True).encode("utf-8")
        return hashlib.sha256(data).hexdigest()[:_KEY_LENGTH]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Args:
        text: The answer; empty for a call with options.
        finish_reason: "stop", or "length" where the token limit cut the answer off.
        num_tokens: Tokens written.
        num_prompt_tokens: Tokens read, 0 where the engine does not say.
        logprobs: In nats, one for each option of the call.
    """

    text: str = ""
    finish_reason: str = "stop"
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    logprobs: tuple[float, ...] | None = None

    @classmethod
    def of(cls, generation: Generation) -> Reply:
        # Half a surrogate pair cannot be written: the run that reads it back must not see another text than this one
        text = generation.text.encode("utf-8", errors="replace").decode("utf-8")
        return cls(text, generation.finish_reason, generation.num_tokens, generation.num_prompt_tokens)


class CallLog:
    """The finished calls of a run, in a JSON-lines file. Safe to share between threads, not between processes.

    A line holds `key`, `step`, `engine`, `prompt`, `params`, `reply` and, where there are any, `options`. In memory
    there are sixteen bytes a call, whatever its texts are.

    A line that cannot be read, as a machine that lost its power may leave one, costs that call and a warning.

    Args:
        path: The file; made if missing.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._writer = JsonlWriter(self.path, sync_seconds=1.0)
        self._lock = threading.Lock()
        self._known = _KeyIndex()
        broken = 0
        with open(self.path, "rb") as lines:
            offset = 0
            for line in lines:
                if line.startswith(_KEY) and line.endswith(b"}\n"):
                    self._known.add(_hash_of(line[len(_KEY) : len(_KEY) + _KEY_LENGTH]), offset)
                else:
                    broken += 1
                offset += len(line)
        self._end = offset
        if broken:
            logger.warning("%s: %d lines cannot be read; those calls will be made again", self.path, broken)
        self._reader = open(self.path, "rb")  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._known)

    def find(self, call: Call) -> Reply | None:
        """The reply to a call that was made before; None if it was not."""
        key = call.key
        with self._lock:
            for offset in self._known.offsets(_hash_of(key.encode())):
                self._reader.seek(offset)
                row = _parse(self._reader.readline())
                if row is None:
                    logger.warning("%s: a line cannot be read; that call will be made again", self.path)
                elif row["key"] == key:
                    return _reply(row["reply"])
        return None

    def add(self, call: Call, reply: Reply) -> None:
        """Write a finished call; it has left this process when this returns.

        Raises:
            OSError: The disk is full or gone; what was written of the line is taken back.
        """
        key = call.key
        row: dict[str, Any] = {"key": key, "step": call.step, "engine": call.engine, "prompt": call.prompt}
        row |= {"params": call.params.as_dict(), **({"options": call.options} if call.options else {})}
        row["reply"] = {name: value for name, value in vars(reply).items() if value is not None}
        if reply.logprobs is not None:  # JSON has no infinity
            row["reply"]["logprobs"] = [None if value == float("-inf") else value for value in reply.logprobs]
        with self._lock:
            offset = self._end
            self._end += self._writer.append(row)
            self._known.add(_hash_of(key.encode()), offset)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every call with its reply, in the order they were finished in."""
        with open(self.path, "rb") as lines:
            yield from (row for line in lines if (row := _parse(line)) is not None)

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        self._writer.close()
        self._reader.close()

    def __enter__(self) -> CallLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _KeyIndex:
    """From 64-bit hashes of keys to offsets: two sorted arrays, and a small dict of what came last."""

    _RECENT = 1 << 16

    def __init__(self) -> None:
        self._hashes, self._offsets = array("Q"), array("Q")
        self._recent: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._hashes) + len(self._recent)

    def add(self, key: int, offset: int) -> None:
        if key in self._recent or len(self._recent) >= self._RECENT:
            self._merge()
        self._recent[key] = offset

    def offsets(self, key: int) -> Iterator[int]:
        if key in self._recent:
            yield self._recent[key]
        place = bisect_left(self._hashes, key)
        while place < len(self._hashes) and self._hashes[place] == key:
            yield self._offsets[place]
            place += 1

    def _merge(self) -> None:
        import numpy as np

        hashes = np.concatenate([np.frombuffer(self._hashes, "u8"), np.fromiter(self._recent.keys(), "u8")])
        offsets = np.concatenate([np.frombuffer(self._offsets, "u8"), np.fromiter(self._recent.values(), "u8")])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._offsets = array("Q"), array("Q")
        self._hashes.frombytes(hashes[order].tobytes())
        self._offsets.frombytes(offsets[order].tobytes())
        self._recent = {}


def _hash_of(key: bytes) -> int:
    """The first 64 bits of a key, or of anything else that stands where one should be."""
    try:
        return int(key[:16], 16)
    except ValueError:
        return 0


def _parse(line: bytes) -> dict[str, Any] | None:
    row = parse_row(line)
    return row if row is not None and {"key", "reply"} <= row.keys() else None


def _reply(values: dict[str, Any]) -> Reply:
    logprobs = values.pop("logprobs", None)
    if logprobs is not None:
        logprobs = tuple(float("-inf") if value is None else value for value in logprobs)
    return Reply(**values, logprobs=logprobs)
