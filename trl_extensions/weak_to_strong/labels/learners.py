"""Weak models label rows: fit, calibrate, combine, chain, and say how good it is (arXiv 2312.09390, 2410.12621).

A folder of labels has a folder for each stage of the chain, `stage_0`, `stage_1`, ...; one stage is the usual case:

    weak_labels.jsonl    {"id", "text" (or "chosen", "rejected"), "label", "soft_labels", "weak", "disagreement",
                         "confidence"}, a row each; written whole, last
    settings.json        what they were made with
    learners/<learner>/  `model/` (the learner's own), `<name>.jsonl` of every set of rows it predicted, and, once all
                         of that is complete, `learner.json`; a folder of these for each half in later stages of a
                         chain

The same call again goes on where an earlier one was stopped. To combine the same learners in another way, delete
`weak_labels.jsonl`: what is in `learners/` is used again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from ...core.runs.jsonl import read_jsonl, write_jsonl
from ...core.runs.report import write_atomically
from ...core.runs.run import check_resume
from ..data.examples import Example, Pair, split_halves, take_slice
from .calibrate import (
    METHODS,
    apply_temperature,
    combine,
    confidence,
    disagreement,
    expected_calibration_error,
    fit_temperature,
)


logger = logging.getLogger(__name__)

_TARGET, _SLICE = "target", "slice"  # the rows that are labelled, and those with true labels that calibrate

Rows: TypeAlias = Sequence[Example | Pair]
Part: TypeAlias = tuple[Rows, np.ndarray, Rows]


class Learner(Protocol):
    """A model that learns soft labels and gives probabilities; its name tells it from others in files and reports.

    It may have `settings`: JSON-ready values that predictions depend on; a resumed run must have the same ones.
    """

    name: str

    def fit(self, rows: Rows, soft_labels: np.ndarray, *, seed: int, folder: Path) -> None:
        """Learn from scratch, with everything random from `seed`; `folder` is its own, for what it needs to resume.

        Soft labels of N rows are `(N, K)` probabilities, of pairs `[p(chosen is better), p(rejected is better)]`.
        """

    def predict(self, rows: Rows) -> np.ndarray:
        """`(N, K)` probabilities."""


@dataclass(frozen=True)
class LabelReport:
    """What the weak models of one stage made of rows. Figures about true labels are None where none are known.

    `labelled` are the rows with true labels, `slice_rows` those of them that calibrate. Of a learner: `accuracy`,
    `ece`, `ece_before`, all on the slice, `temperature` and `note` are lists, with a value for each half in later
    stages. `disagreement` and `confidence` are means; the shares are of predicted and of true classes.
    """

    path: str
    rows: int
    labelled: int
    slice_rows: int
    ensemble: str
    learners: dict[str, dict[str, Any]]
    target_accuracy: float | None
    extra_accuracy: dict[str, float | None]
    disagreement: float
    confidence: float
    class_shares: list[float]
    labelled_shares: list[float]
    warnings: list[str]

    @property
    def summary(self) -> str:
        """Two lines for a person."""
        known = {"": self.target_accuracy} | {f" of {name}": value for name, value in self.extra_accuracy.items()}
        right = "".join(f", {value:.1%}{of} right" for of, value in known.items() if value is not None)
        classes, true = (" / ".join(f"{share:.1%}" for share in s) for s in (self.class_shares, self.labelled_shares))
        models = []
        for name, own in self.learners.items():
            parts = [] if own["accuracy"][0] is None else [f"{np.mean(own['accuracy']):.1%} right on the slice"]
            parts += [] if own["target_accuracy"] is None else [f"{own['target_accuracy']:.1%} on these rows"]
            parts += ["T " + " and ".join(f"{value:.2f}" for value in own["temperature"])]
            models.append(f"{name} ({', '.join(parts + ['from an earlier run'] * own['resumed'])})")
        return (
            f"{self.path}: {self.rows} rows labelled{right}; mean disagreement {self.disagreement:.3f}, confidence "
            f"{self.confidence:.3f}; classes {classes}, true ones of {self.labelled} rows {true}\n"
            f"{self.ensemble} vote of {'; '.join(models)}"
        )


@dataclass(frozen=True)
class StageLabels:
    """One stage's report, the ensemble's probabilities `(N, K)` by set of rows, and the same by learner and set."""

    report: LabelReport
    soft: dict[str, np.ndarray]
    by_learner: dict[str, dict[str, np.ndarray]]


def bootstrap_chain(
    stages: Sequence[Sequence[Learner]],
    labelled: Rows,
    target: Rows,
    *,
    num_classes: int,
    seed: int,
    folder: str | os.PathLike,
    ensemble: Literal["soft", "hard", "accuracy"] = "soft",
    calibrate: bool = True,
    calibration_share: float = 0.2,
    eval_sets: Mapping[str, Rows] | None = None,
    output: str | os.PathLike | None = None,
) -> list[StageLabels]:
    """Train weak models on true labels and let them label other rows; each further stage learns the labels of the one
    before it (bootstrapping, arXiv 2312.09390, section 4.3.1).

    Every later learner is cross-fitted, so that none labels rows it was trained on: the target is split in two halves
    (whole groups), a copy trained on the soft labels of either half labels the other one, and further rows get the
    mean of both. Where `calibrate` or an accuracy-weighted vote needs it, a slice of `labelled`
    (whole groups) is kept from all training.

    Args:
        stages: Learners of each stage, the weakest first; each is fitted with a seed made of `seed` and its name.
        labelled, target: Rows with true labels, and those to label.
        folder: Where everything goes, see the head of this module.
        ensemble, calibrate: See `calibrate.combine` and `calibrate.fit_temperature`.
        eval_sets: Further rows to predict, by name, such as the test rows.
        output: The last stage's file of labels, if not `weak_labels.jsonl` in its folder.

    Raises:
        ValueError: Rows without true label, ids that occur twice, learners of one name, predictions that are no
            probabilities, or a folder made with other settings; one line that names them.
    """
    chain = _Chain(labelled, target, eval_sets or {}, num_classes, seed, ensemble, calibrate, calibration_share)
    chain.check(stages)
    needs_slice = calibrate or ensemble == "accuracy"
    held, rest = take_slice(labelled, calibration_share, seed=seed) if needs_slice else ([], labelled)
    halves = split_halves(target, seed=seed) if len(stages) > 1 else ()
    places = {row.id: i for i, row in enumerate(target)}
    # What each copy of a learner is trained on, its soft labels, and the target rows it may then label
    parts: list[Part] = [(rest, np.eye(num_classes)[np.array([row.label for row in rest], dtype=int)], target)]
    results = []
    for number, learners in enumerate(stages):
        own = Path(folder) / f"stage_{number}"
        file = own / "weak_labels.jsonl" if output is None or number < len(stages) - 1 else Path(output)
        results.append(chain.label(learners, parts, held, own, file))
        if halves:
            soft = results[-1].soft[_TARGET]
            turns = (halves, halves[::-1])
            parts = [(half, soft[[places[row.id] for row in half]], other) for half, other in turns]
    return results


@dataclass(frozen=True)
class _Chain:
    """What all stages share, and how one is carried out."""

    labelled: Rows
    target: Rows
    eval_sets: Mapping[str, Rows]
    num_classes: int
    seed: int
    ensemble: Literal["soft", "hard", "accuracy"]
    calibrate: bool
    calibration_share: float

    def check(self, stages: Sequence[Sequence[Learner]]) -> None:
        """Refuse what is wrong with any input, in one line."""
        if self.ensemble not in METHODS:
            raise ValueError(f"`ensemble` is {self.ensemble!r}; give one of {', '.join(METHODS)}")
        if not stages or not all(stages):
            raise ValueError("no learner; give at least one for each stage")
        for learners in stages:
            [(name, count)] = Counter(folder_name(learner.name) for learner in learners).most_common(1)
            if count > 1:
                raise ValueError(f"{count} learners are called {name!r}; give each a `name` of its own")
        if odd := {_SLICE, _TARGET} & self.eval_sets.keys():
            raise ValueError(f"`eval_sets`: {min(odd)!r} has a meaning of its own; use another word, such as 'test'")
        for name, rows in (("labelled", self.labelled), ("target", self.target), *self.eval_sets.items()):
            if not rows:
                raise ValueError(f"there are no {name} rows; check the split")
            [(row_id, count)] = Counter(row.id for row in rows).most_common(1)
            if count > 1:
                raise ValueError(f"{name} row {row_id!r}: this id occurs twice; give each row its own")
            for row in rows:
                here = f"{name} row {row.id!r}"
                if isinstance(row, Pair) != isinstance(self.labelled[0], Pair):
                    raise ValueError(f"{here}: texts and pairs are mixed; give one form")
                if row.label is None and name == "labelled":
                    raise ValueError(f"{here} has no true label; leave it out, or label it by hand")
                if row.label is not None and not 0 <= row.label < self.num_classes:
                    raise ValueError(f"{here}: label {row.label} is none of the {self.num_classes} classes")

    def label(
        self, learners: Sequence[Learner], parts: Sequence[Part], held: Rows, folder: Path, output: Path
    ) -> StageLabels:
        """Carry out one stage: every learner's predictions, their vote, the file of labels."""
        # What that file depends on, beside what each learner's folder says itself
        names = ("ensemble", "calibrate", "calibration_share", "seed", "num_classes")
        settings = {name: getattr(self, name) for name in names}
        settings |= {
            "learners": [learner.name for learner in learners],
            "labelled": fingerprint(self.labelled),
            "target": fingerprint(self.target),
            "extra": {name: fingerprint(rows) for name, rows in self.eval_sets.items()},
        }
        check_resume(folder / "settings.json", settings, made=str(output), started=output.exists())
        by_learner, figures = {}, {}
        for learner in learners:
            by_learner[learner.name], figures[learner.name] = self.predict(learner, parts, held, folder / "learners")
        accuracies = [np.mean(values["accuracy"]) for values in figures.values()] if held else None
        together = {name: np.stack([own[name] for own in by_learner.values()]) for name in (_TARGET, *self.eval_sets)}
        soft = {name: combine(probs, self.ensemble, accuracies) for name, probs in together.items()}
        apart, sure = disagreement(together[_TARGET]), confidence(soft[_TARGET])
        rows = (
            {
                "id": row.id,
                **_texts(row),
                "label": row.label,
                "soft_labels": soft[_TARGET][i].tolist(),
                "weak": {name: own[_TARGET][i].tolist() for name, own in by_learner.items()},
                "disagreement": float(apart[i]),
                "confidence": float(sure[i]),
            }
            for i, row in enumerate(self.target)
        )
        write_jsonl(output, rows)
        predicted = soft[_TARGET].argmax(axis=1)
        warnings = self.warnings(predicted)
        warnings += [f"{name}: {note}" for name, values in figures.items() for note in values["note"] if note]
        for warning in warnings:
            logger.warning("%s: %s", output, warning)
        report = LabelReport(
            path=str(output),
            rows=len(self.target),
            labelled=len(self.labelled),
            slice_rows=len(held),
            ensemble=self.ensemble,
            learners=figures,
            target_accuracy=_accuracy(soft[_TARGET], self.target),
            extra_accuracy={name: _accuracy(soft[name], rows) for name, rows in self.eval_sets.items()},
            disagreement=float(apart.mean()),
            confidence=float(sure.mean()),
            class_shares=_shares(predicted, self.num_classes),
            labelled_shares=_shares([row.label for row in self.labelled], self.num_classes),
            warnings=warnings,
        )
        return StageLabels(report, soft, by_learner)

    def predict(
        self, learner: Learner, parts: Sequence[Part], held: Rows, folder: Path
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A learner's probabilities of the target rows, each from a copy not trained on it, and of further rows."""
        folder = folder / folder_name(learner.name)
        # Learners of one kind are to differ, whatever their order
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{learner.name}".encode()).digest()[:4], "big") >> 1
        fitted: list[tuple[dict[str, np.ndarray], dict[str, Any]]] = []
        by_id: dict[str, np.ndarray] = {}
        for number, part in enumerate(parts):
            own = folder / f"half_{number}" if len(parts) > 1 else folder
            fitted.append(self.fit_predict(learner, part, held, seed, own))
            by_id |= {row.id: probs for row, probs in zip(part[2], fitted[-1][0][_TARGET], strict=True)}
        predictions = {_TARGET: np.array([by_id[row.id] for row in self.target])}
        predictions |= {name: np.mean([own[name] for own, _ in fitted], axis=0) for name in self.eval_sets}
        figures: dict[str, Any] = {key: [report[key] for _, report in fitted] for key in fitted[0][1]}
        figures["target_accuracy"] = _accuracy(predictions[_TARGET], self.target)
        figures["extra_accuracy"] = {n: _accuracy(predictions[n], rows) for n, rows in self.eval_sets.items()}
        figures["resumed"] = all(figures["resumed"])
        return predictions, figures

    def fit_predict(
        self, learner: Learner, part: Part, held: Rows, seed: int, folder: Path
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Fit a learner, calibrate it on the slice `held`, and write what it predicts; or read that where it was done
        before. Returns its probabilities `(N, K)` by set of rows, and its temperature and figures on the slice."""
        rows, soft_labels, target = part
        eval_sets = {_TARGET: target, **self.eval_sets} | ({_SLICE: held} if held else {})
        done, model = folder / "learner.json", folder / "model"
        settings = {
            "name": learner.name,
            "settings": getattr(learner, "settings", {}),
            "seed": seed,
            "calibrate": self.calibrate,
            "trained_on": fingerprint(rows) | {"labels": digest([np.ascontiguousarray(soft_labels).tobytes()])},
            "asked": {name: fingerprint(asked) for name, asked in eval_sets.items()},
        }
        started = done.exists() or (model.is_dir() and any(model.iterdir()))
        check_resume(folder / "settings.json", settings, made=str(folder), started=started)
        predictions = {}
        if done.exists():
            for name, asked in eval_sets.items():
                path = folder / f"{name}.jsonl"
                stored = read_jsonl(path, required=("id", "probs"))
                if [row["id"] for row in stored] != [row.id for row in asked]:
                    raise ValueError(f"{path}: its rows are not those asked for; delete the folder")
                predictions[name] = np.array([row["probs"] for row in stored], dtype=np.float64)
            return predictions, json.loads(done.read_text(encoding="utf-8")) | {"resumed": True}
        model.mkdir(parents=True, exist_ok=True)
        learner.fit(rows, soft_labels, seed=seed, folder=model)
        for name, asked in eval_sets.items():
            predictions[name] = checked_probs(learner.predict(asked), asked, self.num_classes, learner.name)
        report = {"temperature": 1.0, "note": "", "accuracy": None, "ece_before": None, "ece": None}
        if held:
            labels = np.array([row.label for row in held])
            report["accuracy"] = _accuracy(predictions[_SLICE], held)
            report["ece_before"] = expected_calibration_error(predictions[_SLICE], labels)
            if self.calibrate:
                temperature, report["note"] = fit_temperature(predictions[_SLICE], labels)
                report["temperature"] = temperature
                predictions = {name: apply_temperature(probs, temperature) for name, probs in predictions.items()}
            report["ece"] = expected_calibration_error(predictions[_SLICE], labels)
        for name, asked in eval_sets.items():
            write_jsonl(folder / f"{name}.jsonl", prediction_rows(asked, predictions[name]))
        write_atomically(done, json.dumps(report, indent=2) + "\n")
        return predictions, report | {"resumed": False}

    def warnings(self, predicted: np.ndarray) -> list[str]:
        """What a person should look at, given the most likely class of each target row."""
        found = []
        for name, labels in (("true", [row.label for row in self.labelled]), ("weak", predicted.tolist())):
            if absent := sorted(set(range(self.num_classes)) - set(labels)):
                found.append(
                    f"class {', '.join(map(str, absent))} absent from the {name} labels, so a strong model will not "
                    "learn to predict it; label more rows, or draw them by class"
                )
        known = {tuple(_texts(row).values()) for row in self.labelled}
        if copies := sum(tuple(_texts(row).values()) in known for row in self.target):
            found.append(f"{copies} rows to label have the text of a row with a true label; the weak models know it")
        groups = {row.group for row in self.labelled} - {None}
        if torn := len(groups & {row.group for row in self.target}):
            found.append(f"{torn} groups are on both sides; split with `split_halves`, which keeps them whole")
        return found


def checked_probs(probs: np.ndarray, rows: Rows, num_classes: int, name: str) -> np.ndarray:
    """A learner's probabilities `(N, K)` as float64, each row summing to 1 exactly; what is none is refused by row."""
    probs = np.asarray(probs, dtype=np.float64)
    if probs.shape != (len(rows), num_classes):
        need = f"{len(rows)} rows and {num_classes} classes"
        raise ValueError(f"learner {name!r} gave probabilities of shape {probs.shape} for {need}")
    sums = probs.sum(axis=1)
    bad = ~(np.abs(sums - 1) <= 1e-3) | ~(probs >= 0).all(axis=1)
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(
            f"learner {name!r}, row {rows[place].id!r}: {probs[place].tolist()} are no probabilities (finite, not "
            "negative, summing to 1); correct its `predict`, or look for a diverged training"
        )
    return probs / sums[:, None]


def fingerprint(rows: Rows) -> dict[str, Any]:
    """Number of rows, and 16 hexadecimal digits that depend on everything in them."""
    return {"rows": len(rows), "digest": digest(json.dumps(asdict(row)).encode() for row in rows)}


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits that depend on every part."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


def prediction_rows(rows: Rows, probs: np.ndarray) -> list[dict[str, Any]]:
    """Rows `{"id", "label", "probs"}`."""
    return [{"id": row.id, "label": row.label, "probs": p} for row, p in zip(rows, probs.tolist(), strict=True)]


def folder_name(name: str) -> str:
    """A learner's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "learner"


def _accuracy(probs: np.ndarray, rows: Rows) -> float | None:
    """Of the rows with a true label; None where no row has one."""
    right = [p.argmax() == row.label for p, row in zip(probs, rows, strict=True) if row.label is not None]
    return float(np.mean(right)) if right else None


def _texts(row: Example | Pair) -> dict[str, str]:
    return {"chosen": row.chosen, "rejected": row.rejected} if isinstance(row, Pair) else {"text": row.text}


def _shares(classes: Any, num_classes: int) -> list[float]:
    return (np.bincount(classes, minlength=num_classes) / len(classes)).tolist()
