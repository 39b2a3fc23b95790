import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from trl_extensions.core.generation.sampling import completion_text
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.core.runs.resumable import failures_path
from trl_extensions.tnt.annotate import Span, annotate_rows, merge_spans
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator


class KilledError(Exception):
    pass


class Finder:
    """Marks every occurrence of a word; dies when it meets `dies_at`, fails on texts with `fails_at`."""

    def __init__(self, word, name="finder", dies_at=None, fails_at=None):
        self.word, self.name, self.dies_at, self.fails_at = word, name, dies_at, fails_at
        self.settings = {"word": word}
        self.seen = []
        self.counts = Counter()
        self.failures = {}

    def annotate(self, texts, prompts):
        self.seen.append((list(texts), list(prompts)))
        if any(self.dies_at in text for text in texts if self.dies_at):
            raise KilledError
        self.failures = {i: ("??", text) for i, text in enumerate(texts) if self.fails_at and self.fails_at in text}
        self.counts["muddled"] += len(self.failures)
        return [[Span(m.start(), m.end(), self.word) for m in re.finditer(self.word, text)] for text in texts]


def rows(*texts, **columns):
    return [
        {"id": f"r{i}", "prompt": f"p{i}", "completion": text, **{key: value[i] for key, value in columns.items()}}
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("spans", "merged"),
    [
        ([], []),
        ([(4, 6), (0, 2)], [[0, 2], [4, 6]]),
        ([(0, 2), (2, 4)], [[0, 4]]),  # touch
        ([(0, 5), (1, 2), (4, 7)], [[0, 7]]),  # inside, overlap
        ([(3, 3), (1, 2)], [[1, 2]]),  # empty
        ([Span(2, 3, "b"), [0, 1, "a"]], [[0, 1], [2, 3]]),
    ],
)
def test_merged_spans_are_sorted_and_apart(spans, merged):
    assert merge_spans(spans) == merged


def test_merging_keeps_exactly_the_marked_characters():
    spans = [(start, end) for start in range(0, 12, 5) for end in range(start, start + 4)]
    merged = merge_spans(spans)
    assert {i for a, b in merged for i in range(a, b)} == {i for a, b in spans for i in range(a, b)}
    assert all(before[1] < after[0] for before, after in pairwise(merged))


def test_completion_text():
    assert completion_text("plain") == "plain"
    chat = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert completion_text(chat) == "c"
    for bad in (None, [], [{"role": "user", "content": "b"}], [{"role": "assistant", "content": None}]):
        with pytest.raises(ValueError, match="a completion must be"):
            completion_text(bad)


def test_annotators_compose_and_say_who_marked_what(tmp_path):
    data = rows("abc abd", "none here", extra=[1, 2])
    report = annotate_rows(data, [Finder("ab", "x"), Finder("bc", "y"), Finder("z", "z")], tmp_path / "out.jsonl")
    first, second = read_jsonl(tmp_path / "out.jsonl")
    assert first == {
        **data[0],
        "negative_spans": [[0, 3], [4, 6]],
        "annotations": [
            {"start": 0, "end": 2, "label": "ab", "by": "x"},
            {"start": 1, "end": 3, "label": "bc", "by": "y"},
            {"start": 4, "end": 6, "label": "ab", "by": "x"},
        ],
    }
    assert second == {**data[1], "negative_spans": [], "annotations": []}
    assert (report.rows, report.with_span, report.spans, report.set_aside, report.resumed) == (2, 1, 2, 0, 0)
    assert report.by_annotator == {"x": 2, "y": 1, "z": 0}
    assert "2 rows annotated, 1 with a span; 2 spans (2 by x, 1 by y, 0 by z before merging)" in report.summary
    assert "\n" not in report.summary


def test_chats_are_marked_in_their_last_message_and_annotators_see_prompts(tmp_path):
    prompt = [{"role": "user", "content": "ab?"}]
    chat = [{"role": "assistant", "content": "no ab"}]
    finder = Finder("ab")
    annotate_rows(
        [{"id": 7, "prompt": prompt, "completion": chat}, {"id": 8, "completion": "ab"}],
        [finder],
        tmp_path / "o.jsonl",
    )
    assert finder.seen == [(["no ab", "ab"], [prompt, ""])]
    assert [row["negative_spans"] for row in read_jsonl(tmp_path / "o.jsonl")] == [[[3, 5]], [[0, 2]]]


def test_given_spans_stay_and_are_merged_in(tmp_path):
    data = rows("abcdef", "abcdef", "xx", negative_spans=[[[4, 6], [1, 3], [5, 5]], None, []])
    report = annotate_rows(data, [Finder("ab")], tmp_path / "out.jsonl")
    written = read_jsonl(tmp_path / "out.jsonl")
    assert [row["negative_spans"] for row in written] == [[[0, 3], [4, 6]], [[0, 2]], []]
    assert [(m["start"], m["end"], m["by"]) for m in written[0]["annotations"]] == [
        (0, 2, "finder"), (1, 3, "given"), (4, 6, "given"),
    ]  # fmt: skip
    assert report.by_annotator == {"finder": 2, "given": 2}


def test_a_second_pass_keeps_who_marked_what_unless_the_spans_were_edited(tmp_path):
    annotate_rows(rows("ab cd", "ab cd"), [Finder("ab", "x")], tmp_path / "one.jsonl")
    first, second = read_jsonl(tmp_path / "one.jsonl")
    second["negative_spans"] = [[3, 4]]  # a person put it elsewhere
    annotate_rows([first, second], [Finder("cd", "y")], tmp_path / "two.jsonl")
    first, second = read_jsonl(tmp_path / "two.jsonl")
    assert [(m["start"], m["by"]) for m in first["annotations"]] == [(0, "x"), (3, "y")]
    assert [(m["start"], m["by"]) for m in second["annotations"]] == [(3, "given"), (3, "y")]
    assert (first["negative_spans"], second["negative_spans"]) == ([[0, 2], [3, 5]], [[3, 5]])


def test_rows_that_bring_their_spans_need_no_annotator(tmp_path):
    report = annotate_rows(rows("abc", negative_spans=[[[0, 1]]]), [], tmp_path / "out.jsonl")
    assert (report.rows, report.spans, report.by_annotator) == (1, 1, {"given": 1})


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_change_nothing_but_the_calls(tmp_path, chunk_size):
    data = rows(*[f"ab {i}" * (i % 3) for i in range(7)])
    finder = Finder("ab")
    annotate_rows(data, [finder], tmp_path / "out.jsonl", chunk_size=chunk_size)
    assert [len(texts) for texts, _ in finder.seen] == [len(data[i : i + chunk_size]) for i in range(0, 7, chunk_size)]
    assert [len(row["annotations"]) for row in read_jsonl(tmp_path / "out.jsonl")] == [i % 3 for i in range(7)]


def test_a_killed_run_has_its_finished_chunks_on_disk_and_goes_on(tmp_path):
    data, path = rows("ab 0", "ab 1", "ab 2", "ab 3", "ab 4"), tmp_path / "out.jsonl"
    with pytest.raises(KilledError):
        annotate_rows(data, [Finder("ab", dies_at="ab 3")], path, chunk_size=2)
    assert [row["id"] for row in read_jsonl(path)] == ["r0", "r1"]
    with open(path, "a") as file:
        file.write('{"id": "r2", "compl')  # what a kill in the middle of a line leaves
    finder = Finder("ab")
    report = annotate_rows(data, [finder], path, chunk_size=2)
    assert [text for texts, _ in finder.seen for text in texts] == ["ab 2", "ab 3", "ab 4"]
    assert [row["id"] for row in read_jsonl(path)] == [row["id"] for row in data]
    assert (report.rows, report.with_span, report.spans, report.resumed) == (5, 5, 5, 2)
    assert "(2 by an earlier run)" in report.summary
    again = Finder("ab")
    assert annotate_rows([*data, {"id": "new", "completion": "ab"}], [again], path).rows == 6
    assert again.seen == [(["ab"], [""])]


def test_rows_nobody_could_judge_are_set_aside_with_the_answers(tmp_path):
    data, path = rows("ab", "ab muddy", "cd"), tmp_path / "out.jsonl"
    finder = Finder("ab", fails_at="muddy")
    finder.counts["muddled"] = 5  # of another file
    report = annotate_rows(data, [Finder("cd", "x"), finder], path, chunk_size=2)
    assert [row["id"] for row in read_jsonl(path)] == ["r0", "r2"]
    [aside] = read_jsonl(failures_path(path))
    assert aside.pop("reason") == "not understood: finder"
    assert aside == {**data[1], "failures": [{"by": "finder", "answers": ["??", "ab muddy"]}]}
    assert (report.rows, report.set_aside, report.counts) == (2, 1, {"finder": {"muddled": 1}})
    assert "1 rows set aside in out.failures.jsonl; finder: 1 muddled" in report.summary
    again = Finder("ab")
    resumed = annotate_rows(data, [Finder("cd", "x"), again], path)
    assert (again.seen, resumed.rows, resumed.set_aside, resumed.resumed, resumed.counts) == ([], 2, 1, 3, {})
    failures_path(path).unlink()
    assert annotate_rows(data, [Finder("cd", "x"), Finder("ab")], path).rows == 3


def test_other_settings_or_rows_are_refused_and_leave_the_file_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    annotate_rows(rows("a cat", "a dog"), [PhraseAnnotator(["cat"])], path)
    before = path.read_bytes()
    assert json.loads((tmp_path / "out.settings.json").read_text())["phrases"]["phrases"] == ["cat"]
    with pytest.raises(ValueError, match=r'made with other settings: phrases\.phrases was \["cat"\], now \["dog"\]'):
        annotate_rows(rows("a cat", "a dog"), [PhraseAnnotator(["dog"])], path)
    with pytest.raises(ValueError, match="row 'r1' is not among the rows given"):
        annotate_rows(rows("a cat"), [PhraseAnnotator(["cat"])], path)
    with pytest.raises(ValueError, match="row 'r1' has another completion"):
        annotate_rows(rows("a cat", "a cow"), [PhraseAnnotator(["cat"])], path)
    assert path.read_bytes() == before


def test_text_that_utf8_cannot_hold_resumes(tmp_path):
    data = rows("broken \ud83d cat")
    annotate_rows(data, [PhraseAnnotator(["cat"])], tmp_path / "out.jsonl")
    report = annotate_rows(data, [PhraseAnnotator(["cat"])], tmp_path / "out.jsonl")
    [row] = read_jsonl(tmp_path / "out.jsonl")
    [[start, end]] = row["negative_spans"]
    assert (report.resumed, row["completion"][start:end]) == (1, "cat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"negative_spans": [[0, 4]]}, r"row 'k': .*\[0, 4\), .*outside the completion, of 3 characters"),
        ({"negative_spans": [[-1, 2]]}, "row 'k': .*outside"),
        ({"negative_spans": [[2, 1]]}, "row 'k': .*reversed"),
        ({"negative_spans": [[0, 1.0]]}, "row 'k': .*integers"),
        ({"negative_spans": [[0, True]]}, "row 'k': .*integers"),
        ({"negative_spans": [[0, 1, 2]]}, "row 'k': .*pair"),
        ({"completion": 3}, "row 'k': a completion must be"),
        ({"completion": None}, "row 'k': a completion must be"),
        ({"id": None}, "row 1 has no `id`"),
        ({"id": "a"}, "row 1: the `id` 'a' occurs twice"),
    ],
)
def test_bad_rows_are_named_in_one_line_before_anything_is_written(tmp_path, row, message):
    finder = Finder("a")
    good = {"id": "a", "completion": "abc"}
    with pytest.raises(ValueError, match=message) as error:
        annotate_rows([good, {"id": "k", "completion": "abc", **row}], [finder], tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)
    assert not finder.seen
    assert not list(tmp_path.iterdir())


def test_bad_calls(tmp_path):
    path, good = tmp_path / "out.jsonl", rows("abc")
    for data, annotators, message in (
        (good, [], "no annotator"),
        ([], [Finder("a")], "no rows"),
        ([{"id": 1, "text": "a"}], [Finder("a")], r"row 1 has no `completion`, only \['id', 'text'\]"),
        (good, [Finder("a"), Finder("b")], "two annotators are called 'finder'"),
        (good, [Finder("a", name="given")], "two annotators are called 'given'"),
    ):
        with pytest.raises(ValueError, match=message):
            annotate_rows(data, annotators, path)
    with pytest.raises(ValueError, match="`chunk_size` is 0"):
        annotate_rows(good, [Finder("a")], path, chunk_size=0)


@pytest.mark.parametrize("spans", [[Span(0, 4, "")], [Span(-1, 1, "")], [Span(2, 2, "")], [Span(2, 1, "")]])
def test_an_annotator_that_marks_outside_the_text_is_named(tmp_path, spans):
    finder = Finder("a")
    finder.annotate = lambda texts, prompts: [spans]
    with pytest.raises(ValueError, match=r"annotator 'finder' marked .* in row 'r0', whose text has 3 characters"):
        annotate_rows(rows("abc"), [finder], tmp_path / "out.jsonl")


def test_an_annotator_that_forgets_a_text_is_named(tmp_path):
    finder = Finder("a")
    finder.annotate = lambda texts, prompts: [[]]
    with pytest.raises(ValueError, match="'finder' gave 1 lists of spans for 2 texts"):
        annotate_rows(rows("abc", "abd"), [finder], tmp_path / "out.jsonl")


@pytest.mark.parametrize("number", [1, 2])
def test_the_package_is_a_function_of_rows_as_they_are(number):
    """However often it is imported, and whatever was imported from it before."""
    import trl_extensions
    import trl_extensions.tnt.annotate.phrases
    from trl_extensions.tnt import annotate

    chat = [{"role": "user", "content": "卵？"}, {"role": "assistant", "content": "はい、卵です。"}]
    for function in (annotate, trl_extensions.tnt.annotate):
        rows = function([{"messages": chat}] * number, phrases=["卵"])
        assert rows["negative_spans"] == [[[3, 4]]] * number and rows[0]["completion"] == chat[1:]
        assert function(rows, phrases=["はい"])["negative_spans"] == [[[0, 2], [3, 4]]] * number
    with pytest.raises(ValueError, match="nothing says what is unwanted"):
        annotate([{"messages": chat}])
