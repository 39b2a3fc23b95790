"""SAMI: `sample` responses under principles, and train `SAMITrainer` on the rows."""

from typing import Any


def sample(
    model: Any, queries: Any, principles: Any, *, num_constitutions: int = 2, max_new_tokens: int = 350,
    temperature: float = 0.0, seed: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """Rows for `SAMITrainer`, a `Dataset`: a model's responses to each query under C = `num_constitutions`.

    Args:
        model: See `core.generation.engine_of`.
        queries: A file, data set or rows, see `core.inputs.load_queries`; of a chat the first question counts.
        principles: A YAML file, or a list of `name`, `definition` and `antithesis`.
        options: Of `sampling.sample_rows`: `filters`, `pairs`, `sampling_template`, `training_template`.
    """
    from tempfile import TemporaryDirectory

    from ..core.generation import GenerationParams, engine_of, takes_chats
    from ..core.inputs import load_queries
    from .data import load_rows, to_dataset
    from .principles import Principle, load_principles
    from .sampling import ResponseFilters, sample_rows

    own = principles if isinstance(principles, (list, tuple)) else load_principles(principles)
    own = [Principle(**one) if isinstance(one, dict) else one for one in own]
    engine, asked = engine_of(model), load_queries(queries)
    settings: dict[str, Any] = {"filters": ResponseFilters(), "conversational": takes_chats(engine)} | options
    settings |= {"params": GenerationParams(max_new_tokens, temperature, seed=seed), "seed": seed}
    with TemporaryDirectory() as folder:
        path = f"{folder}/samples.jsonl"
        report = sample_rows(engine, asked, own, num_constitutions=num_constitutions, output=path, **settings)
        print(report.summary.partition(": ")[2])
        return to_dataset(load_rows(path))
