"""A local OpenAI-compatible server from a wheel: llama.cpp by way of the `xllamacpp` package (extra `demo`)."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any


class LlamaServer:
    """
    Serves a GGUF file on a free port of this machine for as long as the context lasts.

    Args:
        gguf_path (`str` or `os.PathLike`):
            Model file.
        parallel (`int`, *optional*, defaults to `8`):
            Requests answered at once. Set an [`EndpointEngine`]'s `concurrency` to the same.
        context (`int`, *optional*, defaults to `8192`):
            Tokens of context in all; each of the `parallel` requests gets an equal share for prompt and answer.

    Attributes:
        base_url (`str`):
            Address for [`EndpointEngine`], known inside the context.

    Raises:
        `ImportError`: if `xllamacpp` is not installed.
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if a number is out of range.
        `RuntimeError`: if llama.cpp cannot load the file.

    Example:

    ```python
    with LlamaServer("model.gguf") as server:
        engine = EndpointEngine(server.base_url, "model")
    ```
    """

    base_url: str

    def __init__(self, gguf_path: str | os.PathLike[str], *, parallel: int = 8, context: int = 8192) -> None:
        self.gguf_path = Path(gguf_path)
        if not self.gguf_path.is_file():
            raise FileNotFoundError(f"{self.gguf_path}: no such GGUF file")
        if parallel < 1 or context < parallel:
            raise ValueError(f"parallel must be at least 1 and context larger, got {parallel} and {context}")
        self.parallel = parallel
        self.context = context
        self._server: Any = None

    def __enter__(self) -> LlamaServer:
        try:
            from xllamacpp import CommonParams, Server
        except ImportError as error:
            raise ImportError(
                f"a local server needs xllamacpp ({error}): pip install xllamacpp, or start any "
                "OpenAI-compatible server and use its address"
            ) from error
        params = CommonParams()
        params.model.path = str(self.gguf_path)
        params.n_parallel = self.parallel
        params.n_ctx = self.context
        # Else llama.cpp starts a thread for every core of the machine, on however few of them this process may run
        params.cpuparams.n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else -1
        params.port = 0  # the system picks a free one
        params.verbosity = -1
        try:
            self._server = Server(params)
        except Exception as error:
            raise RuntimeError(f"llama.cpp cannot serve {self.gguf_path}: {error}") from error
        self.base_url = f"{self._server.listening_address}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The binding has no stop method: the server ends when its last reference goes.
        self._server = None
