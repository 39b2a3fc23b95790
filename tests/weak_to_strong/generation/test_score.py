"""Scoring files of rows: what is written, resumed and refused."""

import json

import pytest

from trl_extensions.core.generation.types import Generation
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.weak_to_strong.generation.scorers import JudgeScorer, checked_scores, score_rows


ROWS = [{"id": f"r{i}", "prompt": "p", "completion": text, "model": "m"} for i, text in enumerate("abcde")]


class Lengths:
    """Scores a text by its length; stops after `budget` calls, as a kill would."""

    name, higher_is_better = "length", True

    def __init__(self, budget=100):
        self.settings = {"kind": "length"}
        self.budget = budget
        self.asked = []

    def score(self, prompts, completions):
        if not self.budget:
            raise KeyboardInterrupt
        self.budget -= 1
        self.asked += completions
        return [len(text) for text in completions]


class Function(Lengths):
    """What a function of the texts returns."""

    def __init__(self, returns, name="mine"):
        self.name, self.settings, self.returns = name, {"kind": "function"}, returns

    def score(self, prompts, completions):
        return self.returns(completions)


def test_rows_keep_their_columns_and_get_scores(tmp_path):
    rows = [
        {"id": 1, "prompt": "p", "completion": "abc", "extra": [1]},
        {"id": 2, "prompt": "p", "completion": " \n"},
        {"id": 3, "prompt": "p", "completion": [{"role": "assistant", "content": "ab"}], "scores": {"old": 0.5}},
    ]
    lengths = Lengths()
    report = score_rows(rows, lengths, tmp_path / "scored.jsonl")
    assert read_jsonl(tmp_path / "scored.jsonl") == [
        {**rows[0], "scores": {"length": 3}},
        {**rows[1], "scores": {"length": None}},
        {**rows[2], "scores": {"old": 0.5, "length": 2}},
    ]
    assert lengths.asked == ["abc", "ab"]  # nobody is asked about an empty text
    assert (report.rows, report.empty, report.resumed, report.scored) == (3, 1, 0, 2)
    assert report.mean == 2.5 and "3 rows scored (0 by an earlier run), 1 of them empty; mean 2.5;" in report.summary
    odd = Function(lambda texts: [None if len(text) == 2 else 7 for text in texts], "odd")
    report = score_rows(read_jsonl(tmp_path / "scored.jsonl"), odd, tmp_path / "again.jsonl")
    assert [row["scores"].get("odd") for row in read_jsonl(tmp_path / "again.jsonl")] == [7, None, None]
    assert report.scored == 1 and "mean 7, 1 without a score" in report.summary


@pytest.mark.parametrize("budget", [1, 2])
def test_a_kill_loses_nothing_and_nothing_is_scored_twice(tmp_path, budget):
    output = tmp_path / "scored.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_rows(ROWS, Lengths(budget), output, chunk_size=2)
    assert len(read_jsonl(output)) == 2 * budget
    rest = Lengths()
    report = score_rows(ROWS, rest, output, chunk_size=2)
    assert rest.asked == list("abcde")[2 * budget :]
    assert (report.rows, report.resumed, report.mean) == (5, 2 * budget, 1.0)
    assert [row["id"] for row in read_jsonl(output)] == [row["id"] for row in ROWS]


def test_other_settings_or_rows_are_refused(tmp_path):
    output = tmp_path / "scored.jsonl"
    score_rows(ROWS, Lengths(), output)
    other = Lengths()
    other.settings = {"kind": "width"}
    changed = [{**row, "completion": "other"} for row in ROWS]
    for rows, scorer, message in (
        (ROWS, other, 'length.kind was "length", now "width"'),
        (ROWS, Function(len), "mine was null"),
        (ROWS[1:], Lengths(), "its row 'r0' is not among the rows given"),
        (changed, Lengths(), "its row 'r0' has another completion"),
    ):
        with pytest.raises(ValueError, match=message):
            score_rows(rows, scorer, output)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda texts: [None] * len(texts), "no score to any of the first 2 rows with text, beginning with row 'r0'"),
        (lambda texts: None, "returned NoneType, no list of scores for 2 rows from 'r0'"),
        (lambda texts: 0.5, "returned float, no list of scores for 2 rows"),
        (lambda texts: [], "returned 0 scores for 2 rows from 'r0'"),
        (lambda texts: [1.0] * 3, "returned 3 scores for 2 rows"),
        (lambda texts: [1.0, float("nan")], "gave row 'r1' the score nan"),
        (lambda texts: [float("inf"), 1.0], "gave row 'r0' the score inf"),
        (lambda texts: ["1", 1.0], "gave row 'r0' the score '1'"),
        (lambda texts: [[1.0], 1.0], r"gave row 'r0' the score \[1.0\]"),
        (lambda texts: [True, 1.0], "gave row 'r0' the score True"),
    ],
)
def test_a_scorer_that_returns_nothing_is_named_with_the_row(tmp_path, returns, message):
    output = tmp_path / "scored.jsonl"
    with pytest.raises(ValueError, match=message) as error:
        score_rows(ROWS, Function(returns), output, chunk_size=2)
    assert str(error.value).startswith("scorer 'mine' ") and "\n" not in str(error.value)
    assert output.read_bytes() == b""
    # nothing was scored, so the scorer may be mended and the same output used
    mended = Function(lambda texts: [1.0] * len(texts))
    mended.settings["version"] = 2
    assert score_rows(ROWS, mended, output).rows == 5


def test_a_scorer_that_has_scored_before_may_fail_on_a_whole_chunk(tmp_path):
    scorer = Function(lambda texts: [1.0 if text in "ab" else None for text in texts])
    report = score_rows(ROWS, scorer, tmp_path / "scored.jsonl", chunk_size=2)
    assert report.rows - report.scored == 3


def test_arrays_are_scores_too():
    import numpy as np

    scorer = Function(lambda texts: np.array([0.5, 2], dtype=np.float32))
    assert checked_scores(scorer, ROWS[:2]) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("rows", "scorer", "message"),
    [
        ([], Lengths(), "no rows to make"),
        ([{"completion": "a"}], Lengths(), "row 0 has no `id`"),
        ([ROWS[0], ROWS[0]], Lengths(), "row 1: the `id` 'r0' occurs twice"),
        ([{"id": 1, "text": "a"}], Lengths(), r"row 1: no `completion`, only \['id', 'text'\]"),
        ([{"id": 1, "completion": 5}], Lengths(), "row 1: a completion must be"),
        ([{**ROWS[0], "scores": {"length": 1}}], Lengths(), "row 'r0' has a score 'length' already"),
    ],
)
def test_what_cannot_be_scored(tmp_path, rows, scorer, message):
    with pytest.raises(ValueError, match=message):
        score_rows(rows, scorer, tmp_path / "scored.jsonl")


def rating(number):
    return json.dumps({"rating": number})


class Judge:
    """Gives the replies scripted for an answer, one a call."""

    name = "scripted"

    def __init__(self, **replies):
        self.replies = {text: list(own) for text, own in replies.items()}

    def generate(self, prompts, params):
        for index, chat in enumerate(prompts):
            [text] = [t for t in self.replies if f"<answer>\n{t}\n</answer>" in chat[0]["content"]]
            yield index, Generation(self.replies[text].pop(0), "stop", 2)


def test_what_a_judge_failed_on_is_in_the_row_with_its_words(tmp_path):
    judge = JudgeScorer(
        Judge(a=[rating(8)], b=["hm", "hmm"], c=["hm", rating(4)], d=[rating(1)], e=[rating(2)]), "kind"
    )
    report = score_rows(ROWS, judge, tmp_path / "scored.jsonl", chunk_size=3)
    rows = read_jsonl(tmp_path / "scored.jsonl")
    assert [row["scores"]["judge"] for row in rows] == [8, None, 4, 1, 2]
    assert rows[1]["failures"] == {"judge": ["hm", "hmm"]}
    assert [row["id"] for row in rows if "failures" in row] == ["r1"]
    assert report.counts == {"retried": 2, "unparsed": 1}
    assert "mean 3.75, 1 without a score, 2 retried, 1 unparsed" in report.summary


def test_a_judge_of_which_nothing_can_be_read_is_quoted(tmp_path):
    judge = JudgeScorer(Judge(**{text: ["Sure!", "I like it."] for text in "abcde"}), "kind")
    with pytest.raises(ValueError, match=r"scorer 'judge' gave no score .* row 'r0'; it replied 'I like it\.'"):
        score_rows(ROWS, judge, tmp_path / "scored.jsonl")
