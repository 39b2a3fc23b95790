"""SAMI: `sample` responses under principles, and train `SAMITrainer` on the rows."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

    from ..core.inputs import Source
    from .principles import Principle


def sample(
    model: Any, queries: "Source", principles: "str | os.PathLike | Sequence[Principle | dict[str, Any]]", *,
    num_constitutions: int = 2, max_new_tokens: int = 350, temperature: float = 0.0, seed: int = 0,
    filters: Any = None, **options: Any,
) -> "Dataset":  # fmt: skip
    """Rows for `SAMITrainer`: a model's responses to each query under several constitutions.

    Args:
        model: See `core.generation.engine_of`.
        queries: A file, data set or rows, see `core.inputs.load_queries`; of a chat the first question counts.
        principles: A YAML file, or each with `name`, `definition` and `antithesis`.
        num_constitutions: C, of each query.
        max_new_tokens, temperature, seed: Of the responses.
        filters: `sampling.ResponseFilters`, what makes a row unfit; the default ones if left out.
        options: Of `sampling.sample_rows`: `pairs`, `sampling_template`, `training_template`.

    Returns:
        The rows that are kept: `id`, `query`, `prompts`, `completions` and `truncated`; what is dropped is counted.
    """
    from tempfile import TemporaryDirectory

    from ..core.generation import GenerationParams, engine_of, takes_chats
    from ..core.inputs import load_queries
    from .data import load_rows, to_dataset
    from .principles import Principle, load_principles
    from .sampling import ResponseFilters, sample_rows

    own = load_principles(principles) if isinstance(principles, (str, os.PathLike)) else list(principles)
    own = [Principle(**one) if isinstance(one, dict) else one for one in own]
    engine, asked = engine_of(model), load_queries(queries)
    with TemporaryDirectory() as folder:
        path = f"{folder}/samples.jsonl"
        report = sample_rows(
            engine, asked, own, num_constitutions=num_constitutions, output=path, seed=seed,
            params=GenerationParams(max_new_tokens, temperature, seed=seed), filters=filters or ResponseFilters(),
            conversational=takes_chats(engine), **options,
        )  # fmt: skip
        print(report.summary.partition(": ")[2])
        return to_dataset(load_rows(path))
