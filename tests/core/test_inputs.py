import csv
import gzip
import hashlib
import json
import logging
from pathlib import Path

import pytest

from trl_extensions.core.inputs import (
    FIRST_HUMAN_TURN,
    PromptArguments,
    answered,
    load_queries,
    read_rows,
    with_ids,
)


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


ROWS = [{"prompt": 'One, "two"\nthree?', "n": "1"}, {"prompt": "卵の茹で方は？", "n": "2"}]


def write(path, rows=ROWS):
    """Rows in the format that the name of a file says."""
    opener = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path)
        return path
    with opener(path, "wt", encoding="utf-8-sig" if "csv" in name else "utf-8", newline="") as file:
        if name.endswith(".json"):
            json.dump(rows, file, ensure_ascii=False)
        elif name.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["prompt", "n"], delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.tsv.gz"])
def test_all_kinds_of_files_give_the_same_rows(tmp_path, name):
    assert list(read_rows(write(tmp_path / name))) == ROWS


def test_a_text_file_has_a_row_a_line(tmp_path):
    path = tmp_path / "seeds.txt"
    path.write_text("卵の茹で方は？\n\n  Why\u2028so?  \n", encoding="utf-8")
    assert list(read_rows(path)) == [{"text": "卵の茹で方は？"}, {"text": "Why\u2028so?"}]
    assert texts(load_queries(path)) == ["卵の茹で方は？", "Why\u2028so?"]


def test_a_saved_dataset_is_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    one, many = datasets.Dataset.from_list(ROWS), datasets.DatasetDict()
    one.save_to_disk(tmp_path / "one")
    many["train"], many["test"] = one, one.select([1])
    many.save_to_disk(tmp_path / "many")
    assert list(read_rows(tmp_path / "one")) == ROWS
    assert list(read_rows(tmp_path / "many", "test")) == ROWS[1:]
    with pytest.raises(ValueError, match=r"many.*'dev'"):
        list(read_rows(tmp_path / "many", "dev"))


def test_a_law_in_one_cell_is_read(tmp_path):
    path = write(tmp_path / "laws.csv", [{"prompt": "条" * 200_000, "n": "1"}])
    assert len(next(read_rows(path))["prompt"]) == 200_000


def test_a_folder_of_files_is_read_by_split(tmp_path):
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
        ("a.jsonl", '[{"query": "a"}]', "name it .json"),
        ("a.csv", "query\na,b\n", "row 1 has more cells"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.jsonl", '{"queri": "a", "b": 1}\n', "available: queri, b"),
        ("a.json", '{"query": "a"}\n{"query": "b"}\n', "name it .jsonl"),
        ("a.json", '{"query": "a"}', "a dict, not a list of objects"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
        ("a.xlsx", "a", "unknown kind of file"),
        ("a.jsonl", "", "no query left"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_queries(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("encoding", "named"), [("utf-16", "UTF-16"), ("cp932", "Shift_JIS")])
def test_another_encoding_is_named(tmp_path, encoding, named):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "卵"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=named):
        load_queries(path)


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
    assert len(queries) == 218 == len(set(words))


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

    def test_where_texts_are_needed_they_count_with_the_first_turn_of_the_user(self, tmp_path):
        assert texts(load_queries(self.write(tmp_path / "chats.jsonl", self.CHAT))) == ["Hi"]

    def test_answers_at_the_end_are_cut_off_and_counted(self, tmp_path, caplog):
        source = self.write(tmp_path / "chats.jsonl", self.CHAT[:3], self.CHAT, self.CHAT[2:3])
        with caplog.at_level(logging.WARNING):
            first, second = load_queries(source, chats=True)
        assert [message["content"] for message in first.messages] == ["Be kind.", "Hi"]
        assert len(second.messages) == 4
        assert "2 chats end with an answer" in caplog.text and "1 empty" in caplog.text

    def test_other_names_of_roles_and_contents_in_parts(self, tmp_path):
        rows = [
            {"conversations": [{"from": "human", "value": "卵は？"}, {"from": "gpt", "value": "茹でる。"}]},
            {"conversations": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
        ]
        queries = load_queries(jsonl(tmp_path, rows), chats=True)
        assert [query.messages for query in queries] == [
            [{"role": "user", "content": "卵は？"}],
            [{"role": "user", "content": "Why?"}],
        ]

    def test_a_message_without_text_is_refused_with_its_row(self, tmp_path):
        rows = [
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "assistant", "tool_calls": []}]},
        ]
        with pytest.raises(ValueError, match="row 2, column 'messages': a message needs"):
            load_queries(jsonl(tmp_path, rows), chats=True)


def test_an_input_goes_behind_its_instruction(tmp_path):
    rows = [{"instruction": "Translate.", "input": "卵", "text": "###"}, {"instruction": "Sing.", "input": ""}]
    assert texts(load_queries(jsonl(tmp_path, rows))) == ["Translate.\n\n卵", "Sing."]


class TestPromptArguments:
    def test_prompts_are_shuffled_and_held_out(self, tmp_path):
        path = tmp_path / "p.txt"
        path.write_text("\n".join(f"Question {number}?" for number in range(6)))
        arguments = PromptArguments(prompts=str(path), num_eval_prompts=2)
        rest, held_out = arguments.load_prompts(seed=3)
        assert (len(rest), len(held_out)) == (4, 2) and not {q.id for q in rest} & {q.id for q in held_out}
        assert arguments.load_prompts(seed=3) == (rest, held_out) != arguments.load_prompts(seed=4)
        rest, held_out = PromptArguments(prompts=str(path)).load_prompts(seed=3)
        assert (len(rest), len(held_out)) == (4, 2)  # a fourth, but two at least
        with pytest.raises(ValueError, match="6 prompts, of which num_eval_prompts=6"):
            PromptArguments(prompts=str(path), num_eval_prompts=6).load_prompts(seed=3)

    @pytest.mark.parametrize(
        ("options", "named"),
        [({"num_eval_prompts": 1}, "num_eval_prompts"), ({"num_prompts": 0}, "num_prompts"),
         ({"num_samples": True}, "num_samples"), ({"temperature": -1.0}, "temperature")],
    )  # fmt: skip
    def test_values_out_of_range_are_refused_by_name(self, options, named):
        with pytest.raises(ValueError, match=named):
            PromptArguments(**options)


class TestAnswered:
    """Rows with an answer, of every usual shape."""

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "卵は？", "completion": "茹でる。"},
            {"query": "卵は？", "response": "茹でる。"},
            {"question": "卵は？", "answer": "茹でる。"},
            {"instruction": "卵は？", "input": "", "output": "茹でる。"},
        ],
    )
    def test_columns(self, row):
        assert answered(row, "here").items() >= {"prompt": "卵は？", "completion": "茹でる。"}.items()

    def test_an_input_stands_behind_its_instruction(self):
        row = {"instruction": "Count.", "input": "one two", "output": "2"}
        assert answered(row, "here")["prompt"] == "Count.\n\none two"

    def test_a_chat_ends_with_its_completion(self):
        chat = [{"from": "human", "value": "Eggs?"}, {"from": "gpt", "value": "Boil."}]
        row = answered({"conversations": chat, "negative_spans": [[0, 4]]}, "here")
        assert row["prompt"] == [{"role": "user", "content": "Eggs?"}]
        assert row["completion"] == [{"role": "assistant", "content": "Boil."}]
        assert row.keys() == {"prompt", "completion", "negative_spans"}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": [{"role": "user", "content": "a"}]}, "does not end with an answer"),
            ({"prompt": "a"}, "no `completion`"),
            ({"completion": "a"}, "no `prompt`"),
        ],
    )
    def test_what_has_none_is_named(self, row, message):
        with pytest.raises(ValueError, match=f"x.csv: row 7.*{message}"):
            answered(row, "x.csv: row 7")


def test_rows_without_id_get_a_digest_of_their_own():
    first, again, other, named = with_ids([{"text": "卵"}, {"text": "卵"}, {"text": "egg"}, {"text": "卵", "id": 5}])
    assert again["id"] == f"{first['id']}-2" and other["id"] not in (first["id"], again["id"]) and named["id"] == 5
    assert with_ids([{"text": "卵"}])[0]["id"] == first["id"]


def test_rows_may_be_given_in_place_of_a_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    for given in (ROWS, iter(ROWS), datasets.Dataset.from_list(ROWS)):
        assert list(read_rows(given)) == ROWS
    assert texts(load_queries(["Why?", "なぜ？"])) == ["Why?", "なぜ？"]
    with pytest.raises(ValueError, match="rows given: row 2"):
        list(read_rows([{"prompt": "a"}, 5]))


def test_unused_columns_and_further_questions_are_said_once(tmp_path, caplog):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    path = jsonl(tmp_path, [{"id": 1, "messages": turns, "label": "x", "source": "y"}])
    for _ in range(2):
        assert texts(load_queries(path)) == ["a"]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "label, source" in said[0] and "1 chats" in said[1]


FIRST_HOUR = Path(__file__).parents[3] / "shared" / "cases" / "first_hour"


@pytest.mark.skipif(not FIRST_HOUR.is_dir(), reason=f"needs {FIRST_HOUR}")
def test_what_three_users_bring_is_read_as_it_is():
    chats, seeds = load_queries(FIRST_HOUR / "chats.jsonl", chats=True), load_queries(FIRST_HOUR / "seeds.txt")
    assert (len(chats), len(seeds)) == (120, 50)
    assert all(chat.messages[-1]["role"] == "user" for chat in chats)
    assert all(answered(row, "")["completion"][0]["content"] for row in read_rows(FIRST_HOUR / "chats.jsonl"))
