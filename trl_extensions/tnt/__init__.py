"""Targeted negative training: `sample` a model's own answers, `annotate` them, and train `TNTTrainer` on the rows."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

    from ..core.inputs import Source
    from .annotate import annotate as annotate


def sample(
    model: Any, prompts: "Source", *, max_new_tokens: int = 128, temperature: float = 1.0, num_samples: int = 1,
    seed: int = 0,
) -> "Dataset":  # fmt: skip
    """A model's own answers to prompts, rows of `prompt`, `completion` and `truncated` for `annotate`.

    Args:
        model: See `core.generation.engine_of`.
        prompts: A file, data set or rows, see `core.inputs.load_queries`; answers that end a chat are cut off.
        max_new_tokens: Longest answer, in tokens.
        temperature, num_samples, seed: Of random answers to each prompt, beside the greedy one.
    """
    from tempfile import TemporaryDirectory

    from datasets import Dataset

    from ..core.generation import GenerationParams, engine_of, takes_chats
    from ..core.generation.sampling import load_outputs, sample_outputs
    from ..core.inputs import load_queries

    params = GenerationParams(max_new_tokens, temperature, seed=seed)
    with TemporaryDirectory() as folder:
        engine, path = engine_of(model), f"{folder}/outputs.jsonl"
        chats, queries = takes_chats(engine), load_queries(prompts, chats=True)
        report = sample_outputs(engine, queries, params, path, num_samples=num_samples, conversational=chats)
        print(report.summary.partition(": ")[2])
        rows = load_outputs(path)
    return Dataset.from_list([{name: row[name] for name in ("prompt", "completion", "truncated")} for row in rows])


def __getattr__(name: str) -> Any:
    if name == "annotate":
        return importlib.import_module(f"{__name__}.annotate")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
