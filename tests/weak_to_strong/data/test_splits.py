"""Halves and slices: whole groups, balanced classes, sizes, repeatable."""

from collections import Counter
from pathlib import Path

import pytest

from trl_extensions.weak_to_strong.data.examples import Example, Pair, load_examples, split_halves, take_slice


DATA = Path(__file__).resolve().parents[4] / "shared/data"


def plain(n, classes=2):
    return [Example(str(i), f"t{i}", i % classes) for i in range(n)]


def grouped(sizes):
    return [Example(f"{g}-{i}", "t", i % 2, f"g{g}") for g, size in enumerate(sizes) for i in range(size)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.5, 0.2, 0.85])
def test_every_class_is_split_by_the_share(seed, share):
    rows = [Example(str(i), "t", label) for i, label in enumerate([0] * 67 + [1] * 31 + [2] * 3 + [None] * 40)]
    first, second = split_halves(rows, share=share, seed=seed)
    assert sorted(first + second, key=rows.index) == rows
    assert abs(len(first) - share * len(rows)) <= 1
    counts = Counter(row.label for row in first)
    for label, size in Counter(row.label for row in rows).items():
        assert abs(counts[label] - share * size) <= 1


def test_the_odd_row_goes_to_either_side():
    assert {len(split_halves(plain(3), seed=seed)[0]) for seed in range(20)} == {1, 2}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_no_group_is_on_both_sides(seed, share):
    rows = grouped([1, 2, 3, 5, 8, 13, 21, 1, 1, 4, 4, 4, 9, 9, 6, 6])
    first, second = split_halves(rows, share=share, seed=seed)
    assert not {row.group for row in first} & {row.group for row in second}
    assert len(first) + len(second) == len(rows)
    assert abs(len(first) - share * len(rows)) <= 4  # 97 rows, many small groups


def test_one_group_cannot_be_split_and_rows_without_one_stand_alone():
    rows = grouped([50])
    with pytest.raises(ValueError, match=r"all 50 rows are of group 'g0'.*no group column"):
        split_halves(rows, seed=0)
    mixed = rows[:10] + plain(10)
    first, _ = split_halves(mixed, seed=0)
    assert len(first) == 10 and len({row.group for row in rows[:10] if row in first}) <= 1


def test_a_slice_of_few_large_groups_takes_one():
    held, rest = take_slice(grouped([30, 40, 30]), 0.1, seed=0)
    assert len(held) == 30 and len({row.group for row in rest}) == 2


def test_repeatable_and_dependent_on_the_seed():
    rows = plain(60)
    assert split_halves(rows, seed=3) == split_halves(rows, seed=3) != split_halves(rows, seed=4)
    groups = grouped([3] * 20)
    assert split_halves(groups, seed=3) == split_halves(groups, seed=3) != split_halves(groups, seed=4)
    first, _ = split_halves(rows, seed=3)
    assert [int(row.id) for row in first] == sorted(int(row.id) for row in first)


def test_pairs_are_split_too():
    rows = [Pair(str(i), "a", "b", i % 2, f"g{i // 4}") for i in range(40)]
    first, second = split_halves(rows, seed=0)
    assert len(first) == len(second) == 20


def test_a_slice_is_not_the_same_draw_as_the_halves():
    rows = plain(100)
    held, rest = take_slice(rows, 0.2, seed=0)
    assert len(held) == 20 and len(rest) == 80 and not set(held) & set(rest)
    assert take_slice(rows, 0.5, seed=0) != split_halves(rows, seed=0)
    held, rest = take_slice(grouped([2] * 50), 0.2, seed=0)
    assert not {row.group for row in held} & {row.group for row in rest} and len(held) == 20


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [(10, 0.0, "between 0 and 1"), (10, 1, "between 0 and 1"), (1, 0.5, "at least two"), (3, 0.01, "leaves one part")],
)
def test_bad_requests(rows, share, message):
    with pytest.raises(ValueError, match=message):
        split_halves(plain(rows), share=share, seed=0)


def test_real_groups():
    path = DATA / "legalbench/privacy_policy_qa.jsonl.gz"
    if not path.is_file():
        pytest.skip("privacy_policy_qa is not beside this checkout (shared/data)")
    rows, _ = load_examples(path, group_column="question_id", limit=3000)
    first, second = split_halves(rows, seed=0)
    assert not {row.group for row in first} & {row.group for row in second}
    assert abs(len(first) - 1500) < 15
