import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest

from trl_extensions.cli.sami import principles as main
from trl_extensions.core.generation.replies import read_reply
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.sami.principles import (
    Drafts,
    Principle,
    constitution_label,
    load_principles,
    sample_constitutions,
    save_principles,
    write_principles,
    writer_prompt,
)


TWO = [
    Principle("concise", "Answer in one sentence.", "Answer in detail."),
    Principle("friendly", "Be warm.", "Be dry."),
]


def write(tmp_path, text):
    path = tmp_path / "principles.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def entry(name="a", definition="Do.", antithesis="Do not."):
    return f"- name: {name}\n  definition: {definition}\n  antithesis: {antithesis}\n"


def test_saved_principles_load_again(tmp_path):
    principles = [
        Principle("no", "Say: 'yes' # always", "Say {nothing}, ever"),
        Principle("höflich", "Sei höflich.", "Sei grob."),
    ]
    path = tmp_path / "deep" / "principles.yaml"
    save_principles(path, principles, task="two\nlines: of task")
    assert load_principles(path) == principles
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and "# Task: two lines: of task" in lines
    assert list(path.parent.iterdir()) == [path]


def test_white_space_inside_a_field_is_collapsed(tmp_path):
    path = write(tmp_path, "principles:\n- name: a\n  definition: |\n    Do\n    this.\n  antithesis: Do  that.\n")
    assert load_principles(path) == [Principle("a", "Do this.", "Do that.")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: a\n", "dictionary .*one key `principles`"),
        ("principles: []\n", "`principles`: .* at least 1"),
        ("principles: text\n", "`principles`: .* list"),
        ("principle:\n" + entry(), "`principles`: .*required"),
        ("principles:\n" + entry() + "task: a\n", "`task`: "),
        ("principles:\n- just text\n", "principle 1: .*`name`, `definition` and `antithesis`"),
        ("principles:\n" + entry() + "  weight: 2\n", "principle 1: `weight`: "),
        ("principles:\n" + entry() + "- name: b\n  definition: Do.\n", "principle 2: `antithesis`: .*required"),
        ("principles:\n" + entry(definition=""), "principle 1: `definition`: "),
        ("principles:\n" + entry(definition="'  '"), "principle 1: `definition`: .* at least 1"),
        ("principles:\n" + entry(name="yes"), "principle 1: `name`: .*string"),
        ("principles:\n" + entry() + entry(name="A"), "principle 2: `name` is taken by principle 1"),
        ("principles:\n" + entry(antithesis="do."), "principle 1: .* are the same"),
        ("principles:\n- name: a: b\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_principles(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: no such file; .*trl-ext principles"):
        load_principles(tmp_path / "none.yaml")


def test_saving_what_could_not_be_loaded_is_refused(tmp_path):
    path = write(tmp_path, "kept")
    with pytest.raises(ValueError, match="is taken by principle 1"):
        save_principles(path, [TWO[0], TWO[0]])
    assert path.read_text() == "kept"


def test_text_is_the_numbered_choice_of_each_principle():
    expected = {"concise": TWO[0], "friendly": TWO[1]}
    for constitution in sample_constitutions(TWO, 4, seed=1, key="q"):
        wanted = {
            expected[name].definition if chosen else expected[name].antithesis
            for name, chosen in constitution.choices.items()
        }
        lines = constitution.text.split("\n")
        assert [line[:3] for line in lines] == ["1. ", "2. "]
        assert {line[3:] for line in lines} == wanted


def test_label_is_sorted_by_name():
    assert constitution_label({"friendly": False, "concise": True}) == "+concise −friendly"
    all_four = {constitution.label for constitution in sample_constitutions(TWO, 4, seed=0, key="x")}
    assert all_four == {
        "+concise +friendly",
        "+concise −friendly",
        "−concise +friendly",
        "−concise −friendly",
    }


def test_draws_depend_on_seed_and_key_alone():
    keys = [f"q{number}" for number in range(30)]
    forwards = {key: sample_constitutions(TWO, 2, seed=3, key=key) for key in keys}
    backwards = {key: sample_constitutions(TWO, 2, seed=3, key=key) for key in reversed(keys)}
    assert forwards == backwards
    assert any(forwards[key] != sample_constitutions(TWO, 2, seed=4, key=key) for key in keys)
    assert len({tuple(c.text for c in constitutions) for constitutions in forwards.values()}) > 5


def test_every_pair_of_choices_and_every_order_is_equally_likely():
    pairs, orders = Counter(), Counter()
    draws = 6000
    for number in range(draws):
        first, second = sample_constitutions(TWO, 2, seed=0, key=str(number))
        pairs[frozenset([first.label, second.label])] += 1
        concise_first = {"1. " + TWO[0].definition, "1. " + TWO[0].antithesis}
        orders[tuple(c.text.split("\n")[0] in concise_first for c in (first, second))] += 1
    # Six pairs of four assignments, four pairs of two orders; five standard deviations of a binomial.
    for counts, kinds in ((pairs, 6), (orders, 4)):
        assert len(counts) == kinds
        spread = 5 * (draws * (1 / kinds) * (1 - 1 / kinds)) ** 0.5
        assert all(abs(count - draws / kinds) < spread for count in counts.values())


@pytest.mark.parametrize("num_principles", [2, 20, 80])
def test_choices_are_distinct_for_any_number_of_principles(num_principles):
    principles = [Principle(f"p{i}", f"Do {i}.", f"Avoid {i}.") for i in range(num_principles)]
    constitutions = sample_constitutions(principles, 4, seed=0, key="q")
    assert all(a.choices != b.choices for a, b in itertools.combinations(constitutions, 2))
    assert all(len(c.text.split("\n")) == num_principles for c in constitutions)


def test_too_few_principles_or_constitutions_are_refused():
    with pytest.raises(ValueError, match="5 different constitutions need at least 3 principles, got 2"):
        sample_constitutions(TWO, 5, seed=0, key="q")
    with pytest.raises(ValueError, match="`num` is 1"):
        sample_constitutions(TWO, 1, seed=0, key="q")
    with pytest.raises(ValueError, match="same name"):
        sample_constitutions([TWO[0], TWO[0]], 2, seed=0, key="q")


# The principle writer

CONCISE = Principle("concise", "Answer in one sentence.", "Answer at length.")
PARAMS = GenerationParams(max_new_tokens=600)
KIND = Principle("kind", "Use warm words.", "Use cold words.")


def answer(*principles):
    return json.dumps({"principles": [vars(principle) for principle in principles]}, ensure_ascii=False)


BOTH = answer(CONCISE, KIND)


class ScriptedEngine:
    """Gives prepared answers in turn and remembers what it was asked."""

    name = "scripted"

    def __init__(self, *answers, finish_reason="stop"):
        self.answers, self.finish_reason = list(answers), finish_reason
        self.asked = []

    def generate(self, prompts, params):
        for index, prompt in enumerate(prompts):
            self.asked.append((prompt, params))
            yield index, Generation(text=self.answers.pop(0), finish_reason=self.finish_reason, num_tokens=1)


@pytest.fixture
def drafted(tmp_path):
    """`write_principles` of a task by an engine, with the answers in `raw.jsonl`."""

    def write(engine, num, task="task", params=PARAMS):
        return write_principles(engine, task, num, params=params, raw_path=tmp_path / "raw.jsonl")

    return write


def test_enough_at_once_needs_one_question(drafted):
    engine = ScriptedEngine(BOTH)
    params = GenerationParams(max_new_tokens=50, seed=3)
    assert drafted(engine, 1, params=params) == [CONCISE]
    [(_, asked)] = engine.asked
    assert replace(asked, schema=None) == params
    assert json.loads(asked.schema)["required"] == ["principles"]


def test_missing_ones_are_asked_for_again_with_another_seed_and_temperature(drafted, tmp_path):
    first = answer(CONCISE)
    repeated = answer(CONCISE, Principle("Concise", "Other.", "Another."))
    engine = ScriptedEngine("no idea", first, repeated, BOTH)
    assert drafted(engine, 2) == [CONCISE, KIND]
    assert [params.seed for _, params in engine.asked] == [0, 1, 2, 3]
    assert engine.asked[0][1].temperature == 0 and all(params.temperature > 0 for _, params in engine.asked[1:])
    assert "concise" not in str(engine.asked[1][0]) and "concise" in engine.asked[2][0][-1]["content"]
    assert [(row["answer"], row["parsed"]) for row in read_jsonl(tmp_path / "raw.jsonl")] == [
        ("no idea", 0),
        (first, 1),
        (repeated, 0),
        (BOTH, 1),
    ]


def test_giving_up_says_how_many_and_where_the_answers_are(drafted, tmp_path):
    with pytest.raises(ValueError, match=r"only 2 of 3 principles could be read from 12 answers .*raw\.jsonl"):
        drafted(ScriptedEngine(BOTH, *["no"] * 11), 3)
    assert len(read_jsonl(tmp_path / "raw.jsonl")) == 12


@pytest.mark.parametrize(
    "drafts",
    [
        [("helpful", "Helpful and helpful.", "Cold and distant.")],  # repeated
        [("親切", "親切に親切に親切に。", "冷たい言葉で答える。")],  # repeated
        [("kind", "Be warm and kind.", "Be kind and warm!")],  # antithesis
        [("丁寧", "丁寧に答える。", "丁寧に答える!")],  # antithesis
        [("kind", "Use kind and warm words.", "Snap."), ("warm", "Use warm and kind words.", "Bark.")],  # another
        [("丁寧", "丁寧な言葉で答える。", "乱暴に話す。"), ("敬語", "丁寧な言葉で答えるの。", "嫌だ。")],  # another
    ],
)
def test_what_means_nothing_is_no_principle(drafted, drafts):
    num = len(drafts)
    reply = answer(*(Principle(*draft) for draft in drafts))
    with pytest.raises(ValueError, match=f"only {num - 1} of {num}"):
        drafted(ScriptedEngine(reply, *[reply] * (3 * num + 2)), num)


@pytest.mark.parametrize(
    "own",
    [
        (("short", "Answer in as few words as you can.", "Answer in as many words as you can."),
         ("kind", "Use kind words, use warm words.", "Use no kind words.")),
        (("簡潔", "一文で短く答える。", "長く答える。"), ("丁寧", "丁寧な言葉で話す。", "丁寧な言葉で話さない。")),
    ],
)  # fmt: skip
def test_opposites_and_like_words_are_fine(drafted, own):
    principles = [Principle(*draft) for draft in own]
    assert drafted(ScriptedEngine(answer(*principles)), 2) == principles


def test_the_prompt_ends_with_task_number_and_names():
    prompt = writer_prompt("answer {everything}\nwell", 3, ["concise", "kind"])
    assert [message["role"] for message in prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert all(part in prompt[-1]["content"] for part in ("answer {everything} well", "3 other", "concise, kind"))


def test_worked_examples_can_be_read_and_do_not_count_as_answers(drafted):
    worked = [message["content"] for message in writer_prompt("task", 1) if message["role"] == "assistant"]
    assert [len(read_reply(text, Drafts).principles) for text in worked] == [2, 1]
    assert drafted(ScriptedEngine(*worked, BOTH), 2) == [CONCISE, KIND]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I'm sorry, I cannot do that.",
        "Name: kind\nDefinition: Use warm words.\nAntithesis: Use cold words.",  # not the form that was asked for
        '{"principles": [{"name": "kind", "definition": "Use warm words."}]}',
        '{"principles": [{"name": "kind", "definition": "Same.", "antithesis": "same. "}]}',
        '{"principles": [{"name": " ", "definition": "Use warm words.", "antithesis": "Use cold words."}]}',
        '{"principles": [{"name": "Always answer with kind and warm words", "definition": "a", "antithesis": "b"}]}',
        '{"name": 1, "definition": 2, "antithesis": 3}',
        "[1, 2]",
    ],
)
def test_replies_without_a_whole_principle_give_none(drafted, reply, tmp_path):
    with pytest.raises(ValueError, match="only 0 of 1"):
        drafted(ScriptedEngine(*[reply] * 6), 1)
    assert [row["answer"] for row in read_jsonl(tmp_path / "raw.jsonl")] == [reply] * 6


@pytest.mark.parametrize("cut", ["", '{"name": "third", "definition": "Be'])
def test_of_a_reply_that_was_cut_off_what_is_whole_counts(drafted, cut):
    engine = ScriptedEngine(BOTH.removesuffix("]}") + ", " + cut, finish_reason="length")
    assert drafted(engine, 2) == [CONCISE, KIND]


def test_a_fence_thoughts_and_other_scripts(drafted):
    polite = Principle("丁寧", "敬語で書く。", "ぞんざいに書く。")
    engine = ScriptedEngine(f"<think>Two?</think>```json\n{answer(polite, KIND)}\n```")
    assert drafted(engine, 2, task="質問に答える") == [polite, KIND]


@pytest.fixture
def scripted_cli(monkeypatch):
    """The command with an engine that answers `BOTH`; everything else is real."""
    import trl_extensions.core.generation as generation

    monkeypatch.setattr(generation, "create_engine", lambda args, model: ScriptedEngine(BOTH))


COMMON = ["--task", "answer questions", "--num", "2", "--model_name_or_path", "unused"]


def test_command_writes_a_file_that_loads_and_refuses_to_overwrite_it(scripted_cli, tmp_path, capsys):
    output = tmp_path / "p.yaml"
    assert main([*COMMON, "--output", str(output)]) == 0
    assert load_principles(output) == [CONCISE, KIND]
    assert output.read_text().startswith("# ") and "# Task: answer questions" in output.read_text()
    assert [row["answer"] for row in read_jsonl(tmp_path / "p.yaml.raw.jsonl")] == [BOTH]
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
    with pytest.raises(ValueError, match="`definition`: "):
        main(["--check", str(path)])


@pytest.mark.slow
def test_the_embedded_model_writes_a_file_that_loads(tmp_path):
    output = tmp_path / "p.yaml"
    assert main(["--task", "answer everyday questions", "--num", "2", "--output", str(output)]) == 0
    assert len(load_principles(output)) == 2
