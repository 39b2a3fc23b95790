"""Bags of words as a weak model: fitted in a second on one core, and a fair stand-in for a cheap annotator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from ..data.examples import Example, Pair
from .learners import _digest, checked_probs, fingerprint


KINDS = ("tfidf-logreg", "naive-bayes", "char-logreg")

_WORDS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b", "max_features": 200_000}
_CHARACTERS = {"analyzer": "char_wb", "ngram_range": (2, 5), "max_features": 200_000}
_FILE = "model.joblib"
# Naive Bayes on long texts underflows to 0, which would hide from the calibration how wrong it was
_FLOOR = 1e-300


class SklearnLearner:
    """A linear text classifier of scikit-learn that learns from soft labels.

    Each row counts once per class, weighted by that class's soft label (times the row's weight): the gradient is that
    of the soft cross-entropy. Nothing is random; `seed` is not used, so two of one kind are the same model.

    Pairs are judged by the difference of their texts' vectors, without an intercept: P(chosen is better) =
    sigmoid(w . (v(chosen) - v(rejected))), so swapping a pair swaps its probabilities exactly. For naive Bayes w holds
    the log-ratios of a word's frequency in better and in worse texts, which is Bayes' rule for "exactly one of the two
    is the better one".

    Args:
        kind: "tfidf-logreg": TF-IDF of words and word pairs, logistic regression. "naive-bayes": their counts,
            multinomial naive Bayes. "char-logreg": TF-IDF of 2 to 5 characters inside of words, logistic regression;
            for misspelt text and for languages that do not put blanks between words.
        name: Defaults to `kind`.

    Raises:
        ValueError: An unknown kind.
    """

    def __init__(self, kind: Literal["tfidf-logreg", "naive-bayes", "char-logreg"], *, name: str | None = None):
        if kind not in KINDS:
            raise ValueError(f"there is no scikit-learn learner {kind!r}; give one of {', '.join(KINDS)}")
        self.kind = kind
        self.name = name or kind
        self.settings = {"kind": kind}
        self._model: dict[str, Any] | None = None

    def fit(
        self,
        rows: Sequence[Example | Pair],
        soft_labels: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        """Learn soft labels; a model in `folder` that was fitted on exactly these is loaded instead.

        Args:
            rows: N examples, or N pairs.
            soft_labels: `(N, K)`. A class without any weight gets probability 0.
            weights: `(N,)`, none negative, or None for equal ones.
            seed: Not used.
            folder: Where the model is kept; None to keep it in memory.

        Raises:
            ValueError: Rows, labels or weights that cannot be used, or a model in `folder` of another kind or fitted
                on something else.
        """
        pairs = _are_pairs(rows)
        soft_labels = np.asarray(soft_labels, dtype=np.float64)
        num_classes = soft_labels.shape[1] if soft_labels.ndim == 2 else 2
        soft_labels = checked_probs(soft_labels, rows, num_classes, "soft labels of " + self.name)
        if num_classes < 2 or (pairs and num_classes != 2):
            raise ValueError(f"soft labels have {num_classes} classes; pairs need 2, texts 2 or more")
        masses = soft_labels * _checked_weights(weights, rows)[:, None]
        fitted_on = fingerprint(rows) | {"labels": _digest([masses.tobytes()])}
        if folder is not None and (Path(folder) / _FILE).is_file():
            self.load(folder)
            if self._model["fitted_on"] != fitted_on:
                self._model = None
                raise ValueError(f"{folder}: its model was fitted on other rows or labels; use another folder")
            return
        fitted = self._fit_pairs(rows, masses) if pairs else self._fit_texts(rows, masses)
        self._model = {"kind": self.kind, "pairs": pairs, "num_classes": num_classes, "fitted_on": fitted_on} | fitted
        if folder is not None:
            _save(self._model, Path(folder))

    def predict(self, rows: Sequence[Example | Pair]) -> np.ndarray:
        """`(N, K)` probabilities.

        Raises:
            ValueError: Nothing was learnt yet, or rows of another form than what was learnt.
        """
        if self._model is None:
            raise ValueError(f"learner {self.name!r} has learnt nothing; call `fit` or `load` first")
        if not rows:
            return np.empty((0, self._model["num_classes"]))
        if _are_pairs(rows) != self._model["pairs"]:
            form = "pairs" if self._model["pairs"] else "single texts"
            raise ValueError(f"learner {self.name!r} learnt from {form}; row {rows[0].id!r} is none")
        vectorizer = self._model["vectorizer"]
        if self._model["pairs"]:
            margins = _differences(vectorizer, rows) @ self._model["coefficients"]
            return np.stack([expit(margins), expit(-margins)], axis=1)
        probs = np.zeros((len(rows), self._model["num_classes"]))
        estimator = self._model["estimator"]
        known = estimator.predict_proba(vectorizer.transform([row.text for row in rows]))
        probs[:, estimator.classes_] = np.maximum(known, _FLOOR)
        return probs / probs.sum(axis=1, keepdims=True)

    def load(self, folder: str | os.PathLike) -> None:
        """Take up a model that `fit` left in a folder. Load only what you trust: the file is a pickle.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is of another kind.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; fit the learner first")
        model = joblib.load(path)
        if model.get("kind") != self.kind:
            raise ValueError(f"{path} is a {model.get('kind')} model, not {self.kind}; use another folder")
        self._model = model

    def _fit_texts(self, rows: Sequence[Example], masses: np.ndarray) -> dict[str, Any]:
        classes = np.flatnonzero(masses.sum(axis=0) > 0)
        if len(classes) < 2:
            raise ValueError(
                f"learner {self.name!r}: all {len(rows)} training rows are of class {classes[0]}; there is nothing to "
                "tell apart, add rows of another class"
            )
        vectorizer, features = self._vectorize([row.text for row in rows])
        return {"vectorizer": vectorizer, "estimator": self._estimator().fit(*_per_class(features, masses))}

    def _fit_pairs(self, rows: Sequence[Pair], masses: np.ndarray) -> dict[str, Any]:
        texts = [text for row in rows for text in (row.chosen, row.rejected)]
        vectorizer, features = self._vectorize(texts)
        first, second = features[0::2], features[1::2]
        if self.kind == "naive-bayes":
            # Class 0 are the better texts. The first text is one where the label says so, the second where not
            estimator = MultinomialNB().fit(*_per_class(vstack([first, second]), np.vstack([masses, masses[:, ::-1]])))
            coefficients = estimator.feature_log_prob_[0] - estimator.feature_log_prob_[1]
        else:
            # Every pair in both orders: the same loss twice, and both classes are there even if no pair was swapped
            both = np.vstack([masses, masses[:, ::-1]]) / 2
            data = _per_class(vstack([first - second, second - first]), both)
            coefficients = -self._estimator(fit_intercept=False).fit(*data).coef_[0]
        return {"vectorizer": vectorizer, "coefficients": coefficients}

    def _vectorize(self, texts: list[str]) -> tuple[CountVectorizer, csr_matrix]:
        if self.kind == "naive-bayes":
            vectorizer = CountVectorizer(**_WORDS)
        else:
            vectorizer = TfidfVectorizer(sublinear_tf=True, **(_WORDS if self.kind == "tfidf-logreg" else _CHARACTERS))
        try:
            return vectorizer, vectorizer.fit_transform(texts)
        except ValueError:  # an empty vocabulary
            raise ValueError(
                f"learner {self.name!r}: the {len(texts)} training texts hold no words; check the text column"
            ) from None

    def _estimator(self, **options: Any) -> LogisticRegression | MultinomialNB:
        if self.kind == "naive-bayes":
            return MultinomialNB()
        return LogisticRegression(C=10.0, max_iter=2000, **options)


def _per_class(features: csr_matrix, masses: np.ndarray) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
    """Every row once per class in which it has mass: features, classes, weights."""
    places, classes = np.nonzero(masses)
    return features[places], classes, masses[places, classes]


def _differences(vectorizer: CountVectorizer, rows: Sequence[Pair]) -> csr_matrix:
    return vectorizer.transform([row.chosen for row in rows]) - vectorizer.transform([row.rejected for row in rows])


def _are_pairs(rows: Sequence[Example | Pair]) -> bool:
    if not rows:
        raise ValueError("no rows to learn from")
    pairs = isinstance(rows[0], Pair)
    for row in rows:
        if isinstance(row, Pair) != pairs:
            raise ValueError(f"row {row.id!r}: texts and pairs are mixed; give one form")
    return pairs


def _checked_weights(weights: np.ndarray | None, rows: Sequence[Example | Pair]) -> np.ndarray:
    if weights is None:
        return np.ones(len(rows))
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(rows),):
        raise ValueError(f"weights of shape {weights.shape} for {len(rows)} rows; give one a row")
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(f"row {rows[place].id!r}: weight {weights[place]}; weights are finite and not negative")
    if not weights.any():
        raise ValueError(f"all {len(rows)} weights are 0; give some row a positive one")
    return weights


def _save(model: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (_FILE + ".partial")
    joblib.dump(model, partial)
    os.replace(partial, folder / _FILE)
