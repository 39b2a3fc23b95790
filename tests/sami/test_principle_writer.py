import json

import pytest

from trl_extensions.cli.principles import main
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.sami.principle_writer import parse_answer, write_principles, writer_prompt
from trl_extensions.sami.principles import Principle, load_principles


CONCISE = Principle("concise", "Answer in one sentence.", "Answer at length.")
KIND = Principle("kind", "Use warm words.", "Use cold words.")

PLAIN = """\
Name: concise
Definition: Answer in one sentence.
Antithesis: Answer at length.

Name: kind
Definition: Use warm words.
Antithesis: Use cold words.
"""
MARKDOWN = """\
Sure! Here are two principles for your task:

1. **Name:** "concise"
   - **Definition**: Answer in one
     sentence.
   - **Antithesis**: Answer at length.

2. **Name: kind**
   - **Definition:** Use warm words.
   - **Antithesis:** Use cold words.

Let me know if you would like more: I am happy to help!
"""
HEADINGS = """\
### 1. concise
Definition: Answer in one sentence.
Opposite: Answer at length.

### 2. kind:
Definition: Use warm words.
Opposite: Use cold words.
"""
ONE_LINE = """\
- Name: concise. Definition: Answer in one sentence. Antithesis: Answer at length.
- Name: kind; Definition: Use warm words. (Antithesis: Use cold words.
"""
JSON = """\
Of course [as asked]:
```json
{"principles": [
  {"name": "concise", "definition": "Answer in one sentence.", "antithesis": "Answer at length."},
  {"title": "kind", "Rule": "Use warm words.", "opposite_rule": "Use cold words."}
]}
```
Done.
"""
YAML = """\
```yaml
- name: concise
  definition: Answer in one sentence.
  antithesis: Answer at length.
- name: kind
  definition: Use warm words.
  antithesis: Use cold words.
```"""
YAML_BY_NAME = """\
concise:
  definition: Answer in one sentence.
  antithesis: Answer at length.
kind:
  definition: Use warm words.
  antithesis: Use cold words.
"""


@pytest.mark.parametrize("answer", [PLAIN, MARKDOWN, HEADINGS, ONE_LINE, JSON, YAML, YAML_BY_NAME])
def test_answers_of_many_forms_mean_the_same(answer):
    assert parse_answer(answer) == [CONCISE, KIND]


def test_numbered_labels_without_names():
    answer = "Principle 1: Always answer in one single short sentence.\nAntithesis 1: Answer at length.\n"
    assert parse_answer(answer) == [
        Principle(
            "Always answer in one single short", "Always answer in one single short sentence.", "Answer at length."
        )
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm sorry, I cannot do that.",
        "Name: concise\nDefinition: Answer in one sentence.\n",  # no antithesis
        "Name: concise\nDefinition: Same.\nAntithesis: same.\n",
        "Name:\nDefinition:\nAntithesis:\n",
        '{"name": 1, "definition": 2, "antithesis": 3}',
        "[1, 2]",
        "{{: [",
    ],
)
def test_answers_without_a_whole_principle_give_none(answer):
    assert parse_answer(answer) == []


def test_a_cut_off_last_principle_is_left_out():
    assert parse_answer(PLAIN + "\nName: third\nDefinition: Be") == [CONCISE, KIND]
    cut = JSON[: JSON.index("kind")].removeprefix("Of course [as asked]:\n")
    assert parse_answer(cut) == [CONCISE]


class ScriptedEngine:
    """Gives prepared answers in turn and remembers what it was asked."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def generate(self, prompts, params):
        for index, prompt in enumerate(prompts):
            self.asked.append((prompt, params))
            yield index, Generation(text=self.answers.pop(0), finish_reason="stop", num_tokens=1)


def test_enough_at_once_needs_one_question():
    engine = ScriptedEngine(PLAIN)
    params = GenerationParams(max_new_tokens=50, seed=3)
    assert write_principles(engine, "task", 1, params=params) == [CONCISE]
    assert [params for _, params in engine.asked] == [params]


def test_missing_ones_are_asked_for_again_with_another_seed_and_temperature(tmp_path):
    first = PLAIN[: PLAIN.index("Name: kind")]
    repeated = first + "\nName: Concise\nDefinition: Other.\nAntithesis: Another.\n"
    engine = ScriptedEngine("no idea", first, repeated, PLAIN)
    raw_path = tmp_path / "raw.jsonl"
    assert write_principles(engine, "task", 2, raw_path=raw_path) == [CONCISE, KIND]
    assert [params.seed for _, params in engine.asked] == [0, 1, 2, 3]
    assert engine.asked[0][1].temperature == 0 and all(params.temperature > 0 for _, params in engine.asked[1:])
    assert "concise" not in str(engine.asked[1][0]) and "concise" in engine.asked[2][0][-1]["content"]
    assert [(row["answer"], row["parsed"]) for row in read_jsonl(raw_path)] == [
        ("no idea", 0),
        (first, 1),
        (repeated, 0),
        (PLAIN, 1),
    ]


def test_giving_up_says_how_many_and_where_the_answers_are(tmp_path):
    engine = ScriptedEngine(PLAIN, "no", "no")
    with pytest.raises(ValueError, match=r"only 2 of 3 principles could be read from 3 answers .*raw\.jsonl"):
        write_principles(engine, "task", 3, raw_path=tmp_path / "raw.jsonl", max_attempts=3)
    assert len(read_jsonl(tmp_path / "raw.jsonl")) == 3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`task` is empty"):
        write_principles(ScriptedEngine(), " ", 1)
    with pytest.raises(ValueError, match="`num` is 0"):
        write_principles(ScriptedEngine(), "task", 0)


def test_the_prompt_ends_with_task_number_and_names():
    prompt = writer_prompt("answer {everything}\nwell", 3, ["concise", "kind"])
    assert [message["role"] for message in prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert all(part in prompt[-1]["content"] for part in ("answer {everything} well", "3 other", "concise, kind"))


def test_worked_examples_can_be_parsed_and_do_not_count_as_answers():
    worked = [message["content"] for message in writer_prompt("task", 1) if message["role"] == "assistant"]
    assert [len(parse_answer(answer)) for answer in worked] == [2, 1]
    engine = ScriptedEngine("\n\n".join([*worked, PLAIN]))
    assert write_principles(engine, "task", 2) == [CONCISE, KIND]


@pytest.fixture
def scripted_cli(monkeypatch):
    """The command with an engine that answers `PLAIN`; everything else is real."""
    import trl_extensions.core.generation as generation

    monkeypatch.setattr(generation, "create_engine", lambda args, model: ScriptedEngine(PLAIN))


COMMON = ["--task", "answer questions", "--num", "2", "--model_name_or_path", "unused"]


def test_command_writes_a_file_that_loads_and_refuses_to_overwrite_it(scripted_cli, tmp_path, capsys):
    output = tmp_path / "p.yaml"
    assert main([*COMMON, "--output", str(output)]) == 0
    assert load_principles(output) == [CONCISE, KIND]
    assert output.read_text().startswith("# ") and "# Task: answer questions" in output.read_text()
    assert [row["answer"] for row in read_jsonl(tmp_path / "p.yaml.raw.jsonl")] == [PLAIN]
    output.write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        main([*COMMON, "--output", str(output)])
    assert output.read_text() == "mine"
    main([*COMMON, "--output", str(output), "--overwrite"])
    assert load_principles(output) == [CONCISE, KIND]


def test_command_reads_a_config_file(scripted_cli, tmp_path):
    output, config = tmp_path / "p.yaml", tmp_path / "c.yaml"
    config.write_text(f"task: answer\nnum: 1\nmodel_name_or_path: unused\noutput: {output}\n")
    assert main(["--config", str(config)]) == 0
    assert load_principles(output) == [CONCISE]


def test_unknown_keys_and_arguments_are_refused(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("tasc: answer\n")
    with pytest.raises(ValueError, match="tasc"):
        main(["--config", str(config)])
    with pytest.raises(ValueError, match="--tasc"):
        main(["--tasc", "answer"])
    with pytest.raises(ValueError, match="`task` is missing"):
        main(["--output", str(tmp_path / "p.yaml")])
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_check_shows_the_number_and_three_constitutions(tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"principles": [vars(CONCISE), vars(KIND)]}))
    assert main(["--check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2 principles: concise, kind" in out
    assert out.count("\n1. ") == out.count("\n2. ") == 3


def test_check_of_a_single_principle_shows_both_constitutions(tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"principles": [vars(KIND)]}))
    assert main(["--check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1. Use warm words." in out and "1. Use cold words." in out


def test_check_of_a_bad_file_says_what_is_wrong(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("principles:\n- name: a\n")
    with pytest.raises(ValueError, match="`definition` is missing"):
        main(["--check", str(path)])


@pytest.mark.slow
def test_the_embedded_model_writes_a_file_that_loads(tmp_path):
    output = tmp_path / "p.yaml"
    assert main(["--task", "answer everyday questions", "--num", "2", "--output", str(output)]) == 0
    assert len(load_principles(output)) == 2
