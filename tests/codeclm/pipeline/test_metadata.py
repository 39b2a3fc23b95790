import json
import random

import pytest
import yaml

from trl_extensions.codeclm.pipeline.metadata import (
    Metadata,
    Origin,
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
    origins = [Origin(TRIP, 3), Origin(EGGS), Origin(tricky, 0.5)]
    write_metadata(path, origins)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "Übersetzen" in text
    assert yaml.safe_load(text)[1] == {"use_case": "frying eggs", "skills": ["cooking"]}
    assert load_metadata(path, 3) == origins


def test_json_lines_and_json(tmp_path):
    rows = [{"use_case": " planning  a trip", "skills": ["geography", "budgeting "], "weight": 2}]
    lines = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "m.jsonl")
    whole = write(tmp_path, json.dumps({"metadata": rows}), "m.json")
    assert load_metadata(lines) == load_metadata(whole) == [Origin(TRIP, 2)]


GOOD = "- {use_case: frying eggs, skills: [cooking]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no metadata"),
        ("- a: [", "not YAML"),
        ("use_case: frying eggs\nskills: [cooking]", "expected a list of entries, got dict"),
        (GOOD + "- just text", "row 2: .*`use_case`"),
        (GOOD + "- {use_case: sleeping}", "row 2: `skills`.*required"),
        (GOOD + "- {use_case: sleeping, skills: []}", "row 2: `skills`.*at least 1 item"),
        (GOOD + "- {use_case: sleeping, skills: patience}", "row 2: `skills`.*valid list, got 'patience'"),
        (GOOD + "- {use_case: sleeping, skills: [1]}", r"row 2: `skills\.0`.*string, got 1"),
        (GOOD + "- {use_case: sleeping, skills: ['']}", r"row 2: `skills\.0`.*at least 1 character"),
        (GOOD + "- {use_case: sleeping, skills: [a, b, c, d]}", "row 2: 4 `skills`, but `max_skills` is 3"),
        (GOOD + "- {use_case: sleeping, skills: [rest, Rest]}", "row 2: one of `skills` is there twice"),
        (GOOD + "- {use_case: ' ', skills: [rest]}", "row 2: `use_case`.*at least 1 character"),
        (GOOD + "- {skills: [rest]}", "row 2: `use_case`.*required"),
        (GOOD + "- {use_case: 7, skills: [rest]}", "row 2: `use_case`.*string, got 7"),
        (GOOD + "- {use_case: sleeping, skills: [rest], weight: 0}", "row 2: `weight`.*greater than 0, got 0"),
        (GOOD + "- {use_case: sleeping, skills: [rest], weight: .nan}", "row 2: `weight`.*got nan"),
        (GOOD + "- {use_case: sleeping, skills: [rest], weight: true}", "row 2: `weight`.*number, got True"),
        (GOOD + "- {use_case: sleeping, skill: [rest]}", "row 2: `skills`.*required"),
        (GOOD + "- {use_case: sleeping, skills: [rest], wait: 3}", "row 2: `wait`.*not permitted, got 3"),
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
    assert merged == [Origin(TRIP, 2, ("s1", "s3")), Origin(EGGS, 1, ("s2",)), Origin(other, 1, ("s4",))]
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


def test_sampled_pairings():
    origins = [Origin(TRIP, 2.0, ("s",)), Origin(EGGS), Origin(Metadata("sleeping", ("rest", "patience", "quiet")))]
    pool = {"geography", "budgeting", "cooking", "rest", "patience", "quiet"}
    drawn = sample_pairings(origins, max_skills=2, seed=1)
    assert (drawn[0].weight, drawn[0].seeds) == (2.0, ("s",))
    skills = [own.metadata.skills for own in drawn]
    assert [own.metadata.use_case for own in drawn] == ["planning a trip", "frying eggs", "sleeping"]
    assert [len(own) for own in skills] == [2, 1, 2]
    assert all(set(own) <= pool and len(set(own)) == len(own) for own in skills)
    assert drawn == sample_pairings(origins, max_skills=2, seed=1)
    # over many seeds every skill comes to every use case
    many = [sample_pairings(origins, max_skills=2, seed=seed)[1].metadata.skills[0] for seed in range(200)]
    assert set(many) == pool


def test_pairings_differ_while_there_are_skills():
    origins = [Origin(Metadata("a", ("x",))), Origin(Metadata("a", ("y",))), Origin(Metadata("a", ("z",)))]
    for seed in range(20):
        assert len({own.metadata.key for own in sample_pairings(origins, max_skills=3, seed=seed)}) == 3
    same = [Origin(Metadata("a", ("x",)))] * 2
    assert len(sample_pairings(same, max_skills=3)) == 2, "there is only one"
    assert sample_pairings([], max_skills=3) == []
