import csv
import gzip
import hashlib
import json
import logging
from pathlib import Path

import pytest

from trl_extensions.core.inputs import FIRST_HUMAN_TURN, load_queries


def jsonl(tmp_path, rows, name="q.jsonl"):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(queries):
    return [query.text for query in queries]


def test_id_is_the_start_of_the_sha256_of_the_stripped_text(tmp_path):
    [query] = load_queries(jsonl(tmp_path, [{"query": "  Why?\n"}]))
    assert (query.text, query.id) == ("Why?", hashlib.sha256(b"Why?").hexdigest()[:12])


def test_all_kinds_of_files_give_the_same(tmp_path):
    rows = [{"prompt": 'One, "two"\nthree?'}, {"prompt": "Zwölf?"}]
    paths = [jsonl(tmp_path, rows, name) for name in ("a.jsonl", "a.jsonl.gz")]
    paths.append(tmp_path / "a.json")
    paths[-1].write_text(json.dumps(rows), encoding="utf-8")
    paths.append(tmp_path / "a.csv")
    with open(paths[-1], "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt"])
        writer.writeheader()
        writer.writerows(rows)
    for path in paths:
        assert texts(load_queries(path)) == ['One, "two"\nthree?', "Zwölf?"]


def test_a_saved_dataset_folder_is_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list([{"question": f"{split}?"}]).to_json(folder / f"{split}.jsonl")
    assert texts(load_queries(str(folder), split="test")) == ["test?"]


def test_first_known_column_or_the_named_one(tmp_path):
    path = jsonl(tmp_path, [{"text": "t", "prompt": "p", "other": "o"}])
    assert texts(load_queries(path)) == ["p"]
    assert texts(load_queries(path, column="other")) == ["o"]


def test_empty_and_repeated_queries_are_dropped_and_counted(tmp_path, caplog):
    path = jsonl(tmp_path, [{"query": text} for text in ("a", " ", "a ", "b", None, "a")])
    with caplog.at_level(logging.WARNING):
        assert texts(load_queries(path)) == ["a", "b"]
    assert "2 queries kept, dropped: 2 empty, 2 repeated" in caplog.text


TRANSCRIPT = (
    "\n\nHuman: How do I boil\n\nan egg?\n\nAssistant: In water.\n\nHuman: How long?\n\nAssistant: Seven minutes."
)


def test_pattern_takes_the_first_human_turn(tmp_path, caplog):
    path = jsonl(tmp_path, [{"chosen": TRANSCRIPT}, {"chosen": "no turns"}])
    with caplog.at_level(logging.WARNING):
        queries = load_queries(path, column="chosen", pattern=FIRST_HUMAN_TURN)
    assert texts(queries) == ["How do I boil\n\nan egg?"]
    assert "1 unmatched" in caplog.text


def test_pattern_as_typed_in_yaml(tmp_path):
    path = jsonl(tmp_path, [{"chosen": TRANSCRIPT}])
    assert r"\n" in FIRST_HUMAN_TURN and "\n" not in FIRST_HUMAN_TURN
    assert len(load_queries(path, column="chosen", pattern="\n\nHuman: (.*?)\n\nAssistant:")) == 1


def test_limit_counts_queries_that_are_kept(tmp_path):
    path = jsonl(tmp_path, [{"query": text} for text in ("a", "", "a", "b", "c")])
    assert texts(load_queries(path, limit=2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "queri"}, "row 1 has no column 'queri'; available: id, query, n"),
        ({"column": "n"}, "row 1, column 'n' holds int, not text"),
        ({"pattern": "(a"}, "not a regular expression"),
        ({"pattern": "a"}, "has 0 groups"),
        ({"pattern": "(a)(b)"}, "has 2 groups"),
        ({"pattern": "(z)"}, "no query left"),
        ({"limit": 0}, "`limit` is 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    path = jsonl(tmp_path, [{"id": "x", "query": "a", "n": 3}])
    with pytest.raises(ValueError) as error:
        load_queries(path, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"query": "a"}\n{"query": ', "line 2 is not JSON"),
        ("a.jsonl", '["a"]\n', "row 1 is not an object"),
        ("a.jsonl", '{"queri": "a", "b": 1}\n', "available: queri, b"),
        ("a.json", '{"query": "a"}\n{"query": "b"}\n', "name it .jsonl"),
        ("a.json", '{"query": "a"}', "expected a list of objects, got dict"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
        ("a.txt", "a", "unknown kind of file"),
        ("a.jsonl", "", "no query left"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_queries(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_dataset_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        load_queries(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="neither a file here nor a data set") as error:
        load_queries("nobody-at-all/none-such")
    assert "\n" not in str(error.value)


def test_a_broken_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "odd \\ud83d emoji?"}\n')
    assert texts(load_queries(path)) == ["odd ? emoji?"]


def test_the_demo_queries_load_and_are_distinct():
    path = Path(__file__).resolve().parents[2] / "recipes/smollm2-135m/sami/queries.jsonl"
    queries = load_queries(str(path))
    words = [frozenset(query.text.lower().strip("?").split()) for query in queries]
    assert len(queries) == 120 == len(set(words))


class TestChats:
    CHAT = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Why?"))

    def write(self, path, *chats):
        rows = [{"prompt": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_chats_are_told_apart_by_all_of_their_messages(self, tmp_path):
        source = self.write(tmp_path / "chats.jsonl", self.CHAT, self.CHAT[1:], self.CHAT)
        first, second = load_queries(source, chats=True)
        assert first.text == second.text == "Why?" and first.id != second.id
        assert [message["role"] for message in first.messages] == ["system", "user", "assistant", "user"]

    def test_they_are_refused_where_texts_are_needed(self, tmp_path):
        with pytest.raises(ValueError, match="holds list, not text"):
            load_queries(self.write(tmp_path / "chats.jsonl", self.CHAT))

    def test_a_chat_ends_with_what_is_to_be_answered(self, tmp_path):
        with pytest.raises(ValueError, match="row 1, column 'prompt': the chat ends with an answer"):
            load_queries(self.write(tmp_path / "chats.jsonl", self.CHAT[:3]), chats=True)
