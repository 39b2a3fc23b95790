"""What every weak model offers, and its calibrated predictions: written as soon as they are made, then used again.

A learner's folder holds `model/` (its own), `<name>.jsonl` of every set of rows it was asked about, and, once all of
that is complete, `learner.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...core.runs.jsonl import read_jsonl, write_jsonl
from ...core.runs.report import write_atomically
from ...core.runs.run import check_resume
from ..data.examples import Example, Pair
from .calibrate import Calibration, expected_calibration_error, fit_temperature
from .calibrate import confidence


SLICE = "slice"
"""The set of rows that calibrates."""


class Learner(Protocol):
    """A model that learns soft labels and gives probabilities.

    One more attribute is read where it exists: `settings`, JSON-ready values that predictions depend on; a resumed run
    must have the same ones.

    Attributes:
        name: Tells it from other learners, in files and reports.
    """

    name: str

    def fit(
        self,
        rows: Sequence[Example | Pair],
        soft_labels: np.ndarray,
        weights: np.ndarray | None,
        *,
        seed: int,
        folder: Path,
    ) -> None:
        """Learn from scratch.

        Args:
            rows: N examples, or N pairs.
            soft_labels: `(N, K)` probabilities; of pairs `[p(chosen is better), p(rejected is better)]`.
            weights: `(N,)` weight of each row, or None for equal ones.
            seed: Of everything random.
            folder: A folder of its own, to keep what it needs to resume.
        """
        ...

    def predict(self, rows: Sequence[Example | Pair]) -> np.ndarray:
        """`(N, K)` probabilities."""
        ...


@dataclass(frozen=True)
class Lesson:
    """What a learner is taught and asked.

    Args:
        rows: What it is trained on.
        soft_labels: `(N, K)`.
        asked: Rows to predict, by name; those of `SLICE`, with true labels, are never trained on.
        calibrate: Whether to fit a temperature on `SLICE`.
        seed: Given to `fit`.
    """

    rows: Sequence[Example | Pair]
    soft_labels: np.ndarray
    asked: Mapping[str, Sequence[Example | Pair]]
    calibrate: bool
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the predictions depend on, for `check_resume`."""
        trained = fingerprint(self.rows) | {"labels": _digest([np.ascontiguousarray(self.soft_labels).tobytes()])}
        asked = {name: fingerprint(rows) for name, rows in self.asked.items()}
        return {"seed": self.seed, "calibrate": self.calibrate, "trained_on": trained, "asked": asked}


@dataclass(frozen=True)
class Answers:
    """A learner's calibrated probabilities.

    Args:
        probs: `(N, K)` by name of the rows asked.
        report: JSON-ready: temperature, note, accuracy and calibration error (`ece_before`, `ece`) on the slice.
        resumed: Whether they were on disk already.
    """

    probs: dict[str, np.ndarray]
    report: dict[str, Any]
    resumed: bool


def teach(learner: Learner, lesson: Lesson, folder: Path) -> Answers:
    """Fit a learner, calibrate it, and write what it says; or read what it said when that was done before.

    Raises:
        ValueError: The folder holds answers to another lesson, or the learner gives no probabilities; one line naming
            the learner and the row.
    """
    done, model = folder / "learner.json", folder / "model"
    settings = {"name": learner.name, "settings": getattr(learner, "settings", {}), **lesson.settings}
    started = done.exists() or (model.is_dir() and any(model.iterdir()))
    check_resume(folder / "settings.json", settings, made=str(folder), started=started)
    if done.exists():
        probs = {name: _read_answers(folder / f"{name}.jsonl", rows) for name, rows in lesson.asked.items()}
        return Answers(probs, json.loads(done.read_text(encoding="utf-8")), True)
    model.mkdir(parents=True, exist_ok=True)
    learner.fit(lesson.rows, lesson.soft_labels, None, seed=lesson.seed, folder=model)
    num_classes = lesson.soft_labels.shape[1]
    raw = {
        name: checked_probs(learner.predict(rows), rows, num_classes, learner.name)
        for name, rows in lesson.asked.items()
    }
    probs, report = _calibrated(raw, lesson)
    for name, rows in lesson.asked.items():
        write_jsonl(folder / f"{name}.jsonl", prediction_rows(rows, probs[name]))
    write_atomically(done, json.dumps(report, indent=2) + "\n")
    return Answers(probs, report, False)


def checked_probs(probs: np.ndarray, rows: Sequence[Example | Pair], num_classes: int, name: str) -> np.ndarray:
    """A learner's probabilities as float64, each row summing to 1 exactly rather than nearly.

    Raises:
        ValueError: Another shape than `(N, K)`, nan, an infinity, a negative number, or a row whose sum is not 1 to
            within 0.001; one line naming the learner and the row.
    """
    probs = np.asarray(probs, dtype=np.float64)
    if probs.shape != (len(rows), num_classes):
        raise ValueError(
            f"learner {name!r} gave probabilities of shape {probs.shape} for {len(rows)} rows and {num_classes} "
            "classes; `predict` must return one row of probabilities for each"
        )
    sums = probs.sum(axis=1)
    bad = ~(np.abs(sums - 1) <= 1e-3) | ~(probs >= 0).all(axis=1)
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(
            f"learner {name!r}, row {rows[place].id!r}: {probs[place].tolist()} are no probabilities (finite, not "
            "negative, summing to 1); correct its `predict`, or look for a diverged training"
        )
    return probs / sums[:, None]


def accuracy(probs: np.ndarray, rows: Sequence[Example | Pair]) -> float | None:
    """Share of the rows with a true label whose most likely class it is; None where no row has one."""
    known = [i for i, row in enumerate(rows) if row.label is not None]
    if not known:
        return None
    return float(np.mean(probs[known].argmax(axis=1) == [rows[i].label for i in known]))


def fingerprint(rows: Sequence[Example | Pair]) -> dict[str, Any]:
    """Number of rows, and 16 hexadecimal digits that depend on everything in them."""
    return {"rows": len(rows), "digest": _digest(json.dumps(asdict(row)).encode() for row in rows)}


def prediction_rows(rows: Sequence[Example | Pair], probs: np.ndarray) -> list[dict[str, Any]]:
    """Rows `{"id", "label", "probs"}`."""
    return [{"id": row.id, "label": row.label, "probs": p} for row, p in zip(rows, probs.tolist(), strict=True)]


def weak_label_rows(
    rows: Sequence[Example | Pair], soft_labels: np.ndarray, weak: Mapping[str, np.ndarray], apart: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Rows of a file of weak labels; see `labelling`."""
    sure = confidence(soft_labels)
    for i, row in enumerate(rows):
        text = {"chosen": row.chosen, "rejected": row.rejected} if isinstance(row, Pair) else {"text": row.text}
        yield {
            "id": row.id,
            **text,
            "label": row.label,
            "soft_labels": soft_labels[i].tolist(),
            "weak": {name: probs[i].tolist() for name, probs in weak.items()},
            "disagreement": float(apart[i]),
            "confidence": float(sure[i]),
        }


def check_rows(name: str, rows: Sequence[Example | Pair], num_classes: int, pairs: bool) -> None:
    """Raise `ValueError` for no rows, mixed forms, an id that occurs twice or a class that does not exist."""
    if not rows:
        raise ValueError(f"there are no {name} rows; check the split")
    seen = set()
    for row in rows:
        where = f"{name} row {row.id!r}"
        if row.id in seen:
            raise ValueError(f"{where}: this id occurs twice; give each row its own")
        seen.add(row.id)
        if isinstance(row, Pair) != pairs:
            raise ValueError(f"{where}: texts and pairs are mixed; give one form")
        if row.label is not None and not 0 <= row.label < num_classes:
            raise ValueError(f"{where}: label {row.label} is none of the {num_classes} classes 0..{num_classes - 1}")


def folder_name(name: str) -> str:
    """A learner's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "learner"


def _calibrated(raw: dict[str, np.ndarray], lesson: Lesson) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    probs, calibration = raw, Calibration(1.0, 0, float("nan"), float("nan"))
    report = {"accuracy": None, "ece_before": None, "ece": None}
    if SLICE in raw:
        labels = np.array([row.label for row in lesson.asked[SLICE]])
        if lesson.calibrate:
            calibration = fit_temperature(raw[SLICE], labels)
            probs = {name: calibration.apply(values) for name, values in raw.items()}
        report = {
            "accuracy": accuracy(raw[SLICE], lesson.asked[SLICE]),
            "ece_before": expected_calibration_error(raw[SLICE], labels),
            "ece": expected_calibration_error(probs[SLICE], labels),
        }
    return probs, {"temperature": calibration.temperature, "note": calibration.note} | report


def _read_answers(path: Path, rows: Sequence[Example | Pair]) -> np.ndarray:
    stored = read_jsonl(path, required=("id", "probs"))
    if [row["id"] for row in stored] != [row.id for row in rows]:
        raise ValueError(f"{path}: its rows are not the ones asked for; delete the folder to make them again")
    return np.array([row["probs"] for row in stored], dtype=np.float64)


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]
