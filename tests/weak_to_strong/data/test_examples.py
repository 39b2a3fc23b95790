"""Reading examples and pairs: labels of every kind, templates, ids, and one line for what cannot be read."""

import gzip
import json
from pathlib import Path

import pytest

from trl_extensions.weak_to_strong.data.examples import Example, flatten_chat, load_examples, load_pairs


DATA = Path(__file__).resolve().parents[4] / "shared/data"


def write(path, *rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(tmp_path, *labels, **options):
    path = write(tmp_path / "l.jsonl", *({"text": f"t{i}", "label": label} for i, label in enumerate(labels)))
    examples, names = load_examples(path, **options)
    return [example.label for example in examples], names


@pytest.mark.parametrize(
    ("given", "labels", "names"),
    [
        ([1, 0, 1], [1, 0, 1], ["0", "1"]),
        ([0, 0], [0, 0], ["0", "1"]),  # a part of the data may lack a class
        ([True, False], [1, 0], ["0", "1"]),
        (["1", "0"], [1, 0], ["0", "1"]),
        ([2.0, 1.0, 0.0], [2, 1, 0], ["0", "1", "2"]),
        (["10", "9", *map(str, range(9))], [10, 9, *range(9)], [str(i) for i in range(11)]),
        (["yes", "no", " yes "], [1, 0, 1], ["no", "yes"]),
        ([1, None, 0, ""], [1, None, 0, None], ["0", "1"]),
    ],
)
def test_labels_of_every_kind(tmp_path, given, labels, names):
    assert labelled(tmp_path, *given) == (labels, names)


def test_given_class_names_rule(tmp_path):
    assert labelled(tmp_path, "b", "a", class_names=["b", "a"]) == ([0, 1], ["b", "a"])
    assert labelled(tmp_path, 0, "1", True, class_names=["safe", "unsafe"]) == ([0, 1, 1], ["safe", "unsafe"])
    # A name that looks like a number is a name
    assert labelled(tmp_path, "1", "2", class_names=["2", "1"])[0] == [1, 0]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (["a", "b", "c"], {"class_names": ["a", "b"]}, r"row 3: label 'c' is none of the classes a, b"),
        ([0, 2], {"class_names": ["a", "b"]}, r"row 2: label '2' is none"),
        ([1, 0], {"class_names": ["1", "2"]}, r"row 2: label '0' is none of the classes 1, 2"),
        ([0, 0.5], {}, r"row 2: label 0\.5 is float"),
        ([0, [1]], {}, r"row 2: label \[1\] is list"),
        ([0, 3], {}, r"labels go up to 3, but 1 does not occur"),
        (["a", "a"], {}, r"every label is 'a'"),
        ([None], {}, r"no row has a label"),
        ([0], {"class_names": ["a"]}, "at least two"),
        ([0], {"class_names": ["a", "a"]}, "each once"),
        ([0], {"label_column": "y"}, r"row 1 has no column 'y'; available: text, label"),
        ([0], {"label_column": None}, r"give `class_names`"),
        ([0], {"limit": 0}, r"`limit` is 0"),
        ([0], {"text_column": "text", "text_template": "{text}"}, "not both"),
        ([0], {"text_column": "label"}, r"row 1, column 'label' holds int"),
        ([0], {"text_template": "x"}, "must name columns"),
        ([0], {"text_template": "{}"}, "must name columns"),
        ([0], {"text_template": "{text"}, "cannot be read"),
        ([0], {"text_template": "{text} {other}"}, r"row 1 has no column 'other'"),
        ([0], {"group_column": "g"}, r"row 1 has no column 'g'"),
        ([0], {"where": {"split": "train"}}, r"row 1 has no column 'split'"),
        ([0], {"where": {"label": 5}}, r"no row is left where \{'label': 5\}"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, options, message):
    with pytest.raises(ValueError, match=message) as error:
        labelled(tmp_path, *given, **options)
    assert "\n" not in str(error.value)


def test_empty_text_and_lacking_columns_are_named(tmp_path):
    for bad, message in (({"text": " ", "label": 0}, "is empty"), ({"label": 0}, "none of the columns text, prompt")):
        path = write(tmp_path / "a.jsonl", {"text": "a", "label": 1}, bad)
        with pytest.raises(ValueError, match=rf"a\.jsonl: row 2.*{message}"):
            load_examples(path)
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(ValueError, match="there are no rows"):
        load_examples(tmp_path / "e.jsonl")
    path = write(tmp_path / "t.jsonl", {"a": "x", "b": None, "label": 0}, {"a": "", "b": " ", "label": 1})
    with pytest.raises(ValueError, match="row 2: the columns a, b of the template are all empty"):
        load_examples(path, text_template="{a}: {b}")


def test_template_columns_groups_and_filter(tmp_path):
    rows = [
        {"id": 7, "q": "Why?", "n": 3, "a": "{so}", "y": "n", "doc": 1, "part": "x"},
        {"id": "k", "q": "How?", "n": None, "a": "b", "y": "z", "doc": None, "part": "y"},
        {"id": 7, "q": "Who?", "n": 0, "a": "c", "y": "m", "doc": 2, "part": "x"},
    ]
    path = write(tmp_path / "a.jsonl.gz", *rows)
    options = {"text_template": "{{{q}}} {n} {a}", "label_column": "y", "group_column": "doc"}
    examples, names = load_examples(path, **options)
    assert names == ["m", "n", "z"]
    assert examples == [
        Example("7", "{Why?} 3 {so}", 1, "1"),
        Example("k", "{How?}  b", 2, None),
        Example("7-2", "{Who?} 0 c", 0, "2"),
    ]
    # The filter changes neither ids nor classes of what it keeps
    assert load_examples(path, where={"part": "x"}, **options) == ([examples[0], examples[2]], names)
    assert load_examples(path, where={"part": "x", "doc": "2"}, **options)[0] == [examples[2]]


def test_csv_and_chats(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a, b",1\nc,0\n')
    assert [(e.text, e.label) for e in load_examples(tmp_path / "a.csv")[0]] == [("a, b", 1), ("c", 0)]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello \n"}]
    path = write(tmp_path / "c.jsonl", {"prompt": chat, "label": 0}, {"prompt": [{"role": "user"}], "label": 0})
    with pytest.raises(ValueError, match=r"row 2, column 'prompt': a message needs the texts"):
        load_examples(path)
    path = write(tmp_path / "c.jsonl", {"prompt": chat, "label": 0})
    assert load_examples(path)[0][0].text == "User: Hi\n\nAssistant: Hello"


def test_unlabelled_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    examples, names = load_examples(path, label_column=None, class_names=["x", "y"])
    assert [e.label for e in examples] == [None, None] and names == ["x", "y"]


def test_ids_are_stable_and_unique(tmp_path, caplog):
    texts = ["a", "b", "a", "c", "a"]
    path = write(tmp_path / "a.jsonl", *({"text": t, "label": i % 3 % 2} for i, t in enumerate(texts)))
    first, _ = load_examples(path)
    a = "ca978112ca1b"  # sha256 of "a", as `printf a | sha256sum` prints it
    assert [e.id for e in first if e.text == "a"] == [a, f"{a}-2", f"{a}-3"]
    assert "1 texts occur with different labels" in caplog.text
    subset, _ = load_examples(path, limit=3, seed=1)
    assert len(subset) == 3 and set(subset) <= set(first)


def test_the_limit_draws_at_random_and_repeatably(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": int(i > 50)} for i in range(100)))
    drawn = [[e.text for e in load_examples(path, limit=20, seed=seed)[0]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20 and drawn[0] != [f"t{i}" for i in range(20)]
    assert len(load_examples(path, limit=500)[0]) == 100


def test_classes_that_a_data_set_declares(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham", "eggs"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data/train.parquet")
    examples, names = load_examples(tmp_path / "data")
    assert names == ["spam", "ham", "eggs"] and [e.label for e in examples] == [1, 0]


def test_broken_characters_can_be_hashed_and_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d", "label": 0}\n')
    assert load_examples(tmp_path / "a.jsonl")[0][0].text == "a?"


def pair_texts(pair):
    return (pair.rejected, pair.chosen) if pair.label else (pair.chosen, pair.rejected)


def test_pairs_are_swapped_by_a_fair_coin_and_nothing_is_lost(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(400)))
    pairs = load_pairs(path)
    assert [pair_texts(pair) for pair in pairs] == [(f"good {i}", f"bad {i}") for i in range(400)]
    assert abs(sum(pair.label for pair in pairs) - 200) < 50  # 5 standard deviations of a fair coin
    assert pairs == load_pairs(path) != load_pairs(path, seed=1)
    assert set(load_pairs(path, limit=50)) < set(pairs)


USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [("Q", "good"), ([USER], [BOT]), ("Q", [BOT]), ([USER], "good"), ("Q", [USER, BOT]), (None, [USER, BOT])],
)
def test_prompt_and_answer_become_one_text(tmp_path, prompt, chosen):
    row = {"prompt": prompt, "chosen": chosen, "rejected": "User: Q\n\nAssistant: bad" if prompt is None else "bad"}
    [pair] = load_pairs(write(tmp_path / "p.jsonl", row))
    assert pair_texts(pair) == ("User: Q\n\nAssistant: good", "User: Q\n\nAssistant: bad")


def test_pairs_that_cannot_be_used(tmp_path, caplog):
    path = write(tmp_path / "p.jsonl", {"chosen": "a", "rejected": "a"}, {"chosen": "a", "rejected": "b"})
    assert len(load_pairs(path)) == 1
    assert "left out 1 pairs of equal texts" in caplog.text
    for row, message in (
        ({"chosen": "a"}, "row 2 has no column 'rejected'"),
        ({"chosen": "a", "rejected": ""}, "row 2, column 'rejected' is empty"),
        ({"chosen": [{"role": "user"}], "rejected": "b"}, "row 2, column 'chosen': a message needs"),
        ({"chosen": 3, "rejected": "b"}, "row 2, column 'chosen' holds int"),
    ):
        path = write(tmp_path / "p.jsonl", {"chosen": "a", "rejected": "b"}, row)
        with pytest.raises(ValueError, match=message):
            load_pairs(path)
    path = write(
        tmp_path / "p.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b"}
    )
    with pytest.raises(ValueError, match="row 2 has no column 'prompt'"):
        load_pairs(path)
    with pytest.raises(ValueError, match="no row is left"):
        load_pairs(write(tmp_path / "q.jsonl", {"chosen": "a", "rejected": "a"}))


def test_flatten_chat_by_hand():
    chat = [{"role": "system", "content": "Be kind."}, USER, BOT]
    assert flatten_chat(chat) == "System: Be kind.\n\nUser: Q\n\nAssistant: good"


def test_real_privacy_questions():
    path = DATA / "legalbench/privacy_policy_qa.jsonl.gz"
    if not path.is_file():
        pytest.skip("privacy_policy_qa is not beside this checkout (shared/data)")
    options = {"text_template": "Question: {question}\nClause: {text}", "group_column": "question_id"}
    train, names = load_examples(path, where={"split": "train"}, **options)
    test, _ = load_examples(path, where={"split": "test"}, **options)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert names == ["0", "1"] and len(train) + len(test) == len(rows)
    assert [e.label for e in train] == [row["label"] for row in rows if row["split"] == "train"]
    assert not {e.group for e in train} & {e.group for e in test}
    assert len({e.id for e in (*train, *test)}) == len(rows)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["Safe", "safe ", "unsafe", "safe"], ["safe", "unsafe"]),
        (["安全Ａ", "安全a ", "危険", "危険"], ["危険", "安全Ａ"]),
        (["ＡＩ", "ai", "law", "AI", "AI"], ["AI", "law"]),
    ],
)
def test_spellings_of_a_class_are_one_and_said_once(tmp_path, caplog, labels, names):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    for _ in range(2):
        examples, found = load_examples(write(tmp_path / "x.jsonl", *rows))
        assert found == names and examples[0].label == examples[1].label
    assert sum("one class" in record.message for record in caplog.records) == 1
    examples, _ = load_examples(write(tmp_path / "x.jsonl", *rows), class_names=[name.upper() for name in names])
    assert {example.label for example in examples} == {0, 1}


def test_names_that_were_given_stay_apart(tmp_path):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(["Safe", "safe"])]
    examples, _ = load_examples(write(tmp_path / "x.jsonl", *rows), class_names=["Safe", "safe"])
    assert [example.label for example in examples] == [0, 1]


@pytest.mark.parametrize("column", ["messages", "conversations", "instruction"])
def test_texts_of_chats_and_instructions(tmp_path, column):
    chat = [{"role": "user", "content": "卵？"}, {"role": "assistant", "content": "はい。"}]
    value = "卵？" if column == "instruction" else chat
    rows = [{column: value, "input": "A", "label": label} for label in (0, 1)]
    [example, _], _ = load_examples(write(tmp_path / "x.jsonl", *rows))
    assert example.text == ("卵？\n\nA" if column == "instruction" else "User: 卵？\n\nAssistant: はい。")
