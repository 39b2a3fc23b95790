import json
from itertools import count, pairwise

import pytest

from tests.codeclm.handmade import item, unkept, version, write_rows
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.export import export
from trl_extensions.codeclm.report import (
    collect,
    draw_coverage,
    draw_gaps,
    gap_bin,
    gap_width,
    in_numbers,
    verdict,
    write_codeclm_report,
)


_keys = count()


def call(step, engine="big", read=100, written=10, finish="stop"):
    reply = {"text": "x", "finish_reason": finish, "num_tokens": written, "num_prompt_tokens": read}
    return {"key": f"{next(_keys):032x}", "step": step, "engine": engine, "prompt": "p", "params": {}, "reply": reply}


CALLS = [
    *(call("encode") for _ in range(4)),
    *(call("score", read=300, written=5) for _ in range(10)),
    *(call("score:again", read=400, written=5) for _ in range(3)),
    call("answer", written=50, finish="length"),
    *(call("answer", "small", read=20, written=40) for _ in range(2)),
]


def basic(id, use_case, *skills):
    metadata = {"use_case": use_case, "skills": list(skills)}
    return {"id": id, "metadata": metadata, "seed": None, "instruction": "x"}


@pytest.fixture
def folder(tmp_path):
    """Two metadata; 7 asked for, 6 made, 5 finished: 2 kept (in rounds 2 and 1), 2 dropped, 1 set aside."""
    cook, tax = ("cooking", "heat", "time"), ("tax", "law", "time")
    write_rows(
        tmp_path / "metadata.jsonl",
        [
            {"use_case": "cooking", "skills": ["heat", "time"], "asked": 4, "seeds": ["s1", "s2"], "weight": 2.0},
            {"use_case": "tax", "skills": ["law", "time"], "asked": 3, "seeds": ["s3"], "weight": 1.0},
        ],
    )
    made = [basic(f"m0-i{i}", *cook) for i in range(3)] + [basic(f"m1-i{i}", *tax) for i in range(3)]
    write_rows(tmp_path / "basics.jsonl", made)
    (tmp_path / "basics.json").write_text('{"asked": 7, "made": 6, "dropped": {"near-duplicate": 3, "too short": 1}}')
    of_cook, of_tax = {"use_case": "cooking", "skills": cook[1:]}, {"use_case": "tax", "skills": tax[1:]}
    first, second = version("Boil an egg today", scores=(6, 5)), version("Boil an egg on top", "Up", scores=(9, 5))
    items = [
        item("m0-i0", first, second, **of_cook),
        unkept("m0-i1", version("Fry an egg today", scores=(5, 5)), version("Fry two", "x", scores=(2, 5)), **of_cook),
        unkept("m0-i2", version("Poach it now please"), outcome="set_aside", reason="score: no numbers", **of_cook),
        item("m1-i0", version("Explain the tax", scores=(2, 5.5), truncated=["strong"]), winner="target", **of_tax),
        unkept("m1-i1", version("Tax a shop today", scores=(8, 5)), **of_tax),
    ]
    write_rows(tmp_path / "items.jsonl", items)
    aside = {"raw": [], "reason": "no list"}
    # The third was finished in a later run
    abouts = (("decode", "m0/w0/1"), ("decode", "m0/w1/0"), ("answer", "m0-i1"))
    write_rows(tmp_path / "set_aside.jsonl", [aside | {"step": step, "about": about} for step, about in abouts])
    write_rows(tmp_path / "calls.jsonl", CALLS)
    (tmp_path / "settings.json").write_text('{"gap_threshold": 3.0}')
    return tmp_path


class TestStatistics:
    def test_funnel(self, folder):
        counts = collect(folder)
        assert [counts[name] for name in ("seeds", "metadata", "asked", "made", "items")] == [3, 2, 7, 6, 5]
        assert counts["basic_drops"] == {"near-duplicate": 3, "too short": 1}
        assert counts["outcomes"] == {"dropped": 2, "kept": 2, "set_aside": 1}
        assert counts["reasons"] == {"dropped": {"no gap": 2}, "set_aside": {"score: no numbers": 1}}
        assert counts["winners"] == {"strong": 1, "target": 1}
        assert counts["iterations"] == {1: 1, 2: 1}
        assert counts["versions"] == {1: 5, 2: 2} and counts["scored"] == {1: 4, 2: 2}
        assert counts["answers"] == {"strong": 6, "target": 6} and counts["truncated"] == {"strong": 1}

    def test_gaps_of_all_scored_rounds(self, folder):
        assert collect(folder)["gaps"] == {1: {-4: 1, 0: 1, 1: 1, 3: 1}, 2: {-3: 1, 4: 1}}

    @pytest.mark.parametrize(
        ("gap", "bin"),
        [
            (0, 0),
            (0.25, 1),
            (1, 1),
            (3, 3),
            (3.001, 4),
            (3.5, 4),
            (9, 9),
            (-0.5, -1),
            (-3, -3),
            (-3.5, -4),
            (8.1 - 5.1, 3),
        ],
    )
    def test_no_bin_has_both_kept_and_dropped(self, gap, bin):
        assert gap_bin(gap) == bin

    @pytest.mark.parametrize(
        ("threshold", "width"), [(3, 1), (3.0, 1), (2.5, 1.25), (0.1, 0.1), (0.7, 0.7), (0, 1), (None, 1), (True, 1)]
    )
    def test_bins_end_at_the_threshold(self, threshold, width):
        assert gap_width(threshold) == pytest.approx(width)

    def test_narrow_bins_for_a_small_threshold(self, folder):
        (folder / "settings.json").write_text('{"gap_threshold": 0.5}')
        counts = collect(folder)
        # The gaps are 1, 0, -3.5, 3, then 4, -3
        assert counts["gap_width"] == 0.5
        assert counts["gaps"] == {1: {-7: 1, 0: 1, 2: 1, 6: 1}, 2: {-6: 1, 8: 1}}

    def test_a_call_for_probabilities_is_not_cut_off(self, tmp_path):
        rows = [
            call("score_one", written=1, finish="length") | {"options": ["0", "1"]},
            call("answer", finish="length"),
        ]
        write_rows(tmp_path / "calls.jsonl", rows)
        assert {row["step"]: row["cut_off"] for row in collect(tmp_path)["steps"]} == {"score_one": 0, "answer": 1}

    def test_coverage(self, folder):
        export(folder, CodecLMConfig())  # the answer of m1-i0 that was cut off is not the one that is used
        counts = collect(folder)
        assert counts["exported"] == 2
        assert counts["use_cases"] == {
            "cooking": {"asked": 4, "made": 3, "kept": 1, "exported": 1},
            "tax": {"asked": 3, "made": 3, "kept": 1, "exported": 1},
        }
        assert next(iter(counts["skills"].items())) == ("time", {"asked": 7, "made": 6, "kept": 2, "exported": 2})
        assert set(counts["skills"]) == {"time", "heat", "law"}

    def test_calls_by_step_and_engine(self, folder):
        counts = collect(folder, {"big": (2.0, 10.0), "small": (1.0, 0.0)})
        steps = {(row["step"], row["engine"]): row for row in counts["steps"]}
        assert set(steps) == {("encode", "big"), ("score", "big"), ("answer", "big"), ("answer", "small")}
        score = steps["score", "big"]
        # 10 * 300 + 3 * 400 read, 13 * 5 written
        assert [score[name] for name in ("calls", "retried", "tokens_read", "tokens_written")] == [13, 3, 4200, 65]
        assert score["cost"] == pytest.approx((4200 * 2 + 65 * 10) / 1e6)
        assert steps["answer", "small"]["cost"] == pytest.approx(40 / 1e6)
        assert steps["answer", "big"]["cut_off"] == 1 and steps["encode", "big"]["cut_off"] == 0
        # encode 400 and 40, score 4200 and 65, answer 100 and 50, 40 and 80
        total = counts["calls"]
        assert (total["calls"], total["tokens_read"], total["tokens_written"]) == (20, 4740, 235)
        assert total["cost"] == pytest.approx((4700 * 2 + 155 * 10 + 40) / 1e6)

    def test_what_was_set_aside(self, folder):
        assert collect(folder)["set_aside"] == {"decode": {"no list": 2}, "score": {"no numbers": 1}}

    def test_an_empty_folder(self, tmp_path):
        counts = collect(tmp_path)
        assert counts["items"] == counts["made"] == counts["calls"]["calls"] == 0 and counts["asked"] is None


class TestReport:
    def test_the_verdict(self, folder):
        report = write_codeclm_report(folder, prices={"big": (1000.0, 0.0)})
        paragraph = report.read_text().split("\n\n")[1]
        assert "3 seeds and 2 metadata came 6 basic instructions, of which the run kept 2;" in paragraph
        assert "not exported yet" in paragraph and "Dropped: 2 (2 no gap)" in paragraph
        assert "Set aside: 1 (1 score: no numbers)" in paragraph and "to be finished: 1" in paragraph
        assert "20; they read 4,740 tokens and wrote 235, at a cost of 4.70." in paragraph

    def test_what_the_export_left_out_and_why_it_stopped(self, folder):
        export(folder, CodecLMConfig(max_words=4))
        text = write_codeclm_report(folder, stopped="the budget of 20 calls is spent").read_text()
        assert "kept 2; pairs in the data: 1." in text and "Left out by the export: 1 too long." in text
        assert "the budget of 20 calls is spent; the same command goes on" in text
        assert json.loads((folder / "report.json").read_text())["stopped"] == "the budget of 20 calls is spent"

    @pytest.mark.parametrize(
        ("outcomes", "change", "margin", "contradictions", "losses", "kind"),
        [
            ({"made": 9, "items": 8, "kept": 5}, None, None, 0, [], "unfinished"),
            ({"made": 0, "items": 0, "kept": 0}, None, None, 0, [], "nothing_kept"),
            ({"made": 9, "items": 9, "kept": 0}, None, None, 0, [], "nothing_kept"),
            ({}, None, None, 0, [], "pairs"),
            ({}, [-0.2, 0.1], [0.1, 0.3], 2, [2, 1], "better"),
            ({}, [-0.2, -0.1], [-0.3, -0.1], 2, [2, 1], "worse"),
            ({}, [-0.2, -0.1], [-0.3, 0.1], 28, [2, 1], "judge"),  # of 3 times 12 judged, 2 of them equal
            ({}, [-0.2, -0.1], [-0.3, 0.1], 15, [1, 2], "learned"),
            ({}, [-0.2, -0.1], None, 0, [2, 1], "learned"),
            ({}, [-0.2, 0.1], None, 0, [1, 2], "loss"),
            ({}, [0.1, 0.2], None, 0, [2, 1], "unclear"),
            ({}, [-0.2, 0.1], [-0.3, 0.1], 15, [2, 1], "unclear"),
            ({}, None, None, 0, [2, 1], "pairs"),
        ],
    )
    def test_what_came_of_it(self, outcomes, change, margin, contradictions, losses, kind):
        own = {"made": 9, "items": 9, "kept": 5} | outcomes
        counts = {"outcomes": {"kept": own["kept"]}, "made": own["made"], "items": own["items"], "exported": 5}
        held_out = {"change": {"interval": change}} if change else {}
        one = {"judged": 12, "equal": 2, "contradictions": contradictions / 3, "margin": {"interval": margin}}
        comparison = dict.fromkeys(("before", "after", "after_vs_before"), one) if margin else {}
        assert verdict(counts, held_out, comparison, [{"loss": loss} for loss in losses])[0] == kind

    def test_only_so_many_reasons_are_listed(self, folder):
        counts = collect(folder)
        counts["reasons"] = {"dropped": {f"r{n}": 10 - n for n in range(7)}}
        # 6 + 5 + 4 of the last three
        assert "(10 r0, 9 r1, 8 r2, 7 r3, 15 for other reasons)" in in_numbers(counts, {})

    def test_tables(self, folder):
        export(folder, CodecLMConfig(max_words=4))
        lines = write_codeclm_report(folder).read_text().splitlines()
        assert "| basic instructions asked for | 7 |  |" in lines
        assert "| finished | 5 | 83.3% (44 to 97) |" in lines  # Wilson's, of 5 in 6
        assert "| 1 | 5 | 4 | 1 | 25.0% (5 to 70) | 50.0% (9 to 91) |" in lines  # of the four that were scored
        assert "| 2 | 2 | 2 | 1 | 50.0% (9 to 91) | 50.0% (9 to 91) |" in lines
        assert "| basic instruction | near-duplicate | 3 |" in lines
        assert "| at the export | too long | 1 |" in lines
        # 10 asked, of which 3 a second time; of decode only what was set aside is known
        assert "| decode | 0 | n/a | 0 | 2 | 2 no list |" in lines
        assert "| score | 10 | 70.0% (40 to 89) | 3 | 1 | 1 no numbers |" in lines
        assert "| answer | big | 1 | 1 | 100 | 50 |" in lines and "| all |  | 20 | 1 | 4740 | 235 |" in lines
        assert "| cooking | 4 | 3 | 1 | 0 |" in lines and "| time | 7 | 6 | 2 | 1 |" in lines
        assert any("2 of 2 use cases" in line for line in lines) and any("3 of 3 skills" in line for line in lines)
        for name in ("gaps.png", "coverage.png"):
            assert (folder / name).read_bytes()[:4] == b"\x89PNG"
            assert any(f"]({name})" in line for line in lines)

    def test_samples_with_their_lineage(self, folder):
        rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
        rows[0]["rounds"][1]["answers"]["strong"] = "```python\nprint()\n```\n" + "long " * 500
        write_rows(folder / "items.jsonl", rows)
        export(folder, CodecLMConfig())
        text = write_codeclm_report(folder).read_text()
        assert text.count("````yaml\n") == 1 and text.count("\n```yaml\n") == 1
        assert "m0-i0: kept as version 2" in text and "m1-i0: kept as version 1" in text
        assert "exported as row 2 of data.jsonl" in text
        # 22 + 2,500 less the last space
        assert "[... 2521 characters]" in text

    def test_three_samples_from_all_over_the_data(self, tmp_path):
        texts = [" ".join(f"w{n}{i}" for i in range(6)) for n in range(9)]
        write_rows(tmp_path / "items.jsonl", [item(f"i{n}", version(t, scores=(9, 1))) for n, t in enumerate(texts)])
        export(tmp_path, CodecLMConfig())
        text = write_codeclm_report(tmp_path).read_text()
        assert [n for n in range(9) if f"\ni{n}: kept" in text] == [1, 4, 7]

    def test_the_comparison_of_models(self, folder):
        comparison = {
            "before": {"crr": 0.25, "interval": [0.1, 0.5], "ties": 3, "verdicts": {"a": 1}},
            "after": {"crr": 0.5, "interval": [0.3, 0.7], "ties": 4},
            "after_vs_before": {"win_rate": 0.625},
            "prompts": 20,
        }
        (folder / "comparison.json").write_text(json.dumps(comparison))
        text = write_codeclm_report(folder).read_text()
        assert "against the strong model on 20 prompts: 25.0% before and 50.0% after." in text
        assert "| before | 0.25 | 0.1 to 0.5 | 3 |  |" in text and "| after vs before |  |  |  | 0.625 |" in text
        assert "verdicts" not in text

    def test_how_far_the_judge_contradicts_itself(self, folder):
        comparison = {
            "before": {"crr": 1.0, "judged": 9, "equal": 8, "contradictions": 0},
            "after": {"crr": 1.0, "judged": 9, "equal": 1, "contradictions": 6},
            "after_vs_before": {"win_rate": 0.5, "judged": 9, "contradictions": 6},
            "answers": {"strong": {"mean_words": 5.0}},
        }
        (folder / "comparison.json").write_text(json.dumps(comparison))
        text = write_codeclm_report(folder).read_text()
        # 18 judgments against the strong model, 9 of them of equal answers
        assert "In 6 of 9 judgments of answers that differ, the judge" in text
        assert "| answers |" not in text

    def test_the_likelihood_of_pairs_that_were_held_out(self, folder):
        parts = {"before": (2.0, [1.5, 2.5]), "after": (1.75, [1.25, 2.25]), "change": (-0.25, [-0.5, 0.125])}
        held_out = {name: {"nats_per_token": nats, "interval": own} for name, (nats, own) in parts.items()}
        (folder / "held_out.json").write_text(json.dumps(held_out | {"rows": 2, "tokens": 99, "skipped": 0}))
        text = write_codeclm_report(folder).read_text()
        assert "training did not see (2)" in text
        assert "2.000 before, 1.750 after, a change of -0.250 (-0.500 to +0.125)." in text
        held_out["change"]["interval"] = None
        (folder / "held_out.json").write_text(json.dumps(held_out | {"rows": 1, "tokens": 9, "skipped": 0}))
        text = write_codeclm_report(folder).read_text()
        assert "training did not see (1)" in text and "a change of -0.250.\n" in text

    def test_what_is_kept_and_that_one_model_is_both(self, folder):
        text = write_codeclm_report(folder).read_text()
        assert "have scores, from 1 to 10, more than 3 apart." in text and "the same one" not in text
        settings = {"gap_threshold": 0.5, "scoring": "logprobs", "strong": "m", "target": "m"}
        (folder / "settings.json").write_text(json.dumps(settings))
        text = write_codeclm_report(folder).read_text()
        assert "as expected under the scorer's probabilities, more than 0.5 apart." in text
        assert "The strong model and the target are the same one" in text

    @pytest.mark.parametrize("content", ["{}", "[1]", "oops", '{"before": {"crr": null}, "after": "none"}'])
    def test_a_comparison_without_numbers(self, folder, content):
        (folder / "comparison.json").write_text(content)
        assert "Capacity recovery ratio" not in write_codeclm_report(folder).read_text()

    def test_a_run_that_was_not_scored(self, tmp_path):
        write_rows(tmp_path / "items.jsonl", [item("a", version("Only one here", answers={"strong": "yes"}))])
        text = write_codeclm_report(tmp_path).read_text()
        assert "gaps.png" not in text and not (tmp_path / "gaps.png").exists()

    def test_a_run_that_has_barely_begun(self, tmp_path):
        write_rows(tmp_path / "calls.jsonl", CALLS[:1])
        text = write_codeclm_report(tmp_path, stopped="interrupted").read_text()
        assert "0 metadata came 0 basic instructions" in text and "interrupted" in text
        assert "Calls of models: 1;" in text


class TestFigures:
    def test_gaps_lie_in_their_bins_stacked(self, tmp_path):
        gaps = {1: {-4: 2, -1: 1, 0: 5, 4: 1}, 2: {4: 3, 1: 2}}
        (axes,) = draw_gaps(gaps, 3.0, tmp_path / "g.png").axes
        bars = {(round(b.get_x() + b.get_width() / 2, 6), b.get_y()): b.get_height() for b in axes.patches}
        assert bars == {(-3.5, 0): 2, (-0.5, 0): 1, (0, 0): 5, (0.5, 0): 2, (3.5, 0): 1, (3.5, 1): 3}
        edges = sorted({(round(b.get_x(), 6), round(b.get_x() + b.get_width(), 6)) for b in axes.patches})
        assert all(end < start for (_, end), (start, _) in pairwise(edges))
        assert sorted(line.get_xdata()[0] for line in axes.lines) == [-3, 3]
        (small,) = draw_gaps({1: {-3: 1, 0: 1, 1: 2}}, 0.1, tmp_path / "g.png", 0.1).axes
        assert {round(b.get_x() + b.get_width() / 2, 6) for b in small.patches} == {-0.25, 0, 0.05}

    def test_coverage_sums_up_what_has_no_room(self, tmp_path):
        names = {f"use {n} costs $5_{n}": {"made": 100 - n, "kept": 10, "exported": 1} for n in range(30)}
        (axes,) = draw_coverage(names, tmp_path / "c.png").axes
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(labels) == 25 and labels[-1] == "6 others"
        widths = [[bar.get_width() for bar in container] for container in axes.containers]
        assert widths[0][:2] == [100, 99] and [own[-1] for own in widths] == [sum(range(71, 77)), 60, 6]
