"""Metrics of this package as modules of the `evaluate` library, loaded by path and without a network."""

from pathlib import Path


def metric_path(name: str) -> str:
    """The path that `evaluate.load` takes: `evaluate.load(metric_path("pgr"))`. `ValueError` for an unknown name."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"no metric {name!r}; there are {', '.join(known)}")
    return str(Path(__file__).parent / name)
