import csv
import json
import logging
from pathlib import Path

import pytest

from trl_extensions.codeclm.pipeline.seeds import load_seeds
from trl_extensions.core.inputs import Query


DATA = Path(__file__).resolve().parents[4] / "shared/data"


def jsonl(tmp_path, rows, name="seeds.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(seeds):
    return [seed.text for seed in seeds]


def test_instruction_and_input_are_joined(tmp_path):
    rows = [
        {"id": "a", "instruction": "Translate this.", "input": "Good day\n", "output": "Bonjour"},
        {"id": "b", "instruction": " Say hello. ", "input": "", "output": "Hello"},
        {"id": "c", "instruction": "Say goodbye.", "input": None, "output": "Bye"},
    ]
    path = jsonl(tmp_path, rows)
    expected = ["Translate this.\n\nGood day", "Say hello.", "Say goodbye."]
    assert texts(load_seeds(path)) == texts(load_seeds(path, "instruction")) == expected
    assert texts(load_seeds(path, "output")) == ["Bonjour", "Hello", "Bye"]
    assert load_seeds(path)[1] == Query.from_text("Say hello.")


def test_instruction_comes_before_other_columns(tmp_path):
    rows = [{"text": "### Instruction: ...", "prompt": "p", "instruction": "Say hello."}]
    assert texts(load_seeds(jsonl(tmp_path, rows))) == ["Say hello."]


def test_other_files_and_chats(tmp_path):
    path = tmp_path / "seeds.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["prompt", "input"], ["Say, hello.", "unused"]])
    assert texts(load_seeds(path)) == ["Say, hello."]
    path = tmp_path / "seeds.json"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hello."}]
    path.write_text(json.dumps([{"prompt": [*chat, {"role": "assistant", "content": "Hello"}]}]), encoding="utf-8")
    assert texts(load_seeds(path)) == ["Say hello."]


def test_empty_and_repeated_seeds_are_counted(tmp_path, caplog):
    rows = [{"prompt": text} for text in ("Say hello.", " ", "Say goodbye.", None, "Say goodbye.")]
    with caplog.at_level(logging.WARNING):
        assert texts(load_seeds(jsonl(tmp_path, rows))) == ["Say hello.", "Say goodbye."]
    assert "2 empty" in caplog.text and "1 repeated" in caplog.text


def test_limit_counts_seeds_that_are_used(tmp_path):
    path = jsonl(tmp_path, [{"prompt": text} for text in ("", "One.", "One.", "Two.", "Three.")])
    assert texts(load_seeds(path, limit=2)) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], {}, "no rows"),
        ([{"prompt": ""}, {"prompt": None}], {}, "'empty': 2"),
        ([{"words": "Say hello."}], {}, "row 1 has no column .*available: words"),
        ([{"prompt": "Say hello."}, {"text": "Say hello."}], {}, "row 2 has no column 'prompt'"),
        ([{"prompt": 7}], {}, "row 1, column 'prompt' holds int, not text"),
        ([{"prompt": ["Say hello."]}], {}, "row 1, column 'prompt': a message needs"),
        ([["Say hello."]], {}, "row 1 is not an object"),
        ([{"prompt": "Say hello."}], {"limit": 0}, "`limit` is 0"),
        ([{"prompt": "Say hello."}], {"column": "task"}, "no column 'task'; available: prompt"),
    ],
)
def test_bad_seeds_give_one_clear_line(tmp_path, rows, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        load_seeds(jsonl(tmp_path, rows), **arguments)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_seeds(tmp_path / "seeds.jsonl")


def test_the_seeds_of_self_instruct():
    path = DATA / "codeclm" / "seed_tasks_175.jsonl"
    if not path.is_file():
        pytest.skip("seed_tasks_175 is not beside this checkout (shared/data)")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seeds = load_seeds(path)
    assert len(seeds) == len(rows) == 175
    for seed, row in zip(seeds, rows, strict=True):
        assert seed.text.startswith(row["instruction"].strip()) and seed.text.endswith(row["input"].strip())
