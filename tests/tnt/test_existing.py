import gzip
import json
from pathlib import Path

import pytest

from trl_extensions.tnt.annotation import annotate_rows
from trl_extensions.tnt.existing import rows_with_spans


DATA = Path(__file__).resolve().parents[3] / "shared/data"


def write(path, *rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path, **columns):
    return rows_with_spans(path, **{"text_column": "text", "spans_column": "spans"} | columns)


@pytest.mark.parametrize("name", ["some.toxic.jsonl", "some.toxic.jsonl.gz"])
def test_rows_for_the_trainer(tmp_path, name):
    path = write(
        tmp_path / name,
        {"text": "bad “words”", "spans": [[4, 11], [0, 3], [2, 3], [1, 1]], "ask": "what?"},
        "",
        {"text": "fine", "spans": [], "ask": "how?"},
        {"text": "fine too", "spans": None, "ask": "why?"},
    )
    rows = read(path, prompt_column="ask")
    marks = [(0, 3), (2, 3), (4, 11)]
    assert rows[0] == {
        "id": "some.toxic-1",
        "index": 0,
        "prompt": "what?",
        "completion": "bad “words”",
        "negative_spans": [[0, 3], [4, 11]],
        "annotations": [{"start": start, "end": end, "by": "given", "label": ""} for start, end in marks],
    }
    assert [(row["id"], row["index"], row["prompt"], row["negative_spans"]) for row in rows[1:]] == [
        ("some.toxic-3", 1, "how?", []),
        ("some.toxic-4", 2, "why?", []),
    ]


def test_without_a_prompt_column_the_prompt_is_empty(tmp_path):
    assert read(write(tmp_path / "a.jsonl", {"text": "a", "spans": []}))[0]["prompt"] == ""


def test_objects_with_start_and_end_are_spans_too(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "abcdef", "spans": [{"start": 3, "end": 5, "type": "x"}, [0, 1]]})
    assert read(path)[0]["negative_spans"] == [[0, 1], [3, 5]]


def test_chats(tmp_path):
    said = [{"role": "assistant", "content": "you idiot"}]
    asked = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "a.jsonl", {"text": said, "spans": [[4, 9]], "ask": asked})
    [row] = read(path, prompt_column="ask")
    assert (row["prompt"], row["completion"], row["negative_spans"]) == (asked, said, [[4, 9]])
    assert read(path)[0]["prompt"] == []


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    path = write(
        tmp_path / "a.jsonl", {"text": " ", "spans": []}, {"text": None, "spans": []}, {"text": "a", "spans": []}
    )
    assert [row["id"] for row in read(path)] == ["a-3"]
    assert "left out 2 rows without text" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "abc", "spans": [[0, 4]]}, r"a\.jsonl:2: .*outside"),
        ({"text": "abc", "spans": [[2, 1]]}, r"a\.jsonl:2: .*reversed"),
        ({"text": "abc", "spans": [[0.0, 1.0]]}, r"a\.jsonl:2: .*integers"),
        ({"text": "abc", "spans": [0, 1]}, r"a\.jsonl:2: .*pair"),
        ({"text": "abc", "spans": [{"start": 0}]}, r"a\.jsonl:2: .*pair"),
        ({"text": "abc", "spans": "0 1"}, r"a\.jsonl:2: .*list"),
        ({"text": 5, "spans": []}, r"a\.jsonl:2: column 'text': a completion must be a text"),
        ({"text": "abc"}, r"a\.jsonl:2: no column 'spans'; the row has \['text'\]"),
        ('{"text": "abc", ', r"a\.jsonl:2: not JSON"),
        ("[1]", r"a\.jsonl:2: expected an object, got list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"text": "abc", "spans": []}, line)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_bad_prompts_and_files(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"text": "abc", "spans": [], "ask": 3, "chat": [{"role": "user", "content": "a"}]}
    )
    for column, message in (("ask", "'ask' must hold a text"), ("chat", "both be texts"), ("q", "no column 'q'")):
        with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
            read(path, prompt_column=column)
    with pytest.raises(ValueError, match=r"give a \.jsonl"):
        read(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="no row with text"):
        read(write(tmp_path / "c.jsonl", {"text": "", "spans": []}))
    (tmp_path / "d.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "d.jsonl.gz")
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "caf\xe9", "spans": []}\n')
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        read(tmp_path / "e.jsonl")


@pytest.mark.parametrize(
    ("name", "columns", "total"),
    [
        ("toxic_spans/trial.jsonl", {}, 690),
        ("toxic_spans/train.jsonl.gz", {}, 7939),
        (
            "xsum_hallucination/annotations.jsonl.gz",
            {"text_column": "summary", "spans_column": "majority_spans"},
            2500,
        ),
        ("xsum_hallucination/annotations.jsonl.gz", {"text_column": "summary"}, 2500),
    ],
)
def test_real_data_sets(name, columns, total):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside this checkout (shared/data)")
    rows = read(path, **columns)
    assert len(rows) == total
    opener = gzip.open if path.suffix == ".gz" else open
    column = columns.get("spans_column", "spans")
    with opener(path, "rt", encoding="utf-8") as file:
        for row, line in zip(rows, map(json.loads, file), strict=True):
            pairs = [
                tuple(span.get(key) for key in ("start", "end")) if isinstance(span, dict) else span
                for span in line[column]
            ]
            marked = {i for start, end in pairs for i in range(start, end)}
            assert {i for start, end in row["negative_spans"] for i in range(start, end)} == marked


def test_real_rows_can_be_annotated_further(tmp_path):
    path = DATA / "toxic_spans/trial.jsonl"
    if not path.is_file():
        pytest.skip("toxic_spans is not beside this checkout (shared/data)")
    rows = read(path)[:20]
    report = annotate_rows(rows, [], tmp_path / "out.jsonl")
    assert (report.rows, report.spans) == (20, sum(len(row["negative_spans"]) for row in rows))
