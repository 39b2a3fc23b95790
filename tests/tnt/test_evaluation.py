"""The two axes, on rows small enough to count by hand."""

import json

import pytest

from trl_extensions.core.stats import bootstrap_ratio, wilson
from trl_extensions.tnt.evaluation import first_difference, preservation, unwanted


def row(index, text, *spans, sample=0, tokens=10, truncated=False):
    return {
        "id": f"q{index}-{sample}",
        "index": index,
        "sample": sample,
        "temperature": 0.0 if sample == 0 else 0.8,
        "prompt": [{"role": "user", "content": f"question {index}"}],
        "completion": [{"role": "assistant", "content": text}],
        "truncated": truncated,
        "num_tokens": tokens,
        "negative_spans": [list(span) for span in spans],
    }


class TestUnwanted:
    def test_one_output_a_prompt(self):
        rows = [row(0, "bad bad", (0, 3), (4, 7), tokens=5), row(1, "ok", tokens=20), row(2, "bad", (0, 3), tokens=15)]
        result = unwanted(rows)
        assert (result["n"], result["prompts"]) == (3, 3)
        assert result["share"]["value"] == pytest.approx(2 / 3)
        assert (result["share"]["low"], result["share"]["high"]) == wilson(2, 3)
        per_token = result["spans_per_1000_tokens"]
        assert per_token["value"] == pytest.approx(1000 * 3 / 40)
        low, high = bootstrap_ratio([2, 0, 1], [5, 20, 15])
        assert (per_token["low"], per_token["high"]) == pytest.approx((1000 * low, 1000 * high))

    def test_several_outputs_a_prompt_are_not_more_prompts(self):
        # Every prompt answered three times with the same text: the same knowledge as of one answer each.
        once = [row(0, "bad", (0, 3)), row(1, "fine", tokens=30), row(2, "good", tokens=20)]
        thrice = [r | {"sample": sample, "id": f"{r['id']}{sample}"} for r in once for sample in (1, 2, 3)]
        assert unwanted(thrice) == unwanted(once) | {"n": 9, "prompts": 3}
        assert unwanted(thrice)["share"]["high"] > wilson(3, 9)[1]

    def test_what_cannot_be_told_is_none(self):
        result = unwanted([row(0, "", tokens=0)])
        assert result["spans_per_1000_tokens"] == {"value": None, "low": None, "high": None}
        assert result["share"] == {"value": 0.0, "low": 0.0, "high": wilson(0, 1)[1]}
        assert "NaN" not in json.dumps(result)

    def test_rows_that_cannot_be_counted(self):
        bare = {key: value for key, value in row(7, "text").items() if key != "negative_spans"}
        with pytest.raises(ValueError, match=r"rows: row 1 \(id 'q7-0'\) has no 'negative_spans'; "):
            unwanted([row(0, "text"), bare])
        with pytest.raises(ValueError, match="rows is empty"):
            unwanted([])


class TestPreservation:
    def test_by_hand(self):
        before = [
            row(0, "the cat sat on a mat", tokens=6),
            row(1, "w x y z", tokens=4, truncated=True),
            row(2, "bad thing", (0, 3), tokens=2),
        ]
        after = [
            row(2, "good thing", tokens=3, truncated=True),
            row(1, "w  x y z ", tokens=4, truncated=True),
            row(0, "the cat sat on the mat", tokens=8),
        ]
        result = preservation(before, after)
        clean = result["clean"]
        assert (clean["n"], clean["unmatched"]) == (2, 0)
        low, high = wilson(1, 2)
        assert clean["exact_match"] == {"value": 0.5, "low": low, "high": high}
        # n-grams of both texts pooled, as derived in tests/core/test_text_metrics.py
        assert clean["bleu"] == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** (1 / 4))
        assert clean["rouge_l"] == pytest.approx((5 / 6 + 1) / 2)  # "the cat sat on mat": 5 of 6, both ways
        assert clean["first_difference"] == pytest.approx((4 / 6 + 1) / 2)
        # over all three of each side
        assert result["original"] == {
            "n": 3, "seq_rep_4": 0.0, "distinct_2": 1.0, "length": 4.0, "truncated": pytest.approx(1 / 3)
        }  # fmt: skip
        assert result["patched"]["length"] == 5.0 and result["patched"]["truncated"] == pytest.approx(2 / 3)
        json.dumps(result, allow_nan=False)

    def test_the_reference_is_the_original(self):
        # BLEU is not symmetric: the patched text is half as long, so it is the one penalised.
        result = preservation([row(0, "a b c d e f g h")], [row(0, "a b c d")])
        assert result["clean"]["bleu"] == pytest.approx(100 * 2.718281828 ** (1 - 8 / 4))
        assert result["clean"]["first_difference"] == 0.5

    def test_repetition_is_seen_on_its_side(self):
        result = preservation([row(0, "a b c d e")], [row(0, "a b c d a b c d")])
        assert (result["original"]["seq_rep_4"], result["patched"]["seq_rep_4"]) == (0.0, pytest.approx(1 / 5))
        assert result["patched"]["distinct_2"] == pytest.approx(4 / 7)

    def test_random_samples_are_described_and_not_compared(self):
        before = [row(0, "a b"), row(0, "c d", sample=1, tokens=30)]
        after = [row(0, "a b"), row(0, "x y", sample=1, tokens=50)]
        result = preservation(before, after)
        assert (result["clean"]["n"], result["clean"]["exact_match"]["value"]) == (1, 1.0)
        assert (result["original"]["length"], result["patched"]["length"]) == (20.0, 30.0)

    def test_unmatched_outputs_are_counted(self):
        result = preservation([row(0, "a"), row(1, "b"), row(2, "c")], [row(1, "b"), row(9, "z")])
        assert (result["clean"]["n"], result["clean"]["unmatched"]) == (1, 2)

    def test_nothing_clean(self):
        result = preservation([row(0, "bad", (0, 3))], [row(0, "good")])
        clean = result["clean"]
        assert clean["n"] == 0 and clean["exact_match"] == {"value": None, "low": None, "high": None}
        assert clean["bleu"] is clean["rouge_l"] is clean["first_difference"] is None

    def test_rows_of_different_prompts(self):
        with pytest.raises(ValueError, match=r"none of the original's 1 greedy outputs \(such as 'q0-0'\)"):
            preservation([row(0, "a")], [row(1, "a")])
        other = row(0, "a") | {"prompt": "something else"}
        with pytest.raises(ValueError, match="row 'q0-0': the prompt differs"):
            preservation([row(0, "a")], [other])
        with pytest.raises(ValueError, match="patched_rows: id 'q0-0' occurs twice"):
            preservation([row(0, "a")], [row(0, "a"), row(0, "b")])


@pytest.mark.parametrize(
    ("original", "patched", "expected"),
    [
        ("a b c d", "a b x d", 0.5),
        ("a b c d", "x", 0.0),
        ("a b c d", "a", 0.25),
        ("a b", "a b c", 1.0),
        ("a b", "a\nb ", 1.0),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_first_difference(original, patched, expected):
    assert first_difference(original, patched) == expected
