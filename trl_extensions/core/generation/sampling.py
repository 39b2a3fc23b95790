"""Sample a model's own outputs to prompts: greedy, and several at a temperature; a JSON line each, resumable."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..inputs import Query
from ..modeling.batches import Padding, written_in
from ..runs.jsonl import read_jsonl
from ..runs.resumable import map_rows
from .types import GenerationEngine, GenerationParams, Prompt, request_seed


COLUMNS = ("id", "index", "sample", "prompt", "completion", "truncated", "num_tokens")

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SamplingReport:
    """Rows of this model in the file `path`, those `resumed` included, of which `empty` are of no use for training and
    `truncated` were cut off; and what this call wrote, with the share of padding where the engine counts it."""

    path: Path
    sampled: int
    resumed: int
    empty: int
    truncated: int
    tokens: int
    seconds: float
    padding_share: float | None = None

    @property
    def summary(self) -> str:
        """One line for a log."""
        earlier = f" ({self.resumed} by an earlier run)" if self.resumed else ""
        return (
            f"{self.path}: {self.sampled} outputs{earlier}, {self.truncated} cut off by the token limit, "
            f"{self.empty} empty; {written_in(self.tokens, self.seconds, self.padding_share)}"
        )


def sample_outputs(
    engine: GenerationEngine,
    queries: Sequence[Query],
    params: GenerationParams,
    output: str | os.PathLike,
    *,
    greedy: bool = True,
    num_samples: int = 1,
    system_prompt: str | None = None,
    conversational: bool = True,
    model: str | None = None,
) -> SamplingReport:
    """Sample one greedy output and several random ones for each prompt, a JSON line each, as they come.

    A row holds `id`, `index` (of the prompt), `sample` (0: greedy; 1, 2, ...: at the temperature), `temperature`,
    `prompt`, `completion`, `truncated` (hit the token limit) and `num_tokens`. Settings are written to
    `<output stem>.settings.json`; the same call again goes on where it stopped.

    Args:
        engine: The model as it is deployed.
        queries: Distinct prompts, see `core.inputs.load_queries`.
        params: Token limit and stop strings; temperature, top_p and seed of the random samples.
        output: The `.jsonl` file to append to.
        greedy, num_samples: Whether to sample greedily once, and how often at random.
        system_prompt: First message of every chat.
        conversational: Whether prompts are chat messages, for a model with a chat template, or plain text.
        model: Its name, where several write to one file: a column, the start of ids, a part of the seed, and in
            `<output stem>.<model>.settings.json`.

    Raises:
        ValueError: Nothing to sample, a name that is no part of a file name, or an `output` made with other settings.
    """
    start, padding = time.perf_counter(), Padding(engine)
    if model is not None and not _FILE_NAME.fullmatch(model):
        raise ValueError(f"model is {model!r}; give letters, digits, '.', '_' and '-': a file is named so")
    if num_samples < 0 or not (greedy or num_samples):
        raise ValueError(f"nothing to sample: greedy is {greedy} and num_samples is {num_samples}")
    if num_samples and not params.temperature:
        raise ValueError("random samples need a temperature above 0: set `temperature`, or `num_samples: 0`")
    if system_prompt and not conversational:
        raise ValueError("`system_prompt` needs a model with a chat template: leave it out, or set the template")
    prefix = "" if model is None else f"{model}-"
    wanted = [
        {"id": f"{prefix}{query.id}-{sample}", "index": index, "sample": sample}
        for sample in range(0 if greedy else 1, num_samples + 1)
        for index, query in enumerate(queries)
    ]
    tokens = 0

    def make(rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal tokens
        for sample in dict.fromkeys(row["sample"] for row in rows):
            places = [place for place, row in enumerate(rows) if row["sample"] == sample]
            prompts = [as_prompt(queries[rows[place]["index"]], system_prompt, conversational) for place in places]
            seed = request_seed(params.seed if model is None else request_seed(params.seed, model), sample)
            own = replace(params, seed=seed) if sample else replace(params, temperature=0.0)
            for number, generation in engine.generate(prompts, own):
                tokens += generation.num_tokens
                place, text = places[number], generation.text
                row = rows[place] | {"temperature": own.temperature} | ({} if model is None else {"model": model})
                row["prompt"] = prompts[number]
                row["completion"] = [{"role": "assistant", "content": text}] if conversational else text
                row["truncated"] = generation.finish_reason != "stop"
                yield place, row | {"num_tokens": generation.num_tokens}

    settings: dict[str, Any] = {"engine": engine.name, "params": params.as_dict()}
    settings |= {"system_prompt": system_prompt, "conversational": conversational}
    part = None if model is None else ("model", model)
    done = map_rows(wanted, make, output, settings=settings, desc=f"sampling {model or ''}".rstrip(), part=part)
    rows = [row for row in read_jsonl(output, required=COLUMNS) if model is None or row.get("model") == model]
    return SamplingReport(
        path=done.path,
        sampled=len(rows),
        resumed=done.resumed,
        empty=sum(not completion_text(row["completion"]).strip() for row in rows),
        truncated=sum(row["truncated"] for row in rows),
        tokens=tokens,
        seconds=time.perf_counter() - start,
        padding_share=padding.share,
    )


def load_outputs(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of `sample_outputs`, in the order of their prompts, the greedy one of each first. `ValueError`, with file
    and line, for a line that is no such row."""
    return sorted(read_jsonl(path, required=COLUMNS), key=lambda row: (row["index"], row["sample"]))


def as_prompt(query: Query, system_prompt: str | None, conversational: bool) -> Prompt:
    """How a query is put to the model, in sampling, training and evaluation alike. `ValueError` for a chat where the
    model has no chat template, and for a second system message."""
    if not conversational:
        if query.messages:
            raise ValueError(f"prompt {query.id} is a chat, but prompts are plain text here: give texts")
        return query.text
    first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    if first and query.messages and query.messages[0]["role"] == "system":
        raise ValueError(f"prompt {query.id} has a system message of its own: leave `system_prompt` out")
    return [*first, *(query.messages or [{"role": "user", "content": query.text}])]


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of the assistant message that ends it; else `ValueError`."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if isinstance(completion, (list, tuple)) and completion else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return last["content"]
    raise ValueError(f"a completion must be a text or messages that end with an assistant's, got {completion!r:.80}")
