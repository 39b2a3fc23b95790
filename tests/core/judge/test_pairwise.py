"""The pairwise judge against rules: what wins, what is a tie, what is asked again, and what is never asked twice."""

import math
from dataclasses import replace

import pytest

from tests.core.judges import RuleJudge, shorter
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.judge.pairwise import CRITERION, Judgment, Pair, PairwiseJudge, summarise


PAIRS = [
    Pair("short", "Why?", "No.", "Because of this and that."),
    Pair("long", "Why?", "Because of this and that.", "Yes."),
    Pair("same length", "Why?", "abc", "xyz"),
    Pair("equal", "Why?", "abc", "abc \n"),
]


def judged(rule, pairs=PAIRS, again=None, **settings):
    engine = RuleJudge(rule, again)
    judge = PairwiseJudge(engine, **settings)
    return engine, judge, judge.judge(pairs)


class TestScores:
    def test_a_judge_that_prefers_the_shorter(self):
        engine, judge, found = judged(shorter)
        assert [own.id for own in found] == ["short", "long", "same length", "equal"]
        assert [own.winner for own in found] == ["first", "second", "tie", "tie"]
        assert [own.scores for own in found] == [(8, 4), (4, 8), (6, 6), None]
        assert [own.votes for own in found[:3]] == [("first", "first"), ("second", "second"), ("tie", "tie")]
        assert len(engine.questions) == 6 and judge.counts["calls"] == 6  # equal answers cost nothing
        assert engine.batches == 1

    def test_a_judge_of_places_makes_ties(self):
        # 9 for what stands first and 5 for what stands second: both have (9 + 5) / 2 = 7
        _, _, found = judged(lambda first, second: "9 5", PAIRS[:1])
        assert found == [Judgment("short", "tie", (7, 7), ("first", "second"))]
        assert found[0].contradicts

    def test_means_do_not_make_a_win(self):
        # 9 to 2 in one order, 5 to 6 in the other: 7.5 to 3.5 on average, but only one win
        replies = {("x", "y"): "9 2", ("y", "x"): "6 5"}
        _, _, [found] = judged(lambda *shown: replies[shown], [Pair("p", "q", "x", "y")])
        assert found.scores == (7, 4) and found.votes == ("first", "second") and found.winner == "tie"

    def test_a_win_and_a_tie_are_a_tie_without_contradiction(self):
        replies = {("x", "y"): "9 2", ("y", "x"): "5 5"}
        _, _, [found] = judged(lambda *shown: replies[shown], [Pair("p", "q", "x", "y")])
        assert found.winner == "tie" and not found.contradicts and found.scores == (7, 3.5)

    def test_both_orders_show_all_there_is(self):
        engine, _, _ = judged(shorter, [Pair("p", [{"role": "user", "content": "Why?"}], "x", "")])
        texts = sorted(question[0]["content"] for question in engine.questions)
        assert all("user: Why?" in text and CRITERION in text for text in texts)
        assert "<answer_1>\n(empty)\n</answer_1>\n\n<answer_2>\nx\n" in texts[0]
        assert "<answer_1>\nx\n</answer_1>\n\n<answer_2>\n(empty)\n" in texts[1]

    def test_answers_are_not_taken_for_templates(self):
        engine, _, _ = judged(shorter, [Pair("p", "{{ q }}", "{{ first }}", "{% if %}")])
        assert "{{ q }}" in engine.questions[0][0]["content"] and "{% if %}" in engine.questions[0][0]["content"]


class TestVerdict:
    def test_letters(self):
        def rule(first, second):
            return "tie" if len(first) == len(second) else "A" if len(first) < len(second) else "B"

        _, _, found = judged(rule, mode="verdict")
        assert [own.winner for own in found] == ["first", "second", "tie", "tie"]
        assert all(own.scores is None for own in found)

    def test_always_a(self):
        _, _, found = judged(lambda *_: "A", mode="verdict")
        assert [own.winner for own in found] == ["tie"] * 4
        counts = summarise(found)
        assert (counts["ties"], counts["equal"], counts["contradictions"]) == (4, 1, 3)
        assert counts["contradiction_share"] == 1.0 and counts["first_place_share"] == 1.0


class TestLogprobs:
    def test_by_hand(self):
        # p(A) = 0.6 / 0.8 where the shorter is first, 0.2 / 0.8 where it is second: 0.75 for it in both orders
        def rule(first, second):
            shares = (0.6, 0.2) if len(first) < len(second) else (0.2, 0.6)
            return [math.log(share) for share in shares]

        engine, judge, [found] = judged(rule, PAIRS[:1], mode="logprobs")
        assert found.winner == "first" and found.scores == pytest.approx((0.75, 0.25))
        assert engine.batches == 1 and judge.counts["low_mass"] == 0

    def test_places(self):
        # 0.9 for the first place: 0.9 and 0.1 for the first answer, 0.5 on average
        _, _, [found] = judged(lambda *_: [math.log(0.9), math.log(0.1)], PAIRS[:1], mode="logprobs")
        assert found.winner == "tie" and found.contradicts and found.scores == pytest.approx((0.5, 0.5))

    def test_little_and_no_probability(self):
        rare = {("x", "y"): [math.log(0.006), math.log(0.003)], ("y", "x"): [-math.inf, -math.inf]}
        _, judge, [found] = judged(lambda *shown: rare[shown], [Pair("p", "q", "x", "y")], mode="logprobs")
        assert judge.counts["low_mass"] == 2
        assert found.winner is None and found.votes == ("first", None) and found.scores is None
        assert found.reason == "neither A nor B is among the likeliest tokens"


def test_a_real_engine_in_both_orders(tmp_path, tiny_model_dir):
    """The preference is that of the model's own probabilities, read off a plain forward."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_extensions.core.generation import TransformersEngine

    path = tmp_path / "short.jinja"  # the tiny model reads 512 tokens
    path.write_text("{{ prompt }} {{ first }} or {{ second }}?")
    engine = TransformersEngine(tiny_model_dir)
    [found] = PairwiseJudge(engine, mode="logprobs", template=path).judge([Pair("p", "Which?", "tea", "rain")])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    shares = []
    for text in ("Which? tea or rain?", "Which? rain or tea?"):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        shares.append(logits[tokenizer.convert_tokens_to_ids(["A", "B"])].softmax(-1)[0].item())
    assert found.scores[0] == pytest.approx((shares[0] + 1 - shares[1]) / 2, abs=1e-5)
    assert found.votes == tuple("first" if share > 0.5 else "second" for share in (shares[0], 1 - shares[1]))
    [written] = PairwiseJudge(engine, template=path, params=GenerationParams(4)).judge([Pair("p", "q", "tea", "rain")])
    assert written.winner is None and len(written.raw) == 4  # a random model writes no scores


class TestUnreadable:
    def test_asked_again_once(self):
        engine, judge, found = judged(lambda *_: "both are great", PAIRS[:1], again=shorter)
        assert found == [Judgment("short", "first", (8, 4), ("first", "first"))]
        assert (judge.counts["calls"], judge.counts["retried"]) == (4, 2)
        assert engine.batches == 2
        _, said, again = engine.questions[-1]
        assert said == {"role": "assistant", "content": "both are great"}
        assert "there are no two scores" in again["content"] and "two whole numbers" in again["content"]

    def test_in_vain(self):
        replies = {("No.", "Because of this and that."): "hm"}
        _, judge, found = judged(lambda *shown: replies.get(shown, "3 9"), PAIRS[:2], again=lambda *_: "hm?")
        assert found[0].winner is None and found[0].votes == (None, "first") and found[0].raw == ("hm", "hm?")
        assert found[0].reason == "there are no two scores" and found[0].scores is None
        assert found[1].winner == "tie"
        assert summarise(found)["unread"] == 1 and judge.counts["retried"] == 1

    def test_cut_off(self):
        engine = RuleJudge(shorter)
        engine.generate = lambda prompts, params, seeds=None: (
            (index, Generation("9 1", "length", 3)) for index in range(len(prompts))
        )
        [found] = PairwiseJudge(engine, params=GenerationParams(3)).judge(PAIRS[:1])
        assert found.winner is None and "cut off at 3 tokens" in found.reason

    def test_failures_of_the_engine_are_not_swallowed(self):
        def refuse(*_):
            raise ValueError("prompt 0 is refused")

        with pytest.raises(ValueError, match="prompt 0 is refused"):
            judged(refuse)


class TestLog:
    @pytest.mark.parametrize("mode", ["scores", "logprobs"])
    def test_a_second_run_asks_nothing(self, tmp_path, mode):
        rule = shorter if mode == "scores" else lambda first, second: [-0.1, -3.0 - len(first)]
        with ResponseCache(tmp_path / "calls.sqlite") as log:
            _, first, found = judged(rule, mode=mode, log=log)
        with ResponseCache(tmp_path / "calls.sqlite") as log:
            engine, second, again = judged(rule, mode=mode, log=log)
            assert again == found and engine.questions == []
            assert (first.counts["calls"], second.counts["calls"], second.counts["reused"]) == (6, 0, 6)
            # another criterion, engine or length of the reply is another question
            engine, *_ = judged(rule, mode=mode, log=log, criterion="how short it is")
            assert len(engine.questions) == 6

    def test_retries_are_kept_too(self, tmp_path):
        for calls in (4, 0):
            with ResponseCache(tmp_path / "calls.sqlite") as log:
                _, judge, found = judged(lambda *_: "hm", PAIRS[:1], log=log)
            assert judge.counts["calls"] == calls and found[0].raw == ("hm",) * 4

    def test_what_was_answered_before_a_failure_is_kept(self, tmp_path):
        asked = []

        def three_times(first, second):
            asked.append(first)
            if len(asked) > 3:
                raise OSError("gone")
            return shorter(first, second)

        with ResponseCache(tmp_path / "calls.sqlite") as log, pytest.raises(OSError, match="gone"):
            judged(three_times, log=log)
        with ResponseCache(tmp_path / "calls.sqlite") as log:
            assert len(log) == 3
            engine, _, found = judged(shorter, log=log)
        assert len(engine.questions) == 3 and [own.winner for own in found] == ["first", "second", "tie", "tie"]

    def test_one_question_is_asked_once(self):
        engine, _, found = judged(shorter, [PAIRS[0], replace(PAIRS[0], id="other")])
        assert len(engine.questions) == 2 and found[0] == replace(found[1], id="short")


def test_summary_by_hand():
    found = [
        Judgment("1", "first", None, ("first", "first")),
        Judgment("2", "second", None, ("second", "second")),
        Judgment("3", "tie", None, ("first", "second")),  # the first place, twice
        Judgment("4", "tie", None, ("first", "tie")),  # the first place, once
        Judgment("5", "tie", None, ("tie", "tie"), "the answers are equal"),
        Judgment("6", None, None, (None, "second"), "no verdict", ("?", "?")),  # the first place, once
    ]
    assert summarise(found) == {
        "pairs": 6, "first": 1, "second": 1, "ties": 3, "unread": 1, "equal": 1, "contradictions": 1,
        # of 1 to 4; of eight preferences those of 1 and 2 are one each way: 1 + 1 + 2 + 1 + 1 of 8
        "contradiction_share": 0.25, "first_place_share": 0.75,
    }  # fmt: skip
    assert summarise([])["contradiction_share"] is None and summarise([])["first_place_share"] is None


class TestSettings:
    def test_template_of_the_user(self, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text("{{ prompt }}|<answer_1>\n{{ first }}\n</answer_1><answer_2>\n{{ second }}\n</answer_2>")
        engine, judge, found = judged(shorter, PAIRS[:1], template=path)
        assert engine.questions[0][0]["content"].startswith("Why?|") and found[0].winner == "first"
        assert judge.settings["template"] == path.read_text()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{{ first }} {{ secnd }}", "there is no 'secnd'; use criterion, first, prompt, second"),
            ("{{ first }}", "'second' is not in it"),
            ("{{ first }} {{ second", "line 1"),
        ],
    )
    def test_templates_that_cannot_be_used(self, tmp_path, text, message):
        path = tmp_path / "mine.jinja"
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            PairwiseJudge(RuleJudge(shorter), template=path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_missing_template(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            PairwiseJudge(RuleJudge(shorter), template=tmp_path / "none.jinja")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"mode": "score"}, "`mode` must be one of scores, verdict, logprobs"), ({"criterion": " "}, "is empty")],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PairwiseJudge(RuleJudge(shorter), **settings)
