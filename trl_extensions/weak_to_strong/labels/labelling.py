"""Label rows with weak models: fit, calibrate, combine, say how good it is (arXiv 2312.09390, 2410.12621).

A folder of labels holds

    weak_labels.jsonl    {"id", "text" (or "chosen", "rejected"), "label", "soft_labels", "weak", "disagreement",
                         "confidence"}, a row each; written whole, last
    settings.json        what they were made with
    <name>.jsonl         {"id", "label", "probs"}: what the ensemble says of further rows, such as the test rows
    learners/<learner>/  what each learner says, see `learners`; a folder for each half in later stages of a chain

The same call again goes on where an earlier one was stopped. To combine the same learners in another way, delete
`weak_labels.jsonl`: what is in `learners/` is used again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ...core.runs.jsonl import write_jsonl
from ...core.runs.run import check_resume
from ..data.examples import Example, Pair, split_halves, take_slice
from .calibrate import METHODS, combine, confidence, disagreement
from .learners import (
    SLICE,
    Learner,
    Lesson,
    accuracy,
    check_rows,
    fingerprint,
    folder_name,
    prediction_rows,
    teach,
    weak_label_rows,
)


logger = logging.getLogger(__name__)

WEAK_LABELS = "weak_labels.jsonl"
_TARGET = "target"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Rows = Sequence[Example | Pair]


@dataclass(frozen=True)
class LabelReport:
    """What weak models made of rows. Figures about true labels are None where none are known.

    Args:
        path (`str`): The file of weak labels.
        rows (`int`): Rows labelled.
        labelled (`int`): Rows with true labels, the calibration slice included.
        slice_rows (`int`): Rows of that slice.
        ensemble (`str`): How the learners were combined.
        learners (`dict`): By name: `accuracy` on the slice, `ece` and `ece_before` (expected calibration error there,
            after and before calibration), `temperature`, `note`; each a list with a value for each of the two halves
            in a bootstrap chain. And `target_accuracy`, `extra_accuracy` (by name), `resumed`.
        target_accuracy (`float`, *optional*): Accuracy of the ensemble on the labelled rows.
        extra_accuracy (`dict`): The same on further rows, by name.
        disagreement (`float`): Mean over rows of the learners' disagreement, see `ensembles.disagreement`.
        confidence (`float`): Mean over rows, see `ensembles.confidence`.
        class_shares (`list[float]`): Share of rows whose most likely class is the k-th.
        labelled_shares (`list[float]`): Share of each class among the true labels the learners started from.
        warnings (`list[str]`): What a person should look at.
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
        models = "; ".join(_figures(name, figures) for name, figures in self.learners.items())
        return (
            f"{self.path}: {self.rows} rows labelled{right}; mean disagreement {self.disagreement:.3f}, confidence "
            f"{self.confidence:.3f}; classes {_percentages(self.class_shares)}, true ones of {self.labelled} rows "
            f"{_percentages(self.labelled_shares)}\n{self.ensemble} vote of {models}"
        )


def label_rows(
    learners: Sequence[Learner],
    labelled: Rows,
    target: Rows,
    *,
    num_classes: int,
    seed: int,
    folder: str | os.PathLike,
    ensemble: Literal["soft", "hard", "accuracy"] = "soft",
    calibrate: bool = True,
    calibration_share: float = 0.2,
    extra: Mapping[str, Rows] | None = None,
) -> LabelReport:
    """Train weak models on true labels and let them label other rows.

    Where `calibrate` or an accuracy-weighted vote needs it, a slice of `labelled` is kept from training (whole groups,
    the same slice for every learner). Each learner's answers are on disk before the next one begins.

    Args:
        learners: One or more, of different names; each is fitted with a seed made of `seed` and its name.
        labelled: Rows with true labels.
        target: Rows to label; their true labels, where known, are only used in the report.
        num_classes: K.
        seed: Of the slice and the learners.
        folder: Where everything goes.
        ensemble: See `ensembles.combine`.
        calibrate: Whether to fit a temperature for each learner on the slice.
        calibration_share: Size of the slice, a share of `labelled`.
        extra: Further rows to predict, by the name of their file.

    Raises:
        ValueError: Rows without true label, ids that occur twice, learners of one name, answers that are no
            probabilities, or a folder made with other settings; one line that names them.
    """
    setup = _Setup(labelled, target, extra or {}, num_classes, seed, ensemble, calibrate, calibration_share)
    setup.check([learners])
    held, rest = setup.take_slice()
    return _label(learners, [_Half(rest, setup.true_labels(rest), target)], held, setup, Path(folder))[0]


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
    extra: Mapping[str, Rows] | None = None,
) -> list[LabelReport]:
    """Weak -> middle -> ...: each stage learns the labels of the stage before it (arXiv 2312.09390, section 4.3.1).

    The first stage is `label_rows`. Every later learner is cross-fitted on the target rows, so that none labels rows
    it was trained on: the target is split in two halves (whole groups), a copy trained on the soft labels of either
    half labels the other one, and further rows get the mean of both. All stages are calibrated on the slice of true
    labels that the first one held back, which no learner is ever trained on.

    Args:
        stages: Learners of each stage, the weakest first.
        labelled, target, num_classes, seed, ensemble, calibrate, calibration_share, extra: As for `label_rows`.
        folder: Each stage has its own folder in it, `stage_0`, `stage_1`, ..., laid out like that of `label_rows`.

    Returns:
        A report for each stage; the last one's `path` is the file to train the strong model on.

    Raises:
        ValueError: As for `label_rows`, or no stage.
    """
    if not stages:
        raise ValueError("no stages; give a list of learners for each")
    setup = _Setup(labelled, target, extra or {}, num_classes, seed, ensemble, calibrate, calibration_share)
    setup.check(stages)
    held, rest = setup.take_slice()
    halves = split_halves(target, seed=seed) if len(stages) > 1 else ()
    places = {row.id: i for i, row in enumerate(target)}
    lessons = [_Half(rest, setup.true_labels(rest), target)]
    reports = []
    for number, learners in enumerate(stages):
        report, soft = _label(learners, lessons, held, setup, Path(folder) / f"stage_{number}")
        reports.append(report)
        if halves:
            pairs = (halves, halves[::-1])
            lessons = [_Half(own, soft[[places[row.id] for row in own]], other) for own, other in pairs]
    return reports


class _Half(NamedTuple):
    """What a learner is trained on, and the target rows it may then label."""

    rows: Rows
    soft_labels: np.ndarray
    asked: Rows


@dataclass(frozen=True)
class _Setup:
    """The arguments that `label_rows` and `bootstrap_chain` share."""

    labelled: Rows
    target: Rows
    extra: Mapping[str, Rows]
    num_classes: int
    seed: int
    ensemble: str
    calibrate: bool
    calibration_share: float

    def check(self, stages: Sequence[Sequence[Learner]]) -> None:
        if self.ensemble not in METHODS:
            raise ValueError(f"`ensemble` is {self.ensemble!r}; give one of {', '.join(METHODS)}")
        if self.num_classes < 2:
            raise ValueError(f"`num_classes` is {self.num_classes}; give at least 2")
        for learners in stages:
            _check_names([learner.name for learner in learners])
        for name in self.extra:
            if not _FILE_NAME.fullmatch(name) or name in (SLICE, _TARGET, WEAK_LABELS.removesuffix(".jsonl")):
                raise ValueError(f"`extra`: {name!r} cannot name a file here; use another word, such as 'test'")
        sets = {"labelled": self.labelled, "target": self.target} | dict(self.extra)
        for name, rows in sets.items():
            check_rows(name, rows, self.num_classes, isinstance(self.labelled[0], Pair) if self.labelled else False)
        for row in self.labelled:
            if row.label is None:
                raise ValueError(f"labelled row {row.id!r} has no true label; leave it out, or label it by hand")

    def take_slice(self) -> tuple[Rows, Rows]:
        """Rows held back for calibration, and the others."""
        if not (self.calibrate or self.ensemble == "accuracy"):
            return [], self.labelled
        return take_slice(self.labelled, self.calibration_share, seed=self.seed)

    def true_labels(self, rows: Rows) -> np.ndarray:
        """One-hot, `(N, K)`."""
        return np.eye(self.num_classes)[[row.label for row in rows]]

    def settings(self, learners: Sequence[Learner]) -> dict[str, Any]:
        """What the file of weak labels depends on, beside what each learner's folder says itself."""
        return {
            "learners": [learner.name for learner in learners],
            "ensemble": self.ensemble,
            "calibrate": self.calibrate,
            "calibration_share": self.calibration_share,
            "seed": self.seed,
            "num_classes": self.num_classes,
            "labelled": fingerprint(self.labelled),
            "target": fingerprint(self.target),
            "extra": {name: fingerprint(rows) for name, rows in self.extra.items()},
        }

    def warnings(self, predicted: np.ndarray) -> list[str]:
        """What a person should look at, given the most likely class of each target row."""
        found = []
        for name, labels in (("true", [row.label for row in self.labelled]), ("weak", predicted.tolist())):
            if absent := sorted(set(range(self.num_classes)) - set(labels)):
                what = "class" if len(absent) == 1 else "classes"
                found.append(
                    f"{what} {', '.join(map(str, absent))} absent from the {name} labels: a strong model trained on "
                    "them will not learn to predict it; label more rows, or draw them by class"
                )
        known = {_texts(row) for row in self.labelled}
        if copies := sum(_texts(row) in known for row in self.target):
            found.append(f"{copies} rows to label have the text of a row with a true label; the weak models know it")
        groups = {row.group for row in self.labelled} - {None}
        if torn := len(groups & {row.group for row in self.target}):
            found.append(f"{torn} groups are on both sides; split with `split_halves`, which keeps them whole")
        return found


def _label(
    learners: Sequence[Learner], halves: Sequence[_Half], held: Rows, setup: _Setup, folder: Path
) -> tuple[LabelReport, np.ndarray]:
    """One stage: report, and soft labels `(N, K)` of the target rows."""
    output = folder / WEAK_LABELS
    check_resume(folder / "settings.json", setup.settings(learners), made=str(output), started=output.exists())
    said: dict[str, list[np.ndarray]] = {_TARGET: [], **{name: [] for name in setup.extra}}
    figures: dict[str, dict[str, Any]] = {}
    for learner in learners:
        answers, figures[learner.name] = _ask(learner, halves, held, setup, folder / "learners")
        for name, probs in answers.items():
            said[name].append(probs)
    accuracies = [np.mean(values["accuracy"]) for values in figures.values()] if held else None
    soft = {name: combine(np.stack(probs), setup.ensemble, accuracies) for name, probs in said.items()}
    apart = disagreement(np.stack(said[_TARGET]))
    for name, rows in setup.extra.items():
        write_jsonl(folder / f"{name}.jsonl", prediction_rows(rows, soft[name]))
    weak = dict(zip(figures, said[_TARGET], strict=True))
    write_jsonl(output, weak_label_rows(setup.target, soft[_TARGET], weak, apart))
    return _report(output, soft, apart, figures, held, setup), soft[_TARGET]


def _ask(
    learner: Learner, halves: Sequence[_Half], held: Rows, setup: _Setup, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A learner's probabilities of the target rows, each from a copy not trained on it, and of further rows."""
    folder = folder / folder_name(learner.name)
    answers = []
    for number, half in enumerate(halves):
        asked = {_TARGET: half.asked, **setup.extra} | ({SLICE: held} if held else {})
        lesson = Lesson(half.rows, half.soft_labels, asked, setup.calibrate, _seed_of(setup.seed, learner.name))
        answers.append(teach(learner, lesson, folder / f"half_{number}" if len(halves) > 1 else folder))
    by_id = {
        row.id: probs
        for half, answer in zip(halves, answers, strict=True)
        for row, probs in zip(half.asked, answer.probs[_TARGET], strict=True)
    }
    said = {_TARGET: np.array([by_id[row.id] for row in setup.target])}
    said |= {name: np.mean([answer.probs[name] for answer in answers], axis=0) for name in setup.extra}
    for name, rows in setup.extra.items() if len(halves) > 1 else ():
        write_jsonl(folder / f"{name}.jsonl", prediction_rows(rows, said[name]))
    figures = {key: [answer.report[key] for answer in answers] for key in answers[0].report}
    figures["target_accuracy"] = accuracy(said[_TARGET], setup.target)
    figures["extra_accuracy"] = {name: accuracy(said[name], rows) for name, rows in setup.extra.items()}
    figures["resumed"] = all(answer.resumed for answer in answers)
    return said, figures


def _report(
    output: Path,
    soft: Mapping[str, np.ndarray],
    apart: np.ndarray,
    figures: dict[str, dict[str, Any]],
    held: Rows,
    setup: _Setup,
) -> LabelReport:
    predicted = soft[_TARGET].argmax(axis=1)
    warnings = setup.warnings(predicted)
    warnings += [f"{name}: {note}" for name, values in figures.items() for note in values["note"] if note]
    for warning in warnings:
        logger.warning("%s: %s", output, warning)
    return LabelReport(
        path=str(output),
        rows=len(setup.target),
        labelled=len(setup.labelled),
        slice_rows=len(held),
        ensemble=setup.ensemble,
        learners=figures,
        target_accuracy=accuracy(soft[_TARGET], setup.target),
        extra_accuracy={name: accuracy(soft[name], rows) for name, rows in setup.extra.items()},
        disagreement=float(apart.mean()),
        confidence=float(confidence(soft[_TARGET]).mean()),
        class_shares=_shares(predicted, setup.num_classes),
        labelled_shares=_shares(np.array([row.label for row in setup.labelled]), setup.num_classes),
        warnings=warnings,
    )


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("no learner; give at least one")
    for name, count in Counter(map(folder_name, names)).items():
        if count > 1:
            raise ValueError(f"{count} learners are called {name!r}; give each a `name` of its own")


def _seed_of(seed: int, name: str) -> int:
    """Learners of one kind are to differ, whatever their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def _texts(row: Example | Pair) -> tuple[str, ...]:
    return (row.chosen, row.rejected) if isinstance(row, Pair) else (row.text,)


def _shares(classes: np.ndarray, num_classes: int) -> list[float]:
    return (np.bincount(classes, minlength=num_classes) / len(classes)).tolist()


def _percentages(shares: Sequence[float]) -> str:
    return " / ".join(f"{share:.1%}" for share in shares)


def _figures(name: str, figures: Mapping[str, Any]) -> str:
    parts = []
    if figures["accuracy"][0] is not None:
        parts.append(f"{np.mean(figures['accuracy']):.1%} right on the slice")
    if figures["target_accuracy"] is not None:
        parts.append(f"{figures['target_accuracy']:.1%} on these rows")
    parts.append("T " + " and ".join(f"{value:.2f}" for value in figures["temperature"]))
    return f"{name} ({', '.join(parts)}{', from an earlier run' if figures['resumed'] else ''})"
