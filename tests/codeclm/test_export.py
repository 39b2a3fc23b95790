import json
import random

import pytest
import yaml

from tests.codeclm.handmade import item, read_rows, unkept, version, write_rows
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.export import describe, export


EGGS = "How long does an egg take to boil soft?"
TAXES = "Explain how income tax is worked out for a small shop."
POEM = "Write a poem of four lines about the rain in spring."


def three_items():
    return [
        item(
            "m000-i0000",
            version(EGGS, scores=(6.0, 5.0)),
            version(EGGS + " Give the temperature as well.", "Ask for a number.", scores=(9.0, 4.5)),
            seed="How do I boil an egg?",
        ),
        unkept("m000-i0001", version("Never kept", scores=(5, 5)), seed="How do I fry an egg?"),
        item("m001-i0000", version(TAXES, scores=(3.0, 8.0)), use_case="tax", skills=["law", "sums"], winner="target"),
        item("m001-i0001", version(POEM, scores=(9.0, 1.0)), use_case="poetry", skills=[]),
    ]


def exported(folder, items, seed=0, layout="prompt_completion", **settings):
    write_rows(folder / "items.jsonl", items)
    report = export(folder, CodecLMConfig(**settings), seed, layout=layout)
    return report, read_rows(folder / "data.jsonl")


def ids(rows):
    return [row["lineage"]["id"] for row in rows]


def test_a_row_holds_the_kept_version_and_the_winners_answer(tmp_path):
    report, rows = exported(tmp_path, three_items())
    harder = EGGS + " Give the temperature as well."
    assert rows[0] == {
        "prompt": [{"role": "user", "content": harder}],
        "completion": [{"role": "assistant", "content": f"Strong on: {harder}"}],
        "metadata": {"use_case": "cooking", "skills": ["recipes"]},
        "scores": {"strong": 9.0, "target": 4.5, "gap": 4.5},
        "winner": "strong",
        "iteration": 2,
        "lineage": {
            "id": "m000-i0000",
            "seed": "How do I boil an egg?",
            "scoring": "text",
            "basic": EGGS,
            "rewrites": [{"action": "Ask for a number.", "instruction": harder}],
            "gaps": [1.0, 4.5],
        },
    }
    assert rows[1]["completion"][0]["content"] == f"Target on: {TAXES}"
    assert rows[1]["winner"] == "target" and rows[1]["lineage"]["rewrites"] == []
    assert ids(rows) == ["m000-i0000", "m001-i0000", "m001-i0001"]
    assert (report.items, report.kept, report.rows, report.reasons) == (4, 3, 3, {})
    assert report.path == tmp_path / "data.jsonl"
    assert "3 pairs of 3 kept, left out: none" in report.summary


def test_later_rounds_than_the_kept_one_are_not_told(tmp_path):
    rounds = [version(EGGS, scores=(9, 1)), version(TAXES, "Turn to taxes.", scores=(5, 5))]
    _, (row,) = exported(tmp_path, [item("m000-i0000", *rounds, iteration=1)])
    assert row["prompt"][0]["content"] == EGGS
    assert row["lineage"]["gaps"] == [8] and row["lineage"]["rewrites"] == []


def test_unscored_pairs(tmp_path):
    rounds = [version(EGGS), version(POEM, "Write in verse.", answers={"strong": "Rain"})]
    _, (row,) = exported(tmp_path, [item("m000-i0000", *rounds, scoring=None)])
    assert row["scores"] is None and row["lineage"]["gaps"] == [] and row["lineage"]["scoring"] is None
    assert row["completion"] == [{"role": "assistant", "content": "Rain"}]


def test_messages(tmp_path):
    _, rows = exported(tmp_path, three_items(), layout="messages")
    assert rows[2]["messages"] == [
        {"role": "user", "content": POEM},
        {"role": "assistant", "content": f"Strong on: {POEM}"},
    ]
    assert all("prompt" not in row and "completion" not in row for row in rows)
    with pytest.raises(ValueError, match=r"`layout` must be .*messages, got 'chatml'"):
        export(tmp_path, CodecLMConfig(), layout="chatml")


def many_items():
    draw = random.Random(5)
    words = [f"word{i}" for i in range(60)]
    items = []
    for number in range(60):
        text = " ".join(draw.choices(words, k=12))
        if number % 4 == 3:  # a near-duplicate of the one before
            text = items[-1]["rounds"][0]["instruction"] + " again"
        items.append(item(f"m{number % 3:03d}-i{number:04d}", version(text, scores=(9, draw.randint(1, 5)))))
    return items


def test_the_order_of_the_items_does_not_matter(tmp_path):
    items = many_items()
    write_rows(tmp_path / "metadata.jsonl", [{"use_case": "a", "skills": [], "seeds": ["word1 word2 word3 word4"]}])
    first, rows = exported(tmp_path, items, seed=3, max_rows=20, decontaminate_against=[])
    names = ("data.jsonl", "export.json", "export_drops.jsonl")
    contents = [(tmp_path / name).read_bytes() for name in names]
    assert len(rows) == 20 and 0 < first.reasons["near-duplicate"] < 16 and first.reasons["not drawn"] > 0
    for order in range(3):
        random.Random(order).shuffle(items)
        again, _ = exported(tmp_path, items, seed=3, max_rows=20)
        assert again == first
        assert [(tmp_path / name).read_bytes() for name in names] == contents


def test_numbers_in_ids_are_compared_as_numbers(tmp_path):
    texts = [f"{text} {number}" for number, text in enumerate((EGGS, TAXES, POEM))]
    order = ["m2-i9999", "m2-i10000", "m10-i0001"]
    items = [item(id, version(text, scores=(9, 1))) for id, text in zip(order, texts, strict=True)]
    assert ids(exported(tmp_path, items[::-1])[1]) == order


def test_rows_are_drawn_with_the_seed(tmp_path):
    items = many_items()
    report, rows = exported(tmp_path, items, dedup_threshold=1.0)
    assert (report.rows, report.reasons) == (60, {})
    draws = [ids(exported(tmp_path, items, seed=seed, max_rows=10, dedup_threshold=1.0)[1]) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    order = {id: place for place, id in enumerate(ids(rows))}
    for drawn in draws:
        assert len(drawn) == len(set(drawn)) == 10 and sorted(drawn, key=order.get) == drawn
    report, _ = exported(tmp_path, items, max_rows=10, dedup_threshold=1.0)
    assert (report.rows, report.reasons) == (10, {"not drawn": 50})
    assert exported(tmp_path, items, max_rows=60, dedup_threshold=1.0)[0].reasons == {}


def test_answers_that_are_cut_off_or_too_long(tmp_path):
    items = [
        item("a", version(EGGS, scores=(9, 1), truncated=["strong"])),
        item("b", version(TAXES, scores=(9, 1), truncated=["target"])),  # the answer that is not used
        item("c", version(POEM, scores=(9, 1), answers={"strong": "one two three four", "target": "-"})),
    ]
    report, rows = exported(tmp_path, items)
    assert ids(rows) == ["b", "c"] and report.reasons == {"cut off": 1}
    report, rows = exported(tmp_path, items, keep_truncated=True)
    assert ids(rows) == ["a", "b", "c"] and report.reasons == {}
    report, rows = exported(tmp_path, items, max_answer_words=3)
    assert ids(rows) == [] and report.reasons == {"answer too long": 2, "cut off": 1}
    assert exported(tmp_path, items, max_answer_words=4)[1][0]["lineage"]["id"] == "c"


def test_the_kept_version_is_filtered_not_the_basic_one(tmp_path):
    bench = tmp_path / "bench.jsonl"
    write_rows(bench, [{"prompt": "Who wrote this?"}, {"prompt": "What is the tax on a shop?"}])
    items = [
        item("a", version("Tell me what is the tax on a shop"), version(EGGS, "x", scores=(9, 1))),
        item("b", version(POEM), version("Say: what is the tax on a shop", "x", scores=(9, 1))),
        item("c", version(TAXES), version("too short", "x", scores=(9, 1))),
    ]
    report, rows = exported(tmp_path, items, decontaminate_against=[str(bench)])
    assert ids(rows) == ["a"]
    assert report.reasons == {"contaminated": 1, "too short": 1} and report.contaminated == {str(bench): 1}
    assert read_rows(tmp_path / "export_drops.jsonl") == [
        {"id": "b", "reason": "contaminated", "detail": f"{bench}, row 2"},
        {"id": "c", "reason": "too short", "detail": None},
    ]


def test_copies_of_seeds_and_of_each_other(tmp_path):
    seed, unused = "How do I make a good cup of tea at work?", "What is the best way to clean a bicycle chain?"
    write_rows(tmp_path / "metadata.jsonl", [{"use_case": "x", "skills": [], "seeds": [unused]}])
    items = [
        item("a", version(seed.lower(), scores=(9, 1)), seed=seed),
        item("b", version(EGGS, scores=(9, 1)), seed=seed),
        item("c", version(EGGS.upper(), scores=(9, 1)), seed=seed),
        item("d", version(unused, scores=(9, 1)), seed=seed),
        unkept("e", seed=TAXES),
        item("f", version(TAXES, scores=(9, 1)), seed=seed),
    ]
    report, rows = exported(tmp_path, items)
    assert ids(rows) == ["b"] and report.reasons == {"near-duplicate": 4}
    details = {row["id"]: row["detail"] for row in read_rows(tmp_path / "export_drops.jsonl")}
    assert details["c"] == "1.00 of b" and details["a"] == f"1.00 of the seed {seed!r}"


def test_the_screen(tmp_path):
    pytest.importorskip("profanity_check")
    rude = {"strong": "You are a fucking idiot.", "target": "-"}
    items = [item(f"i{n:03d}", version(f"{POEM} Take {n} of them.", scores=(9, 1))) for n in range(70)]
    items[66]["rounds"][0]["answers"] = items[5]["rounds"][0]["answers"] = rude
    report, rows = exported(tmp_path, items, dedup_threshold=1.0, screens="profanity")
    assert report.reasons == {"screened: profanity": 2}
    assert ids(rows) == [f"i{n:03d}" for n in range(70) if n not in (5, 66)]
    assert exported(tmp_path, items, dedup_threshold=1.0)[0].reasons == {}


def test_nothing_finished_yet_gives_an_empty_file(tmp_path):
    report, rows = exported(tmp_path, [])
    assert rows == [] and (report.items, report.rows) == (0, 0)


def test_a_half_written_last_line_is_left_out(tmp_path):
    write_rows(tmp_path / "items.jsonl", three_items())
    with open(tmp_path / "items.jsonl", "a") as file:
        file.write('{"id": "m009-i0000", "outcome": "ke')
    assert export(tmp_path, CodecLMConfig()).items == 4


def test_a_failed_export_leaves_the_last_one(tmp_path):
    exported(tmp_path, three_items())
    before = (tmp_path / "data.jsonl").read_bytes()
    broken = item("m003-i0000", version("Nobody ever answered this one."))
    with pytest.raises(ValueError, match=r"item 'm003-i0000' is kept, but lacks its version or the winner's answer"):
        exported(tmp_path, [*three_items(), broken])
    assert (tmp_path / "data.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_bad_items(tmp_path):
    with pytest.raises(ValueError, match=r"items\.jsonl is missing"):
        export(tmp_path, CodecLMConfig())
    with pytest.raises(ValueError, match="two items have the id 'm000-i0000'"):
        exported(tmp_path, three_items() + three_items()[:1])
    (tmp_path / "items.jsonl").write_text(json.dumps(three_items()[0]) + "\n{oops\n\n")
    with pytest.raises(ValueError, match=r"items\.jsonl: line 2 is not a JSON object"):
        export(tmp_path, CodecLMConfig())


def test_text_that_utf_8_cannot_hold(tmp_path):
    write_rows(tmp_path / "items.jsonl", [])
    broken = item("a", version(POEM, scores=(9, 1), answers={"strong": "Rain \ud83d", "target": "-"}))
    (tmp_path / "items.jsonl").write_text(json.dumps(broken) + "\n")
    export(tmp_path, CodecLMConfig())
    assert read_rows(tmp_path / "data.jsonl")[0]["completion"][0]["content"] == "Rain ?"


def test_loads_as_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    exported(tmp_path, three_items())
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "data.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(rows["winner"]) == ["strong", "target", "strong"]
    assert rows[1]["prompt"] == [{"role": "user", "content": TAXES}]
    assert rows[1]["metadata"] == {"use_case": "tax", "skills": ["law", "sums"]}


# The history of one


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


def read(text):
    """The lines in front of the YAML, and what is in it."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(("seed:", "metadata:")))
    return lines[:start], yaml.safe_load("\n".join(lines[start:]))


def test_from_seed_to_outcome(folder):
    export(folder, CodecLMConfig(min_words=4))
    said, shown = read(describe(folder, "m000-i0000"))
    assert said == [
        "m000-i0000: kept as version 2, with the strong model's answer", "exported as row 1 of data.jsonl"
    ]  # fmt: skip
    assert shown["seed"] == "How are eggs boiled?" and shown["metadata"]["skills"] == ["recipes", "physics"]
    first, second = shown["rounds"]
    assert first["truncated"] == {"strong": False, "target": True} and first["orders"] == [[8, 6], [6, 7]]
    assert second["action"] == "Move it up." and second["scores"]["gap"] == 5
    assert second["answers"]["strong"] == "Strong on: Boil an egg on a mountain\nand say why"
    assert "    Strong on: Boil an egg on a mountain\n" in describe(folder, "m000-i0000"), "as it is, without quotes"


def test_a_row_of_the_data_by_its_number(folder):
    with pytest.raises(ValueError, match=r"data\.jsonl has 0 rows, no row 1"):
        describe(folder, 1)
    export(folder, CodecLMConfig())
    assert describe(folder, 2) == describe(folder, "2") == describe(folder, "m001-i0001")
    assert "exported as row 2 of data.jsonl" in describe(folder, "2")
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"data.jsonl has 2 rows, no row {number}"):
            describe(folder, number)
    said, _ = read(describe(folder, "m001-i0000"))
    assert said[1] == "not exported: near-duplicate (1.00 of m000-i0000)"


def test_those_that_were_not_kept(folder):
    assert read(describe(folder, "m000-i0001"))[0] == ["m000-i0001: dropped: no gap"]
    said, shown = read(describe(folder, "m000-i0002"))
    assert said == ["m000-i0002: set aside: score: no numbers"]
    assert shown["raw"] == ["Both are great!", "Really, both."]
    said, shown = read(describe(folder, "m002-i0000"))
    assert "not finished yet" in said[0] and shown["instruction"] == "Explain how a tax works"
    assert shown["set_aside"]["reason"] == "the server is down" and shown["set_aside"]["raw"] == ["half a rep"]


def test_an_id_that_is_not_there(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no instruction 'm001-i001'; there is .*m001-i000\d") as error:
        describe(folder, "m001-i001")
    assert "\n" not in str(error.value)
    (tmp_path / "begun").mkdir()
    with pytest.raises(ValueError, match="not come to any"):
        describe(tmp_path / "begun", "m001-i0001")
    for row in (1, "m001-i0001"):
        with pytest.raises(ValueError, match=r"no folder .*elsewhere"):
            describe(tmp_path / "elsewhere", row)


def test_long_texts_are_cut_on_request(folder):
    _, shown = read(describe(folder, "m000-i0000", longest=10))
    first = shown["rounds"][0]
    assert first["instruction"] == "Boil an eg [... 22 characters]"
    assert first["answers"]["strong"] == "Strong on: [... 33 characters]".replace("on:", "on:")


def test_nothing_steers_the_terminal(folder):
    answers = {"strong": "a\r\nb\tc\x00é\u3000日本", "target": "-"}
    rude = version("Say \x1b[31mred\x07 \u202eback", scores=(9, 1), answers=answers)
    write_rows(folder / "items.jsonl", [item("m000-i0000", rude)])
    text = describe(folder, "m000-i0000")
    assert "[31mred" in text and "back" in text and "é" in text and "日本" in text
    assert all(character.isprintable() or character in "\n\t\u3000" for character in text)
