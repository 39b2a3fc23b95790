"""Bags of words as a weak model: fitted in a second on one core, and a fair stand-in for a cheap annotator."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit, log_softmax
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from ...core.runs.report import replacing
from ..data.examples import Example, Pair
from .learners import checked_probs


KINDS = ("tfidf-logreg", "naive-bayes", "char-logreg")

_WORDS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b", "max_features": 200_000}
_CHARACTERS = {"analyzer": "char_wb", "ngram_range": (2, 5), "max_features": 200_000}
_FILE = "model.npz"
# Naive Bayes on long texts underflows to 0, which would hide from the calibration how wrong it was
_FLOOR = 1e-300


class SklearnLearner:
    """A linear text classifier of scikit-learn that learns from soft labels.

    Each row counts once per class, weighted by that class's soft label: the gradient is that of the soft
    cross-entropy. Nothing is random, so two of one kind are the same model.

    Pairs are judged by the difference of their texts' vectors, without an intercept: P(chosen is better) =
    sigmoid(w . (v(chosen) - v(rejected))), so swapping a pair swaps its probabilities exactly. For naive Bayes w holds
    the log-ratios of a word's frequency in better and in worse texts, which is Bayes' rule.

    Args:
        kind: "tfidf-logreg": TF-IDF of words and word pairs, logistic regression. "naive-bayes": their counts,
            multinomial naive Bayes. "char-logreg": TF-IDF of 2 to 5 characters inside of words, logistic regression;
            for misspelt text and for languages that do not put blanks between words.
        name: Defaults to `kind`.
    """

    def __init__(self, kind: str, *, name: str | None = None):
        if kind not in KINDS:
            raise ValueError(f"there is no scikit-learn learner {kind!r}; give one of {', '.join(KINDS)}")
        self.kind = kind
        self.name = name or kind
        self.settings = {"kind": kind}
        # `coef` (classes that occur, words) and `intercept` say log p up to a constant; of pairs one row, the margin
        self._model: dict[str, Any] | None = None

    def fit(
        self, rows: Sequence[Example | Pair], soft_labels: np.ndarray, *, seed: int = 0, folder: Path | None = None
    ) -> None:
        """Learn soft labels `(N, K)`, a class without any weight with probability 0; the model is kept in `folder`."""
        pairs = _are_pairs(rows)
        soft_labels = checked_probs(soft_labels, rows, np.shape(soft_labels)[-1], "soft labels of " + self.name)
        num_classes = soft_labels.shape[1]
        if num_classes < 2 or (pairs and num_classes != 2):
            raise ValueError(f"soft labels have {num_classes} classes; pairs need 2, texts 2 or more")
        classes = np.arange(2) if pairs else np.flatnonzero(soft_labels.sum(axis=0))
        if len(classes) < 2:
            everything = f"all {len(rows)} training rows are of class {classes[0]}"
            raise ValueError(f"learner {self.name!r}: {everything}; add rows of another class")
        vectorizer = self._vectorizer()
        texts = [t for row in rows for t in ((row.chosen, row.rejected) if isinstance(row, Pair) else (row.text,))]
        try:
            features = vectorizer.fit_transform(texts)
        except ValueError:  # an empty vocabulary
            none = f"the {len(texts)} training texts hold no words"
            raise ValueError(f"learner {self.name!r}: {none}; check the text column") from None
        if pairs:
            first, second = features[0::2], features[1::2]
            # Every pair in both orders, so that both classes are there even if no pair was swapped
            both = np.vstack([soft_labels, soft_labels[:, ::-1]])
            if self.kind == "naive-bayes":  # class 0 are the better texts: the first one where the label says so
                coef, _ = self._fit(vstack([first, second]), both)
            else:
                coef, _ = self._fit(vstack([first - second, second - first]), both / 2, fit_intercept=False)
            coef, intercept = coef[:1] - coef[1:], np.zeros(1)
        else:
            coef, intercept = self._fit(features, soft_labels)
        self._model = {"kind": self.kind, "pairs": pairs, "num_classes": num_classes, "vectorizer": vectorizer}
        self._model |= {"coef": coef, "intercept": intercept, "classes": classes}
        if folder is not None:
            self._save(Path(folder), self._model)

    def _fit(self, features: csr_matrix, masses: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and intercept of each class that occurs, of log p up to a constant."""
        places, classes = np.nonzero(masses)  # every row once per class in which it has mass
        data = features[places], classes, masses[places, classes]
        if self.kind == "naive-bayes":
            bayes = MultinomialNB().fit(*data)
            return bayes.feature_log_prob_, bayes.class_log_prior_
        regression = LogisticRegression(C=10.0, max_iter=2000, **options).fit(*data)
        coef, intercept = regression.coef_, regression.intercept_
        if len(coef) > 1:
            return coef, intercept
        return np.vstack([0 * coef, coef]), np.append(0.0, intercept)  # of two classes scikit-learn has the log-odds

    def predict(self, rows: Sequence[Example | Pair]) -> np.ndarray:
        """`(N, K)` probabilities."""
        model = self._model
        if model is None:
            raise ValueError(f"learner {self.name!r} has learnt nothing; call `fit` or `load` first")
        if not rows:
            return np.empty((0, model["num_classes"]))
        if _are_pairs(rows) != model["pairs"]:
            form = "pairs" if model["pairs"] else "single texts"
            raise ValueError(f"learner {self.name!r} learnt from {form}; row {rows[0].id!r} is none")
        transform = model["vectorizer"].transform
        if model["pairs"]:
            differences = transform([row.chosen for row in rows]) - transform([row.rejected for row in rows])
            margins = differences @ model["coef"][0]
            return np.stack([expit(margins), expit(-margins)], axis=1)
        logs = transform([row.text for row in rows]) @ model["coef"].T + model["intercept"]
        probs = np.zeros((len(rows), model["num_classes"]))
        probs[:, model["classes"]] = np.maximum(np.exp(log_softmax(logs, axis=1)), _FLOOR)
        return probs / probs.sum(axis=1, keepdims=True)

    def load(self, folder: str | os.PathLike) -> None:
        """Take up a model that `fit` left in a folder: numbers and words, no code. `ValueError` for a pickle."""
        path = Path(folder) / _FILE
        if not path.is_file():
            if any(path.parent.glob("*.joblib")):
                raise ValueError(f"{path.parent} holds a pickle, which may run code and is not read; label again")
            raise FileNotFoundError(f"{path}: no such file; fit the learner first")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            model = json.loads(arrays.pop("about").tobytes())
        except (ValueError, TypeError, KeyError, EOFError, BadZipFile):  # the first for pickles too
            raise ValueError(f"{path} is no saved learner; delete it and label again") from None
        if model["kind"] != self.kind:
            raise ValueError(f"{path} is a {model['kind']} model, not {self.kind}; use another folder")
        vectorizer = self._vectorizer(vocabulary=model.pop("words"))
        if "idf" in arrays:
            vectorizer.idf_ = arrays.pop("idf")
        self._model = model | arrays | {"vectorizer": vectorizer}

    def _save(self, folder: Path, model: dict[str, Any]) -> None:
        arrays = {name: model[name] for name in ("coef", "intercept", "classes")}
        if hasattr(model["vectorizer"], "idf_"):
            arrays["idf"] = model["vectorizer"].idf_
        about = {name: model[name] for name in ("kind", "pairs", "num_classes")}
        about["words"] = model["vectorizer"].get_feature_names_out().tolist()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _FILE) as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)

    def _vectorizer(self, vocabulary: list[str] | None = None) -> CountVectorizer:
        if self.kind == "naive-bayes":
            return CountVectorizer(**_WORDS, vocabulary=vocabulary)
        options = _WORDS if self.kind == "tfidf-logreg" else _CHARACTERS
        return TfidfVectorizer(sublinear_tf=True, **options, vocabulary=vocabulary)


def _are_pairs(rows: Sequence[Example | Pair]) -> bool:
    if not rows:
        raise ValueError("no rows to learn from")
    pairs = isinstance(rows[0], Pair)
    for row in rows:
        if isinstance(row, Pair) != pairs:
            raise ValueError(f"row {row.id!r}: texts and pairs are mixed; give one form")
    return pairs
