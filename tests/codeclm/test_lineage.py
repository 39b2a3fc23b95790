import pytest

from tests.codeclm.handmade import item, unkept, version, write_rows
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.export import export
from trl_extensions.codeclm.lineage import describe


@pytest.fixture
def folder(tmp_path):
    rounds = [
        version("Boil an egg now please", scores=(7.0, 6.5), orders=[[8, 6], [6, 7]], truncated=["target"]),
        version("Boil an egg on a mountain\nand say why", "Move it up.", scores=(9.0, 4.0), orders=[[9, 3], [9, 5]]),
    ]
    items = [
        item("m000-i0000", *rounds, seed="How are eggs boiled?", skills=["recipes", "physics"]),
        unkept("m000-i0001", version("Never mind the gap here", scores=(5, 5))),
        unkept(
            "m000-i0002",
            version("Scored by a friendly one"),
            outcome="set_aside",
            reason="score: no numbers",
            raw=["Both are great!", "Really, both."],
        ),
        item("m001-i0000", version("boil an egg on a mountain and say why", scores=(9, 1))),
        item("m001-i0001", version("Write a poem about the rain", scores=(1, 9)), winner="target"),
    ]
    write_rows(tmp_path / "items.jsonl", items)
    unfinished = {"id": "m002-i0000", "metadata": {"use_case": "tax", "skills": ["law"]}, "seed": None}
    write_rows(tmp_path / "basics.jsonl", [unfinished | {"instruction": "Explain how a tax works"}])
    aside = {"step": "rewrite", "about": "m002-i0000", "reason": "the server is down", "raw": ["half a rep"]}
    write_rows(tmp_path / "set_aside.jsonl", [aside, aside | {"about": "m001-i0000", "reason": "of another one"}])
    return tmp_path


def test_from_seed_to_outcome_in_order(folder):
    export(folder, CodecLMConfig(min_words=4))
    assert (
        describe(folder, "m000-i0000")
        == """\
m000-i0000: kept in round 2, with the strong model's answer
seed
    How are eggs boiled?
metadata
    use case: cooking
    skills: recipes; physics
round 1, basic instruction
    Boil an egg now please
    strong answer
        Strong on: Boil an egg now please
    target answer (cut off)
        Target on: Boil an egg now please
    scores
        strong shown first: strong 8, target 6
        target shown first: strong 6, target 7
        mean: strong 7, target 6.5, gap 0.5
round 2
    Boil an egg on a mountain
    and say why
    action that led to it
        Move it up.
    strong answer
        Strong on: Boil an egg on a mountain
        and say why
    target answer
        Target on: Boil an egg on a mountain
        and say why
    scores
        strong shown first: strong 9, target 3
        target shown first: strong 9, target 5
        mean: strong 9, target 4, gap 5
outcome
    kept in round 2, with the strong model's answer
    exported as row 1 of data.jsonl
"""
    )


def test_a_row_of_the_data_by_its_number(folder):
    with pytest.raises(ValueError, match=r"holds no data.jsonl: give the folder of a run"):
        describe(folder, 1)
    export(folder, CodecLMConfig())
    assert describe(folder, 2) == describe(folder, "2") == describe(folder, "m001-i0001")
    assert "exported as row 2 of data.jsonl" in describe(folder, "2")
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"data.jsonl has 2 rows, no row {number}"):
            describe(folder, number)


def test_why_a_kept_one_is_not_in_the_data(folder):
    assert describe(folder, "m001-i0000").endswith("    not exported yet\n")
    export(folder, CodecLMConfig())
    assert describe(folder, "m001-i0000").endswith("    not exported: near-duplicate (1.00 of m000-i0000)\n")


def test_dropped(folder):
    text = describe(folder, "m000-i0001")
    assert text.startswith("m000-i0001: dropped: no gap\nseed\n    (none)\n")
    assert "mean: strong 5, target 5, gap 0" in text and text.endswith("outcome\n    dropped: no gap\n")


def test_set_aside_with_its_replies(folder):
    text = describe(folder, "m000-i0002")
    assert text.startswith("m000-i0002: set aside: score: no numbers\n")
    assert text.count("a reply that could not be read\n") == 2
    assert "    Both are great!\n" in text and "    Really, both.\n" in text


def test_unfinished(folder):
    text = describe(folder, "m002-i0000")
    assert text.startswith("m002-i0000: not finished yet")
    assert "use case: tax\n    skills: law\n" in text and "    Explain how a tax works\n" in text
    assert "step rewrite: the server is down" in text and "    half a rep\n" in text
    assert "of another one" not in text


def test_unknown(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no instruction 'm001-i001'; the closest ids are m001-i000\d, m001-i000\d,"
    ) as e:
        describe(folder, "m001-i001")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="holds no instructions yet"):
        describe(tmp_path / "elsewhere", "m001-i0001")


def test_long_texts_are_cut_on_request(folder):
    text = describe(folder, "m000-i0000", longest=10)
    assert "    Boil an eg [... 22 characters]\n" in text and "Boil an egg" not in text
    assert "        Strong on: [... 33 characters]\n" in text
    assert "use case: cooking\n" in text and "mean: strong 7, target 6.5, gap 0.5\n" in text


def test_nothing_steers_the_terminal(folder):
    rude = version(
        "Say \x1b[31mred\x07 \u202eback", scores=(9, 1), answers={"strong": "a\r\nb\tc\x00é\u3000", "target": "-"}
    )
    write_rows(folder / "items.jsonl", [item("m000-i0000", rude)])
    text = describe(folder, "m000-i0000")
    assert "    Say \\u001b[31mred\\u0007 \\u202eback\n" in text
    assert "        a\n        b\tc\\u0000é\n" in text
    assert all(character.isprintable() or character in "\n\t" for character in text)
