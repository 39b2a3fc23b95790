"""Metrics of this package as modules of the `evaluate` library, loaded by path and without a network."""

from pathlib import Path
from typing import Any


def metric_path(name: str) -> str:
    """The path that `evaluate.load` takes: `evaluate.load(metric_path("pgr"))`. `ValueError` for an unknown name."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"no metric {name!r}; there are {', '.join(known)}")
    return str(Path(__file__).parent / name)


def metric_info(doc: str, paper: str, arxiv: str, **columns: str) -> Any:
    """What `evaluate` shows of a metric: the docstring of its module, its paper, and its columns with their types."""
    from datasets import Features, Value
    from evaluate import MetricInfo

    description, _, usage = doc.partition("\nArgs:\n")
    return MetricInfo(
        description=description,
        inputs_description=f"\nArgs:\n{usage}",
        citation=f"{paper}. arXiv {arxiv}",
        reference_urls=[f"https://arxiv.org/abs/{arxiv}"],
        features=Features({name: Value(kind) for name, kind in columns.items()}),
    )
