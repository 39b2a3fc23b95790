"""What weak-to-strong training promises, measured on test rows with true labels: every model's scores, the gap and how
much of it was recovered (arXiv 2312.09390), and what became of the weak model's errors.

Models are told apart by name: "weak" (the teacher whose labels were used), "weak:<name>" (further teachers, shown and
not compared with), "ceiling" (the strong model trained on true labels; may be missing), and any other name: a strong
model trained on weak labels, called after its loss.
"""

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.runs.jsonl import read_jsonl
from .agreement import agreement_with_weak
from .labels.calibration import expected_calibration_error
from .pgr import (
    percentiles,
    performance_gap_recovered,
    resampled_scores,
    summarise_difference,
    summarise_pgr,
    sums_by_group,
)


WEAK, CEILING, TEACHER_PREFIX = "weak", "ceiling", "weak:"
# The scores whose gap is reported; nll and ece say how sure a model is, not how often it is right.
GAP_SCORES = ("accuracy", "balanced_accuracy")
# Probabilities written with few digits do not sum to exactly 1.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Predictions:
    """What one model says about test rows.

    Attributes:
        ids: N different row ids.
        labels: `(N,)` true classes, in 0..K-1.
        probs: `(N, K)` probabilities, K >= 2, each row summing to 1.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    probs: np.ndarray

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], where: str = "predictions") -> "Predictions":
        """Check rows `{"id", "label", "probs"}`; further columns are ignored.

        Raises:
            ValueError: No rows, an id twice, a label that is missing or no class, probabilities that are not numbers,
                negative, not K in number, or do not sum to 1; names the row.
        """
        ids: dict[str, None] = {}
        labels, probs = [], []
        for i, row in enumerate(rows):
            row_id = row.get("id")
            place = f"{where}: row {i} (id {row_id!r})"
            if not isinstance(row_id, str) or row_id in ids:
                raise ValueError(f"{place}: ids must be texts that occur once; models are compared row by row by them")
            ids[row_id] = None
            probs.append(_checked_probs(row.get("probs"), len(probs[0]) if probs else None, place))
            labels.append(_checked_label(row.get("label"), len(probs[0]), place))
        if not ids:
            raise ValueError(f"{where}: no rows; there is nothing to evaluate")
        return cls(tuple(ids), np.array(labels), np.array(probs))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Predictions":
        """Read and check a JSON-lines file; see `from_rows`."""
        return cls.from_rows(read_jsonl(path, required=("id", "label", "probs")), str(path))

    @property
    def predicted(self) -> np.ndarray:
        """`(N,)` most likely classes, the lower one of equals."""
        return self.probs.argmax(axis=1)

    def in_order(self, ids: Sequence[str]) -> "Predictions":
        """The same rows in another order."""
        if self.ids == tuple(ids):
            return self
        places = {row_id: i for i, row_id in enumerate(self.ids)}
        index = [places[row_id] for row_id in ids]
        return Predictions(tuple(ids), self.labels[index], self.probs[index])


def load_run(folder: str | os.PathLike) -> dict[int, dict[str, Predictions]]:
    """Read `<folder>/seed_<number>/<model>.jsonl` of every seed and model.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: A file is not as `Predictions.load` expects it.
    """
    run: dict[int, dict[str, Predictions]] = {}
    for path in sorted(Path(folder).glob("seed_*/*.jsonl")):
        number = path.parent.name.removeprefix("seed_")
        if number.isdecimal():
            run.setdefault(int(number), {})[path.stem] = Predictions.load(path)
    if not run:
        raise FileNotFoundError(f"{folder}: no predictions; expected files such as seed_0/weak.jsonl")
    return dict(sorted(run.items()))


def scores(predictions: Predictions) -> dict[str, float]:
    """Scores of one model on one set of rows, through scikit-learn.

    Returns:
        `accuracy`; `balanced_accuracy` (mean recall of the classes there are); `f1` (macro), and `f1_positive` (of
        class 1) for two classes; `nll` (nats per row); `ece`, the expected calibration error in 15 bins of equal
        width (Guo et al. 2017).
    """
    from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

    labels, predicted, probs = predictions.labels, predictions.predicted, predictions.probs
    result = {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": recall_score(labels, predicted, labels=np.unique(labels), average="macro"),
        "f1": f1_score(labels, predicted, average="macro"),
    }
    if probs.shape[1] == 2:
        result["f1_positive"] = f1_score(labels, predicted, pos_label=1, average="binary", zero_division=0)
    result["nll"] = log_loss(labels, probs, labels=np.arange(probs.shape[1]))
    result["ece"] = expected_calibration_error(probs, labels)
    return {name: float(value) for name, value in result.items()}


def evaluate_run(
    predictions: Mapping[int, Mapping[str, Predictions]],
    *,
    groups: Mapping[str, Hashable] | None = None,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare weak, weak-to-strong and ceiling models over seeds.

    Intervals are percentiles of one hierarchical bootstrap, over seeds and over test rows (whole groups where given),
    shared by all models, so that differences are paired. If every seed has the same test rows, a resample takes the
    same ones from all. Two or three seeds understate what another one could change; one leaves seeds out.

    Args:
        predictions: Seed -> model name (see the head of this module) -> predictions, the same models in every seed and
            the same rows for all models of a seed.
        groups: Row id -> group of rows that belong together; a row without one, or with None, stands alone.
        costs: Model -> what its making took, e.g. `{"seconds": 81.0, "tokens": 120000}`; a list is one value a seed.
        confidence, resamples, seed: Of the intervals.

    Returns:
        JSON-ready. `seeds`, `models` (in the order to show them), `strong` (those trained on weak labels), `classes`,
        `rows` (per seed), `groups` (per seed, None without), `same_rows`, `confidence`, `resamples`, `costs`.
        `scores`: model -> score -> `value` (mean over seeds), `low`, `high`, `per_seed`; `ece` has no interval, since
        resampling rows inflates it. Per score of `GAP_SCORES`: `gap` (ceiling - weak) and `differences` (strong model
        -> strong - weak), as in `summarise_difference`, and `pgr` (strong model -> as in `summarise_pgr`, with
        `per_seed`). `agreement`: strong model or ceiling -> as in `agreement_with_weak`.

    Raises:
        ValueError: No weak model, models or rows that differ, labels that disagree; names the seed and the model.
    """
    aligned = _align(predictions)
    seeds, models = list(aligned), _ordered(next(iter(aligned.values())))
    strong = [name for name in models if name not in (WEAK, CEILING) and not name.startswith(TEACHER_PREFIX)]
    ids = {number: own[WEAK].ids for number, own in aligned.items()}
    by_seed = None if groups is None else [[groups.get(row_id) for row_id in ids[number]] for number in seeds]
    same_rows = len(set(ids.values())) == 1
    units = [
        sums_by_group(np.stack([_row_sums(aligned[number][name]) for name in models], axis=1), own)
        for number, own in zip(seeds, by_seed or [None] * len(seeds), strict=True)
    ]
    draws = resampled_scores(units, _scores_of_sums, joint=same_rows, resamples=resamples, seed=seed)
    per_seed = {name: [scores(aligned[number][name]) for number in seeds] for name in models}
    return {
        "seeds": seeds,
        "models": models,
        "strong": strong,
        "classes": int(aligned[seeds[0]][WEAK].probs.shape[1]),
        "rows": [len(ids[number]) for number in seeds],
        "groups": None if groups is None else [len(own) for own in units],
        "same_rows": same_rows,
        "confidence": confidence,
        "resamples": resamples,
        "costs": None if costs is None else {name: dict(cost) for name, cost in costs.items()},
        "scores": {name: _with_intervals(per_seed[name], draws[:, i], confidence) for i, name in enumerate(models)},
        **_gaps(per_seed, draws, models, strong, confidence),
        "agreement": _agreements(aligned, [*strong, *(name for name in models if name == CEILING)], by_seed),
    }


def _checked_probs(probs: Any, expected: int | None, place: str) -> np.ndarray:
    try:
        values = np.asarray(probs, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{place}: `probs` must be a list of at least two numbers, got {probs!r:.80}")
    if expected is not None and len(values) != expected:
        raise ValueError(f"{place}: {len(values)} probabilities, but the first row has {expected}; give one a class")
    total = values.sum()
    if not np.isfinite(values).all() or values.min() < 0 or abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"{place}: `probs` {probs!r:.80} are no probabilities; they must be >= 0 and sum to 1")
    return values / total


def _checked_label(label: Any, classes: int, place: str) -> int:
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
        raise ValueError(f"{place}: label {label!r} is not one of 0 to {classes - 1}; test rows need their true class")
    return int(label)


def _row_sums(predictions: Predictions) -> np.ndarray:
    """`(N, 3K + 1)`: right, predicted and true class (one-hot each) and -log p of the true one."""
    classes = np.eye(predictions.probs.shape[1])
    predicted, true = classes[predictions.predicted], classes[predictions.labels]
    own = predictions.probs[np.arange(len(true)), predictions.labels]
    nll = -np.log(np.clip(own, np.finfo(float).eps, None))
    return np.concatenate([predicted * true, predicted, true, nll[:, None]], axis=1)


def _scores_of_sums(sums: np.ndarray) -> np.ndarray:
    """The scores of `scores` in its order, without `ece`, `(..., J)`, from sums of `_row_sums` `(..., 3K + 1)`."""
    right, predicted, true = np.split(sums[..., :-1], 3, axis=-1)
    rows = true.sum(axis=-1)
    f1 = _ratio(2 * right, predicted + true)
    columns = [right.sum(axis=-1) / rows, np.nanmean(_ratio(right, true), axis=-1), np.nanmean(f1, axis=-1)]
    if right.shape[-1] == 2:
        columns.append(np.nan_to_num(f1[..., 1]))
    columns.append(sums[..., -1] / rows)
    return np.stack(columns, axis=-1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """nan, which is left out of means, for a class that does not occur."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _align(predictions: Mapping[int, Mapping[str, Predictions]]) -> dict[int, dict[str, Predictions]]:
    """All models of a seed in one order of rows, and all seeds in one where they have the same rows."""
    if not predictions:
        raise ValueError("no predictions: give at least one seed")
    first_seed, first = next(iter(predictions.items()))
    order = first[WEAK].ids if WEAK in first else ()
    aligned = {}
    for number, models in predictions.items():
        if WEAK not in models:
            raise ValueError(
                f"seed {number}: no model {WEAK!r} among {list(models)}; there is nothing to compare with"
            )
        if models.keys() != first.keys():
            odd = sorted(models.keys() ^ first.keys())
            raise ValueError(f"seeds {first_seed} and {number}: only one of them has {odd}; evaluate the same models")
        ids = order if set(order) == set(models[WEAK].ids) else models[WEAK].ids
        aligned[number] = {
            name: _checked_against(own, models[WEAK], name, number).in_order(ids) for name, own in models.items()
        }
    return aligned


def _checked_against(own: Predictions, weak: Predictions, name: str, number: int) -> Predictions:
    place = f"seed {number}: {name!r}"
    odd = set(own.ids) ^ set(weak.ids)
    if odd:
        raise ValueError(
            f"{place} and {WEAK!r} have other test rows ({len(own.ids)} and {len(weak.ids)}; only one of them has "
            f"{min(odd)!r}); let both predict the same file"
        )
    if own.probs.shape[1] != weak.probs.shape[1]:
        raise ValueError(f"{place} has {own.probs.shape[1]} classes, {WEAK!r} {weak.probs.shape[1]}; train both alike")
    differs = own.labels != weak.in_order(own.ids).labels
    if differs.any():
        raise ValueError(f"{place}: row {own.ids[int(differs.argmax())]!r} has another label than for {WEAK!r}")
    return own


def _ordered(models: Iterable[str]) -> list[str]:
    """Teachers first, the ceiling last."""
    rank = {WEAK: 0, CEILING: 3}
    return sorted(models, key=lambda name: rank.get(name, 1 if name.startswith(TEACHER_PREFIX) else 2))


def _with_intervals(per_seed: list[dict[str, float]], draws: np.ndarray, confidence: float) -> dict[str, Any]:
    """Every score of one model; `draws` `(R, J)`."""
    columns = [name for name in per_seed[0] if name != "ece"]
    result = {}
    for name in per_seed[0]:
        values = [own[name] for own in per_seed]
        bounds = percentiles(draws[:, columns.index(name)], confidence) if name in columns else (None, None)
        result[name] = {"value": float(np.mean(values)), "low": bounds[0], "high": bounds[1], "per_seed": values}
    return result


def _gaps(
    per_seed: dict[str, list[dict[str, float]]],
    draws: np.ndarray,
    models: list[str],
    strong: list[str],
    confidence: float,
) -> dict[str, Any]:
    """`gap`, `differences` and `pgr` of every score of `GAP_SCORES`."""
    result: dict[str, Any] = {"gap": {}, "differences": {}, "pgr": {}}
    place = {name: i for i, name in enumerate(models)}
    for j, score in enumerate(GAP_SCORES):
        values = {name: [own[score] for own in per_seed[name]] for name in models}

        def over_weak(name, values=values, j=j):
            point = np.mean(values[name]) - np.mean(values[WEAK])
            return summarise_difference(
                point, draws[:, place[name], j] - draws[:, place[WEAK], j], confidence=confidence
            )

        result["differences"][score] = {name: over_weak(name) for name in strong}
        result["gap"][score] = over_weak(CEILING) if CEILING in place else None
        result["pgr"][score] = {name: _pgr(values, draws[..., j], place, name, confidence) for name in strong}
    return result


def _pgr(
    values: dict[str, list[float]], draws: np.ndarray, place: dict[str, int], name: str, confidence: float
) -> dict[str, Any]:
    """`values`: model -> score of every seed; `draws` `(R, M)`."""
    if CEILING not in place:
        nothing = dict.fromkeys(("value", "low", "high", "undefined_share"))
        return nothing | {"reason": "there is no ceiling model", "reliable": False, "per_seed": []}
    roles = (WEAK, name, CEILING)
    point = np.array([np.mean(values[role]) for role in roles])
    per_seed = [performance_gap_recovered(*own) for own in zip(*(values[role] for role in roles), strict=True)]
    summary = summarise_pgr(point, draws[:, [place[role] for role in roles]], confidence=confidence)
    return summary | {"per_seed": per_seed}


def _agreements(
    aligned: dict[int, dict[str, Predictions]], names: list[str], by_seed: list[list[Hashable]] | None
) -> dict[str, Any]:
    runs = list(aligned.values())
    labels, weak = [own[WEAK].labels for own in runs], [own[WEAK].predicted for own in runs]
    return {
        name: agreement_with_weak(labels, weak, [own[name].predicted for own in runs], groups=by_seed)
        for name in names
    }
