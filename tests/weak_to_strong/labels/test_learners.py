"""Labels from weak models: every figure recomputed from the files, restarts, cross-fitting, and broken learners."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.weak_to_strong.data.examples import Example, Pair, load_examples, split_halves, take_slice
from trl_extensions.weak_to_strong.labels.calibrate import apply_temperature, fit_temperature
from trl_extensions.weak_to_strong.labels.learners import bootstrap_chain
from trl_extensions.weak_to_strong.labels.sklearn_learner import SklearnLearner


DATA = Path(__file__).resolve().parents[4] / "shared/data"
WORDS = (["calm", "kind", "mild", "soft"], ["rude", "harsh", "grim", "cruel"])


def make(prefix, n, group=None):
    """Texts of two noisy words of their class and two of any."""
    random = np.random.default_rng(n)
    rows = []
    for i in range(n):
        label = i % 2
        words = [str(random.choice(WORDS[label if k < 2 else random.integers(2)])) for k in range(4)]
        text = " ".join([*words, f"{prefix}{i}"])
        rows.append(Example(f"{prefix}{i}", text, label, group and f"{prefix}{i // group}"))
    return rows


LABELLED, TARGET, TEST = make("a", 120), make("b", 60), make("c", 30)


def stage(folder, learners=None, **options):
    learners = learners or [SklearnLearner("naive-bayes"), SklearnLearner("tfidf-logreg")]
    settings = {"num_classes": 2, "seed": 0, "eval_sets": {"test": TEST}} | options
    labelled, target = settings.pop("labelled", LABELLED), settings.pop("target", TARGET)
    return bootstrap_chain([learners], labelled, target, folder=folder, **settings)[0]


def label(*args, **options):
    return stage(*args, **options).report


class Fixed:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, name, says, **settings):
        self.name, self.says, self.settings = name, says, settings
        self.fits, self.asked, self.current = [], [], None

    def fit(self, rows, soft_labels, *, seed, folder):
        self.fits.append((rows, soft_labels, seed, folder))
        self.current = {row.id for row in rows}

    def predict(self, rows):
        self.asked.append((self.current, {row.id for row in rows}))
        return self.says(rows)


def always(p):
    return lambda rows: np.tile([p, 1 - p], (len(rows), 1))


def test_every_figure_from_the_files(tmp_path):
    result = stage(tmp_path)
    report = result.report
    rows = read_jsonl(report.path)
    assert [(r["id"], r["text"], r["label"]) for r in rows] == [(e.id, e.text, e.label) for e in TARGET]
    assert list(rows[0]) == ["id", "text", "label", "soft_labels", "weak", "disagreement", "confidence"]
    weak = {name: np.array([row["weak"][name] for row in rows]) for name in ("naive-bayes", "tfidf-logreg")}
    soft = np.array([row["soft_labels"] for row in rows])
    assert soft == pytest.approx((weak["naive-bayes"] + weak["tfidf-logreg"]) / 2)
    # Two models of two classes: each is half the difference from the mean
    apart = np.abs(weak["naive-bayes"] - weak["tfidf-logreg"])[:, 0] / 2
    assert [row["disagreement"] for row in rows] == pytest.approx(apart)
    assert [row["confidence"] for row in rows] == pytest.approx(np.abs(2 * soft[:, 0] - 1))
    truth = np.array([row.label for row in TARGET])
    assert report.target_accuracy == pytest.approx((soft.argmax(1) == truth).mean())
    assert report.learners["naive-bayes"]["target_accuracy"] == (weak["naive-bayes"].argmax(1) == truth).mean()
    assert report.disagreement == pytest.approx(apart.mean())
    assert report.class_shares == pytest.approx([(soft.argmax(1) == k).mean() for k in (0, 1)])
    assert report.labelled_shares == [0.5, 0.5] and (report.rows, report.labelled, report.slice_rows) == (60, 120, 24)
    assert soft == pytest.approx(result.soft["target"])
    right = result.soft["test"].argmax(axis=1) == [row.label for row in TEST]
    assert report.extra_accuracy == {"test": right.mean()}
    for name in weak:
        test = read_jsonl(tmp_path / "stage_0/learners" / name / "test.jsonl")
        assert [(row["id"], row["label"]) for row in test] == [(e.id, e.label) for e in TEST]
        assert np.array([row["probs"] for row in test]) == pytest.approx(result.by_learner[name]["test"])
    assert report.target_accuracy > 0.7  # two words of four give the class away


def test_calibration_is_that_of_an_independent_path(tmp_path):
    report = label(tmp_path, [SklearnLearner("naive-bayes")])
    held, rest = take_slice(LABELLED, 0.2, seed=0)
    learner = SklearnLearner("naive-bayes")
    learner.fit(rest, np.eye(2)[[row.label for row in rest]])
    temperature, _ = fit_temperature(learner.predict(held), np.array([row.label for row in held]))
    figures = report.learners["naive-bayes"]
    assert figures["temperature"] == [pytest.approx(temperature)] and temperature != 1
    assert figures["accuracy"] == [np.mean(learner.predict(held).argmax(1) == [row.label for row in held])]
    expected = apply_temperature(learner.predict(TARGET), temperature)
    assert np.array([row["soft_labels"] for row in read_jsonl(report.path)]) == pytest.approx(expected)


def test_the_slice_is_never_trained_on(tmp_path):
    learner = Fixed("f", always(0.7))
    label(tmp_path, [learner], labelled=make("g", 100, group=4))
    [(rows, soft, _, folder)] = learner.fits
    assert len(rows) == 80 and soft.tolist() == np.eye(2)[[row.label for row in rows]].tolist()
    asked = [ids for _, ids in learner.asked]
    held = next(ids for ids in asked if len(ids) == 20)
    assert {row.group for row in rows}.isdisjoint(f"g{int(i[1:]) // 4}" for i in held)
    assert folder == tmp_path / "stage_0/learners/f/model"


def test_without_calibration_nothing_is_held_back(tmp_path):
    learner = Fixed("f", always(0.7))
    report = label(tmp_path, [learner], calibrate=False)
    assert learner.fits[0][0] == LABELLED and report.slice_rows == 0
    assert report.learners["f"]["accuracy"] == [None]
    assert read_jsonl(report.path)[0]["soft_labels"] == pytest.approx([0.7, 0.3])
    assert "slice" not in report.summary


def test_accuracy_weights_come_from_the_slice(tmp_path):
    def says(share):
        """Right on this share of the slice: rows whose number, halved, is below it modulo 10."""

        def answer(rows):
            right = [(int(row.id[1:]) // 2) % 10 < 10 * share for row in rows]
            return np.array(
                [[0.9, 0.1] if (row.label == 0) == ok else [0.1, 0.9] for row, ok in zip(rows, right, strict=True)]
            )

        return answer

    report = label(
        tmp_path, [Fixed("good", says(0.9)), Fixed("fair", says(0.6))], ensemble="accuracy", calibrate=False
    )
    a, b = (report.learners[name]["accuracy"][0] for name in ("good", "fair"))
    assert 0.5 < b < a < 1
    weights = np.log([a / (1 - a), b / (1 - b)])
    for row in read_jsonl(report.path):
        mixed = np.average([row["weak"]["good"], row["weak"]["fair"]], axis=0, weights=weights)
        assert row["soft_labels"] == pytest.approx(mixed)


def test_learners_get_seeds_of_their_own(tmp_path):
    seeds = set()
    for folder, names, seed in (("x", "ab", 0), ("y", "ba", 0), ("z", "a", 1)):
        learners = [Fixed(name, always(0.7)) for name in names]
        label(tmp_path / folder, learners, seed=seed)
        seeds |= {(learner.name, seed, learner.fits[0][2]) for learner in learners}
    assert len(seeds) == len({fitted for *_, fitted in seeds}) == 3


def killed(rows):
    raise KeyboardInterrupt


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    whole = label(tmp_path / "whole", [Fixed("a", always(0.7)), Fixed("b/2", always(0.4))])
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path / "cut", [Fixed("a", always(0.7)), Fixed("b/2", killed)])
    assert not (tmp_path / "cut/stage_0/weak_labels.jsonl").exists()
    first, second = Fixed("a", killed), Fixed("b/2", always(0.4))
    report = label(tmp_path / "cut", [first, second])
    assert not first.fits and len(second.fits) == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert [report.learners[name]["resumed"] for name in ("a", "b/2")] == [True, False]
    expected = {name: values | {"resumed": name == "a"} for name, values in whole.learners.items()}
    assert replace(whole, path=report.path, learners=expected) == report
    assert not list(tmp_path.rglob("*.partial"))
    # All done: nothing is fitted, nothing changes
    again = label(tmp_path / "cut", [Fixed("a", killed), Fixed("b/2", killed)])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and again.rows == 60


def test_a_run_killed_after_the_fit_makes_the_same_model_and_refuses_other_settings(tmp_path):
    cut = SklearnLearner("naive-bayes")
    cut.predict = killed
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path, [cut])
    model = tmp_path / "stage_0/learners/naive-bayes/model/model.npz"
    written = model.read_bytes()
    with pytest.raises(ValueError, match=r"trained_on\.labels was"):
        label(tmp_path, [SklearnLearner("naive-bayes")], calibration_share=0.3)
    with pytest.raises(ValueError, match=r'settings\.kind was "naive-bayes", now "tfidf-logreg"'):
        label(tmp_path, [SklearnLearner("tfidf-logreg", name="naive-bayes")])
    label(tmp_path, [SklearnLearner("naive-bayes")])
    assert model.read_bytes() == written


def test_other_settings_are_refused_and_named(tmp_path):
    learners = [Fixed("a", always(0.7), size=3)]
    label(tmp_path, learners)
    for options, message in (
        ({"seed": 1}, "seed was 0, now 1"),
        ({"ensemble": "hard"}, 'ensemble was "soft", now "hard"'),
        ({"calibration_share": 0.3}, "calibration_share was 0.2, now 0.3"),
        ({"target": TARGET[:-1]}, r"target.digest was .*; target.rows was 60, now 59"),
        ({"labelled": LABELLED[1:]}, "labelled.rows was 120, now 119"),
        ({"eval_sets": None}, "extra.test was"),
        ({"learners": [Fixed("a", always(0.7), size=4)]}, "settings.size was 3, now 4"),
        ({"learners": [Fixed("b", always(0.7))]}, r'learners was \["a"\], now \["b"\]'),
    ):
        with pytest.raises(ValueError, match=message):
            label(tmp_path, **({"learners": learners} | options))


def test_the_same_answers_can_be_combined_anew(tmp_path):
    rounded = np.array([0.7002, 0.3], dtype=np.float16)  # sums to 1 to within 0.001
    label(tmp_path, [Fixed("a", lambda rows: np.tile(rounded, (len(rows), 1)))])
    assert sum(read_jsonl(tmp_path / "stage_0/weak_labels.jsonl")[0]["soft_labels"]) == pytest.approx(1, abs=1e-12)
    (tmp_path / "stage_0/weak_labels.jsonl").unlink()
    report = label(tmp_path, [Fixed("a", killed)], ensemble="hard")
    assert read_jsonl(report.path)[0]["soft_labels"] == [1.0, 0.0]


def broken(place, values):
    def says(rows):
        probs = np.tile([0.3, 0.7], (len(rows), 1))
        if len(rows) == len(TARGET):
            probs[place] = values
        return probs

    return says


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (broken(5, [0.5, 0.6]), r"learner 'f', row 'b5': \[0.5, 0.6\] are no probabilities"),
        (broken(7, [np.nan, 1.0]), r"learner 'f', row 'b7': \[nan, 1.0\]"),
        (broken(9, [-0.5, 1.5]), r"learner 'f', row 'b9'"),
        (broken(0, [np.inf, 0.0]), r"learner 'f', row 'b0'"),
        (
            lambda rows: np.full((len(rows), 3), 1 / 3),
            r"learner 'f' gave probabilities of shape \(60, 3\) for 60 rows",
        ),
        (lambda rows: np.full((len(rows) - 1, 2), 0.5), r"shape \(59, 2\) for 60 rows and 2 classes"),
    ],
)
def test_a_broken_learner_is_named(tmp_path, says, message):
    with pytest.raises(ValueError, match=message) as error:
        label(tmp_path, [Fixed("f", says)])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learners": [Fixed("a/b", always(0.5)), Fixed("a:b", always(0.5))]}, "2 learners are called 'a-b'"),
        ({"ensemble": "mean"}, "`ensemble` is 'mean'"),
        ({"labelled": [*LABELLED, Example("x", "t", None)]}, "labelled row 'x' has no true label"),
        ({"labelled": [*LABELLED, Example("x", "t", 2)]}, "labelled row 'x': label 2 is none of the 2 classes"),
        ({"target": [*TARGET, TARGET[0]]}, "target row 'b0': this id occurs twice"),
        ({"target": [Pair("x", "a", "b", 0)]}, "target row 'x': texts and pairs are mixed"),
        ({"target": []}, "there are no target rows"),
        ({"labelled": []}, "there are no labelled rows"),
        ({"eval_sets": {"slice": TEST}}, "'slice' has a meaning of its own"),
        ({"calibration_share": 0.0}, "between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        label(tmp_path, **options)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.jsonl"))
    with pytest.raises(ValueError, match="no learner"):
        bootstrap_chain([[]], LABELLED, TARGET, num_classes=2, seed=0, folder=tmp_path)
    with pytest.raises(ValueError, match="no learner"):
        bootstrap_chain([], LABELLED, TARGET, num_classes=2, seed=0, folder=tmp_path)


def test_warnings(tmp_path, caplog):
    target = [*TARGET[:-1], replace(LABELLED[0], id="copy")]
    report = label(tmp_path, [Fixed("f", always(0.9))], target=target, calibrate=False)
    assert any("class 1 absent from the weak labels" in text for text in report.warnings)
    assert any("1 rows to label have the text of a row with a true label" in text for text in report.warnings)
    assert "class 1 absent from the weak labels" in caplog.text
    assert report.class_shares == [1.0, 0.0]
    three = label(tmp_path / "three", [SklearnLearner("naive-bayes")], num_classes=3)
    assert {t.partition(",")[0] for t in three.warnings} >= {
        "class 2 absent from the true labels",
        "class 2 absent from the weak labels",
    }
    assert read_jsonl(three.path)[0]["soft_labels"][2] == 0
    groups = make("g", 100, group=10)
    torn = label(tmp_path / "torn", labelled=groups[:55], target=groups[55:])
    assert any("1 groups are on both sides" in text for text in torn.warnings)
    tiny = label(tmp_path / "tiny", labelled=LABELLED[:30])
    assert any("6 rows are too few" in text for text in tiny.warnings)
    assert not label(tmp_path / "fine", [SklearnLearner("naive-bayes")]).warnings


def test_summary_is_two_lines(tmp_path):
    report = label(tmp_path, [Fixed("a", always(0.75)), Fixed("b", always(0.25))], calibrate=False)
    assert report.summary == (
        f"{tmp_path}/stage_0/weak_labels.jsonl: 60 rows labelled, 50.0% right, 50.0% of test right; mean disagreement "
        "0.250, confidence 0.000; classes 100.0% / 0.0%, true ones of 120 rows 50.0% / 50.0%\n"
        "soft vote of a (50.0% on these rows, T 1.00); b (50.0% on these rows, T 1.00)"
    )


def test_rows_without_true_labels(tmp_path):
    unknown = label(tmp_path / "a", target=[replace(row, label=None) for row in TARGET], eval_sets=None)
    assert unknown.target_accuracy is None and "60 rows labelled; mean" in unknown.summary
    soft = [[row["soft_labels"] for row in read_jsonl(r.path)] for r in (unknown, label(tmp_path / "b"))]
    assert soft[0] == soft[1]


def make_pairs(prefix, n):
    rows = zip(make(prefix, 2 * n)[0::2], make(prefix, 2 * n)[1::2], strict=True)
    return [
        Pair(f"{prefix}{i}", *((bad.text, kind.text) if i % 2 else (kind.text, bad.text)), i % 2)
        for i, (kind, bad) in enumerate(rows)
    ]


def test_pairs(tmp_path):
    report = label(tmp_path, labelled=make_pairs("a", 100), target=make_pairs("b", 40), eval_sets=None)
    rows = read_jsonl(report.path)
    assert list(rows[0])[:4] == ["id", "chosen", "rejected", "label"]
    assert report.target_accuracy > 0.8 and len(rows[0]["soft_labels"]) == 2


class Echo(Fixed):
    """Says the share of class 0 among what it was trained on."""

    def __init__(self, name):
        super().__init__(name, lambda rows: always(self.fits[-1][1][:, 0].mean())(rows))


def test_no_stage_of_a_chain_labels_rows_it_was_trained_on(tmp_path):
    stages = [[SklearnLearner("naive-bayes")], [Echo("e1"), Echo("e2")], [Echo("last")]]
    target = make("g", 60, group=3)
    results = bootstrap_chain(
        stages, LABELLED, target, num_classes=2, seed=0, folder=tmp_path, calibrate=False, eval_sets={"test": TEST}
    )
    reports = [result.report for result in results]
    assert [report.path for report in reports] == [f"{tmp_path}/stage_{i}/weak_labels.jsonl" for i in range(3)]
    first = {row["id"]: row["soft_labels"] for row in read_jsonl(reports[0].path)}
    halves = split_halves(target, seed=0)
    for learner in stages[1]:
        assert [fit[0] for fit in learner.fits] == list(halves)
        for trained, asked in learner.asked:
            assert not trained & asked
        # It learnt the labels of the stage before it
        for rows, soft, *_ in learner.fits:
            assert soft.tolist() == [first[row.id] for row in rows]
    means = [np.mean([first[row.id][0] for row in half]) for half in halves]
    said = {row["id"]: row["soft_labels"][0] for row in read_jsonl(reports[1].path)}
    assert [said[row.id] for row in halves[0]] == pytest.approx([means[1]] * len(halves[0]))
    assert [said[row.id] for row in halves[1]] == pytest.approx([means[0]] * len(halves[1]))
    for probs in (results[1].soft["test"], results[1].by_learner["e1"]["test"]):
        assert probs[:, 0] == pytest.approx([np.mean(means)] * len(TEST))


def test_the_last_stage_may_write_its_labels_elsewhere(tmp_path):
    usual = label(tmp_path / "a", [Fixed("f", always(0.7))])
    own = label(tmp_path / "b", [Fixed("f", always(0.7))], output=tmp_path / "mine.jsonl")
    assert own.path == str(tmp_path / "mine.jsonl") and not (tmp_path / "b/stage_0/weak_labels.jsonl").exists()
    assert read_jsonl(own.path) == read_jsonl(usual.path)


def test_a_chain_is_calibrated_on_rows_it_never_saw(tmp_path):
    stages = [[SklearnLearner("naive-bayes")], [Fixed("f", always(0.9))]]
    results = bootstrap_chain(stages, LABELLED, TARGET, num_classes=2, seed=0, folder=tmp_path)
    reports = [result.report for result in results]
    # A constant that is right half of the time ends at one half, as near as the bound on T lets it
    assert len(reports[1].learners["f"]["temperature"]) == 2
    assert read_jsonl(reports[1].path)[0]["soft_labels"][0] == pytest.approx(0.5, abs=0.01)
    assert "T 100.00 and 100.00" in reports[1].summary


def test_a_killed_chain_goes_on(tmp_path):
    def chain(folder, *stages):
        return bootstrap_chain(stages, LABELLED, TARGET, num_classes=2, seed=0, folder=folder)

    weak = [SklearnLearner("naive-bayes")]
    chain(tmp_path / "whole", weak, [Echo("m")], [Echo("n")])
    half = Echo("m")
    answer, half.says = half.says, lambda rows: killed(rows) if len(half.fits) == 2 else answer(rows)
    with pytest.raises(KeyboardInterrupt):
        chain(tmp_path / "cut", weak, [half], [Echo("n")])
    middle = Echo("m")
    chain(tmp_path / "cut", [Fixed("naive-bayes", killed, kind="naive-bayes")], [middle], [Echo("n")])
    assert len(middle.fits) == 1  # the other half was done
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_real_clauses_by_question(tmp_path):
    path = DATA / "legalbench/privacy_policy_qa.jsonl.gz"
    if not path.is_file():
        pytest.skip("privacy_policy_qa is not beside this checkout (shared/data)")
    rows, _ = load_examples(
        path, text_template="Question: {question}\nClause: {text}", group_column="question_id", limit=1600
    )
    labelled, target = split_halves(rows, seed=0)
    report = label(tmp_path, labelled=labelled, target=target, eval_sets=None)
    assert not [text for text in report.warnings if "groups" in text or "absent" in text]
    assert report.target_accuracy > 0.55  # chance is 0.52, the README's floor .73 knows the questions
    # Naive Bayes multiplies words that depend on each other and is far too sure
    nb = report.learners["naive-bayes"]
    assert nb["temperature"][0] > 2 and nb["ece"][0] < nb["ece_before"][0]
