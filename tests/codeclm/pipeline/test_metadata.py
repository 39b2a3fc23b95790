import json
import random

import pytest
import yaml

from trl_extensions.codeclm.pipeline.metadata import (
    Metadata,
    allocate,
    load_metadata,
    merge_metadata,
    sample_pairings,
    write_metadata,
)


TRIP = Metadata("planning a trip", ("geography", "budgeting"))
EGGS = Metadata("frying eggs", ("cooking",))


def write(tmp_path, text, name="m.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "m.yaml"
    tricky = Metadata("Übersetzen: «de» # fr", ("yes", "1.5", "'quotes'"))
    write_metadata(path, [(TRIP, 3), (EGGS, 1.0), (tricky, 0.5)])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "Übersetzen" in text
    assert yaml.safe_load(text)[1] == {"use_case": "frying eggs", "skills": ["cooking"]}
    assert load_metadata(path, 3) == [(TRIP, 3), (EGGS, 1), (tricky, 0.5)]
    write_metadata(path, [TRIP])
    assert load_metadata(path) == [(TRIP, 1)]


def test_json_lines_and_json(tmp_path):
    rows = [{"use_case": " planning  a trip", "skills": ["geography", "budgeting "], "weight": 2}]
    lines = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "m.jsonl")
    whole = write(tmp_path, json.dumps({"metadata": rows}), "m.json")
    assert load_metadata(lines) == load_metadata(whole) == [(TRIP, 2)]


GOOD = "- {use_case: frying eggs, skills: [cooking]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no metadata"),
        ("- a: [", "not YAML"),
        ("use_case: frying eggs\nskills: [cooking]", "expected a list of entries, got dict"),
        (GOOD + "- just text", "row 2: expected `use_case` and `skills`"),
        (GOOD + "- {use_case: sleeping}", r"row 2 \('sleeping'\): there are no `skills`"),
        (GOOD + "- {use_case: sleeping, skills: []}", "row 2 .*there are no `skills`"),
        (GOOD + "- {use_case: sleeping, skills: patience}", "row 2 .*`skills` is one text; write a list"),
        (GOOD + "- {use_case: sleeping, skills: [1]}", "row 2 .*the skill 1 is no text"),
        (GOOD + "- {use_case: sleeping, skills: ['']}", "row 2 .*the skill '' is empty"),
        (GOOD + "- {use_case: sleeping, skills: [a, b, c, d]}", "row 2 .*4 skills, but `max_skills` is 3"),
        (GOOD + "- {use_case: sleeping, skills: [rest, Rest]}", "row 2 .*the skill 'Rest' is there twice"),
        (GOOD + "- {use_case: ' ', skills: [rest]}", "row 2: `use_case` is empty"),
        (GOOD + "- {skills: [rest]}", "row 2: `use_case` is empty"),
        (GOOD + "- {use_case: 7, skills: [rest]}", "row 2: `use_case` is 7, not text"),
        (GOOD + "- {use_case: sleeping, skills: [rest], weight: 0}", "row 2 .*`weight` is 0"),
        (GOOD + "- {use_case: sleeping, skills: [rest], weight: .nan}", "row 2 .*`weight` is nan"),
        (GOOD + "- {use_case: sleeping, skills: [rest], weight: true}", "row 2 .*`weight` is True"),
        (GOOD + "- {use_case: sleeping, skill: [rest]}", "row 2: unknown field 'skill'"),
        (
            GOOD + "- {use_case: x, skills: [y]}\n- {use_case: Frying Eggs, skills: [Cooking]}",
            "rows 1 and 3 are the same",
        ),
    ],
)  # fmt: skip
def test_bad_files_give_one_clear_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_metadata(path, 3)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_metadata(tmp_path / "m.yaml")


def test_equal_metadata_are_merged_with_their_seeds():
    same = Metadata("Planning  a trip", ("Budgeting", "geography"))
    other = Metadata("planning a trip", ("geography",))
    merged = merge_metadata([(TRIP, "s1"), (EGGS, "s2"), (same, "s3"), (other, "s4")])
    assert [(entry.metadata, entry.seeds, entry.count) for entry in merged] == [
        (TRIP, ("s1", "s3"), 2),
        (EGGS, ("s2",), 1),
        (other, ("s4",), 1),
    ]
    assert merge_metadata([]) == []


@pytest.mark.parametrize(
    ("counts", "total", "how", "numbers"),
    [
        ([1, 1, 1], 9, "equal", [3, 3, 3]),
        ([5, 1, 1], 8, "equal", [3, 3, 2]),
        ([5, 1, 1], 2, "equal", [1, 1, 0]),
        ([3, 1], 8, "proportional", [6, 2]),
        # quotas 4.29, 2.86, 2.86: one over after 4 + 2 + 2 goes to each of the two larger remainders
        ([3, 2, 2], 10, "proportional", [4, 3, 3]),
        # quotas 2.5 and 2.5: the earlier one
        ([1, 1], 5, "proportional", [3, 2]),
        # quotas 9.8, 0.1, 0.1: the two small ones get one each, and the first the rest
        ([98, 1, 1], 10, "proportional", [8, 1, 1]),
        # quotas 1.98, 1.98, 0.04 give 2, 2, 0; the last gets one, and 3 are left for two
        ([49, 49, 2], 4, "proportional", [2, 1, 1]),
        ([0.5, 0.25, 0.25], 4, "proportional", [2, 1, 1]),
        ([7], 3, "proportional", [3]),
        ([1, 2], 0, "equal", [0, 0]),
        # too few for all: quotas 1.6, 0.2, 0.2
        ([8, 1, 1], 2, "proportional", [2, 0, 0]),
    ],
)
def test_allocation_by_hand(counts, total, how, numbers):
    assert allocate(counts, total, how) == numbers


def test_allocations_sum_to_the_total_and_keep_the_order_of_counts():
    generator = random.Random(0)
    for _ in range(300):
        counts = [generator.randint(1, 40) for _ in range(generator.randint(1, 12))]
        total = generator.randint(0, 60)
        numbers = allocate(counts, total, "proportional")
        assert sum(numbers) == total
        assert min(numbers) >= (total >= len(counts))
        assert all(
            n >= m for c, n in zip(counts, numbers, strict=True) for d, m in zip(counts, numbers, strict=True) if c > d
        )


@pytest.mark.parametrize(
    ("counts", "total", "how", "message"),
    [
        ([], 3, "equal", "there must be metadata"),
        ([1, 0], 3, "proportional", "count above 0"),
        ([1, float("nan")], 3, "proportional", "count above 0"),
        ([1], -1, "equal", "0 or more"),
        ([1], 1, "fair", "'fair'"),
    ],
)
def test_bad_allocations(counts, total, how, message):
    with pytest.raises(ValueError, match=message):
        allocate(counts, total, how)


def test_sampled_pairings():
    metadata = [TRIP, EGGS, Metadata("sleeping", ("rest", "patience", "quiet"))]
    pool = {"geography", "budgeting", "cooking", "rest", "patience", "quiet"}
    drawn = sample_pairings(metadata, max_skills=2, seed=1)
    assert [entry.use_case for entry in drawn] == ["planning a trip", "frying eggs", "sleeping"]
    assert [len(entry.skills) for entry in drawn] == [2, 1, 2]
    assert all(set(entry.skills) <= pool and len(set(entry.skills)) == len(entry.skills) for entry in drawn)
    assert drawn == sample_pairings(metadata, max_skills=2, seed=1)
    # over many seeds every skill comes to every use case
    many = [sample_pairings(metadata, max_skills=2, seed=seed)[1].skills[0] for seed in range(200)]
    assert set(many) == pool


def test_more_pairings_than_use_cases_differ_while_there_are_skills():
    metadata = [EGGS, Metadata("sleeping", ("rest",)), Metadata("flying", ("Cooking",))]
    drawn = sample_pairings(metadata, 6, max_skills=3, seed=0)
    assert [entry.use_case for entry in drawn] == ["frying eggs", "sleeping", "flying"] * 2
    assert len({entry.key for entry in drawn}) == 6  # two skills, three use cases: these are all
    assert len(sample_pairings(metadata, 8, max_skills=3, seed=0)) == 8
    assert sample_pairings([], max_skills=3) == []
