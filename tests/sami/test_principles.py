import itertools
from collections import Counter

import pytest

from trl_extensions.sami.principles import (
    Principle,
    constitution_label,
    load_principles,
    sample_constitutions,
    save_principles,
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
        ("- name: a\n", "expected a mapping with the key `principles`"),
        ("principles: []\n", "at least one principle"),
        ("principles: text\n", "at least one principle"),
        ("principle:\n" + entry(), "unknown key 'principle'"),
        ("principles:\n- just text\n", "principle 1: expected a mapping"),
        ("principles:\n" + entry() + "  weight: 2\n", r"principle 1 \('a'\): unknown field 'weight'"),
        (
            "principles:\n" + entry() + "- name: b\n  definition: Do.\n",
            r"principle 2 \('b'\): `antithesis` is missing",
        ),
        ("principles:\n" + entry(definition=""), r"principle 1 \('a'\): `definition` is missing"),
        ("principles:\n" + entry(definition="'  '"), r"principle 1 \('a'\): `definition` is empty"),
        ("principles:\n" + entry(name="yes"), "principle 1: `name` must be text, got True; put it in quotes"),
        ("principles:\n" + entry() + entry(name="A"), r"principle 2 \('A'\): `name` is already used by principle 1"),
        (
            "principles:\n" + entry(antithesis="do."),
            r"principle 1 \('a'\): `definition` and `antithesis` are the same",
        ),
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
    with pytest.raises(ValueError, match="already used"):
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
