"""Bags of words that learn soft labels: against scikit-learn's own fit, by symmetry, and on disk."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from trl_extensions.weak_to_strong.data.examples import Example, Pair, load_examples
from trl_extensions.weak_to_strong.labels.sklearn_learner import KINDS, SklearnLearner
from trl_extensions.weak_to_strong.trainers.features import FeatureStore


DATA = Path(__file__).resolve().parents[4] / "shared/data"
TEXTS = [
    "the court overruled the earlier case",
    "that decision is hereby overruled",
    "we affirm the judgment of the court",
    "the judgment below is affirmed",
    "an earlier decision we now overrule",
    "affirmed with costs",
]
LABELS = [0, 0, 1, 1, 0, 1]
NEW = ["the case is overruled", "we affirm", "costs of the court", "zebra"]


def examples(texts=TEXTS, labels=LABELS):
    return [Example(f"r{i}", text, label) for i, (text, label) in enumerate(zip(texts, labels, strict=True))]


def unlabelled(texts):
    return examples(texts, [None] * len(texts))


def pairs(texts=TEXTS):
    """Texts that affirm are better than those that overrule."""
    bad, good = [texts[i] for i in (0, 1, 4)], [texts[i] for i in (2, 3, 5)]
    rows = []
    for i, (b, g) in enumerate((b, g) for b in bad for g in good):
        rows.append(Pair(f"p{i}", *((b, g) if i % 2 else (g, b)), i % 2))
    return rows


def one_hot(rows, num_classes=2):
    return np.eye(num_classes)[[row.label for row in rows]]


def scikit_learn(kind):
    words = {"ngram_range": (1, 2), "token_pattern": r"\b\w+\b"}
    if kind == "naive-bayes":
        return CountVectorizer(**words), MultinomialNB()
    options = words if kind == "tfidf-logreg" else {"analyzer": "char_wb", "ngram_range": (2, 5)}
    return TfidfVectorizer(sublinear_tf=True, **options), LogisticRegression(C=10.0, max_iter=2000)


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_labels_are_a_plain_fit(kind):
    learner = SklearnLearner(kind)
    learner.fit(examples(), one_hot(examples()))
    vectorizer, estimator = scikit_learn(kind)
    estimator.fit(vectorizer.fit_transform(TEXTS), LABELS)
    expected = estimator.predict_proba(vectorizer.transform(NEW))
    assert learner.predict(unlabelled(NEW)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_are_repeated_rows(kind):
    """A row with soft label 3/4 counts as one of four rows: three of one class and one of the other."""
    soft = np.array([[0.75, 0.25], [1, 0], [0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0, 1]])
    learner = SklearnLearner(kind)
    learner.fit(examples(), soft)
    vectorizer, estimator = scikit_learn(kind)
    features = vectorizer.fit_transform(TEXTS)
    counts = (soft * 4).round().astype(int)
    places = [i for i in range(6) for k in range(2) for _ in range(counts[i, k])]
    classes = [k for i in range(6) for k in range(2) for _ in range(counts[i, k])]
    assert len(places) == 24
    fitted = estimator.fit(features[places], classes, sample_weight=np.full(24, 1 / 4))
    expected = fitted.predict_proba(vectorizer.transform(NEW))
    assert learner.predict(unlabelled(NEW)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_a_pair_swaps_its_probabilities_exactly(kind):
    learner, rows = SklearnLearner(kind), pairs()
    learner.fit(rows, one_hot(rows))
    probs = learner.predict(rows)
    swapped = learner.predict([Pair(row.id, row.rejected, row.chosen, 1 - row.label) for row in rows])
    assert (swapped == probs[:, ::-1]).all()
    assert probs.sum(axis=1) == pytest.approx(1)
    assert (probs.argmax(axis=1) == [row.label for row in rows]).all()
    assert learner.predict([Pair("same", NEW[0], NEW[0], None)]).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("kind", KINDS)
def test_order_within_training_pairs_does_not_matter(kind):
    """Turned round so that `chosen` is always the better one, with soft labels turned as well."""
    rows, soft = pairs(), np.tile([0.9, 0.1], (9, 1))
    soft[[row.label == 1 for row in rows]] = [0.1, 0.9]
    turned = [
        Pair(row.id, *((row.rejected, row.chosen) if row.label else (row.chosen, row.rejected)), 0) for row in rows
    ]
    first, second = SklearnLearner(kind), SklearnLearner(kind)
    first.fit(rows, soft)
    second.fit(turned, np.tile([0.9, 0.1], (9, 1)))
    asked = [Pair("a", NEW[0], NEW[1], None), Pair("b", NEW[1], NEW[2], None)]
    assert first.predict(asked) == pytest.approx(second.predict(asked), abs=1e-4)
    assert abs(first.predict(asked)[0, 0] - 0.5) > 0.05


def test_naive_bayes_of_pairs_is_bayes_rule():
    """Words of better and worse texts counted by hand, with one added to each of the three words."""
    rows = [Pair("a", "x x y", "z", 0), Pair("b", "y", "x", 1)]
    learner = SklearnLearner("naive-bayes")
    learner.fit(rows, one_hot(rows))
    # Unigrams and bigrams: x, y, z, "x x", "x y". Better: {x:2, y:1, "x x":1, "x y":1} + {x:1}; worse: {z:1} + {y:1}
    better = np.array([4, 2, 1, 2, 2]) / 11
    worse = np.array([1, 2, 2, 1, 1]) / 7
    margin = np.log(better / worse)
    [probs] = learner.predict([Pair("n", "x", "z", None)])
    assert probs[0] == pytest.approx(expit(margin[0] - margin[2]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_does_not_occur_keeps_its_column(kind):
    learner = SklearnLearner(kind)
    soft = np.insert(one_hot(examples()), 1, 0.0, axis=1)
    learner.fit(examples(), soft)
    probs = learner.predict(unlabelled(NEW))
    assert probs.shape == (4, 3) and (probs[:, 1] == 0).all()
    plain = SklearnLearner(kind)
    plain.fit(examples(), one_hot(examples()))
    assert probs[:, [0, 2]] == pytest.approx(plain.predict(unlabelled(NEW)))


def test_naive_bayes_does_not_underflow_to_zero():
    learner = SklearnLearner("naive-bayes")
    learner.fit(examples(), one_hot(examples()))
    probs = learner.predict(unlabelled(["overruled " * 3000]))
    assert 0 < probs[0, 1] < 1e-200 and probs[0].sum() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [examples(), pairs()], ids=["texts", "pairs"])
def test_a_saved_model_predicts_without_a_fit(tmp_path, kind, rows):
    learner = SklearnLearner(kind)
    learner.fit(rows, one_hot(rows), seed=0, folder=tmp_path / "m")
    loaded = SklearnLearner(kind, name="other")
    loaded.load(tmp_path / "m")
    assert (loaded.predict(rows) == learner.predict(rows)).all()
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.npz"]


class Opened:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_no_saved_model_of_the_kind(tmp_path):
    rows = examples()
    SklearnLearner("tfidf-logreg").fit(rows, one_hot(rows), folder=tmp_path)
    with pytest.raises(ValueError, match=r"is a tfidf-logreg model, not naive-bayes; use another folder"):
        SklearnLearner("naive-bayes").load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        SklearnLearner("naive-bayes").load(tmp_path / "nowhere")
    for name, message in (("model.joblib", "holds a pickle, .* label again$"), ("model.npz", "label again$")):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
        with pytest.raises(ValueError, match=message):
            SklearnLearner("naive-bayes").load(tmp_path / "old")
    np.savez(tmp_path / "old" / "model.npz", about=np.array([Opened(tmp_path / "opened")], dtype=object))
    with pytest.raises(ValueError, match=r"label again$"):
        SklearnLearner("naive-bayes").load(tmp_path / "old")
    with pytest.raises(ValueError, match="no cache of features"):
        FeatureStore(tmp_path / "old" / "model.npz")
    assert not (tmp_path / "opened").exists(), "nothing was run"


def test_a_new_fit_replaces_the_saved_model(tmp_path):
    rows = examples()
    learner = SklearnLearner("tfidf-logreg")
    for soft in (one_hot(rows), one_hot(rows)[:, ::-1]):
        learner.fit(rows, soft, folder=tmp_path)
        loaded = SklearnLearner("tfidf-logreg")
        loaded.load(tmp_path)
        assert (loaded.predict(rows) == learner.predict(rows)).all()


def test_bad_input_is_one_line():
    rows, hot = examples(), one_hot(examples())
    learner = SklearnLearner("naive-bayes")
    broken = hot.copy()
    broken[2] = [0.5, 0.6]
    for call, message in (
        (lambda: SklearnLearner("bert"), "no scikit-learn learner 'bert'; give one of tfidf-logreg, naive-bayes"),
        (lambda: learner.predict(rows), "has learnt nothing"),
        (lambda: learner.fit([], hot), "no rows"),
        (lambda: learner.fit(rows, hot[:3]), r"shape \(3, 2\) for 6 rows"),
        (lambda: learner.fit(rows, broken), r"row 'r2': \[0.5, 0.6\] are no probabilities"),
        (lambda: learner.fit(rows, np.array([[1.0, 0.0]] * 6)), "all 6 training rows are of class 0"),
        (lambda: learner.fit([*rows[:5], pairs()[0]], hot), "row 'p0': texts and pairs are mixed"),
        (lambda: learner.fit(pairs(), np.eye(3)[[0] * 9]), "pairs need 2"),
        (lambda: learner.fit(examples(["!", "?"], [0, 1]), np.eye(2)), "hold no words"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    learner.fit(rows, hot)
    with pytest.raises(ValueError, match="learnt from single texts; row 'p0' is none"):
        learner.predict(pairs())
    assert learner.predict([]).shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_real_safety_prompts(kind):
    if not (DATA / "safety_mix/train.jsonl").is_file():
        pytest.skip("safety_mix is not beside this checkout (shared/data)")
    train, _ = load_examples(DATA / "safety_mix/train.jsonl", limit=300)
    test, _ = load_examples(DATA / "safety_mix/test.jsonl")
    learner = SklearnLearner(kind)
    learner.fit(train, one_hot(train))
    right = learner.predict(test).argmax(axis=1) == [row.label for row in test]
    # Half of the rows are safe: chance is 1/2, with a standard error of 0.022 over 500 rows
    assert right.mean() > 0.75
