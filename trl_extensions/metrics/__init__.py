"""Metrics of this package as modules of the `evaluate` library, loaded by path and without a network."""

from pathlib import Path


def metric_path(name: str) -> str:
    """The path that `evaluate.load` takes, e.g. `evaluate.load(metric_path("pgr"))`.

    Raises:
        ValueError: There is no such metric.
    """
    here = Path(__file__).parent
    known = sorted(path.name for path in here.iterdir() if (path / f"{path.name}.py").is_file())
    if name not in known:
        raise ValueError(f"no metric {name!r}; there are {', '.join(known)}")
    return str(here / name)
