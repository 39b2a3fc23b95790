"""The pairwise judge against rules: what wins, what is a tie, what is asked again, and what is never asked twice."""

import math
from dataclasses import replace

import pytest

from tests.core.judges import RuleJudge, shorter
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.generation.replies import Unreadable
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.judge.pairwise import (
    CRITERION,
    Judgment,
    Pair,
    PairwiseJudge,
    read_rating,
    read_scores,
    read_verdict,
    summarise,
)


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


class TestCacheprobs:
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
        assert "there are no two scores" in again["content"]

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
        assert found.winner is None and "length" in found.reason

    def test_failures_of_the_engine_are_not_swallowed(self):
        def refuse(*_):
            raise ValueError("prompt 0 is refused")

        with pytest.raises(ValueError, match="prompt 0 is refused"):
            judged(refuse)


class TestCache:
    @pytest.mark.parametrize("mode", ["scores", "logprobs"])
    def test_a_second_run_asks_nothing(self, tmp_path, mode):
        rule = shorter if mode == "scores" else lambda first, second: [-0.1, -3.0 - len(first)]
        with ResponseCache(tmp_path / "calls.sqlite") as cache:
            _, first, found = judged(rule, mode=mode, cache=cache)
        with ResponseCache(tmp_path / "calls.sqlite") as cache:
            engine, second, again = judged(rule, mode=mode, cache=cache)
            assert again == found and engine.questions == []
            assert (first.counts["calls"], second.counts["calls"], second.counts["cache_hits"]) == (6, 0, 6)
            # another criterion, engine or length of the reply is another question
            engine, *_ = judged(rule, mode=mode, cache=cache, criterion="how short it is")
            assert len(engine.questions) == 6

    def test_retries_are_kept_too(self, tmp_path):
        for calls in (4, 0):
            with ResponseCache(tmp_path / "calls.sqlite") as cache:
                _, judge, found = judged(lambda *_: "hm", PAIRS[:1], cache=cache)
            assert judge.counts["calls"] == calls and found[0].raw == ("hm",) * 4

    def test_what_was_answered_before_a_failure_is_kept(self, tmp_path):
        asked = []

        def three_times(first, second):
            asked.append(first)
            if len(asked) > 3:
                raise OSError("gone")
            return shorter(first, second)

        with ResponseCache(tmp_path / "calls.sqlite") as cache, pytest.raises(OSError, match="gone"):
            judged(three_times, cache=cache)
        with ResponseCache(tmp_path / "calls.sqlite") as cache:
            assert len(cache) == 3
            engine, _, found = judged(shorter, cache=cache)
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


class TestReadScores:
    @pytest.mark.parametrize(
        ("text", "scores"),
        [
            # JSON, whatever the sides are called
            ('{"score_1": 8, "score_2": 7}', (8, 7)),
            ('```json\n{"score_1": 6.5, "score_2": 3}\n```', (6.5, 3)),
            ('{"scores": {"answer_a": 4, "answer_b": "9/10"}}', (4, 9)),
            ('{"scores": [2, 7]}', (2, 7)),
            ("[8, 7]", (8, 7)),
            ('{"Assistant 1": {"score": 3, "why": "8 slips"}, "Assistant 2": {"score": 5}}', (3, 5)),
            ('{"first": 1, "second": 10, "remark": "close"}', (1, 10)),
            ('{"reason_1": "3 facts", "score_1": 8, "reason_2": "1 fact", "score_2": 2}', (8, 2)),
            ('{"score_1": 8, "score_2": 7}\n\nThe first lists 5 towns, the second 2.', (8, 7)),
            # a line of two numbers
            ("8 7", (8, 7)),
            ("8,7", (8, 7)),
            ("8.5 7", (8.5, 7)),
            ("10 10", (10, 10)),
            ("8/10, 7/10", (8, 7)),
            ("6/10 and 10/10.", (6, 10)),
            ("8 out of 10 and 7 out of 10", (8, 7)),
            ("**8** **7**", (8, 7)),
            ("| 8 | 7 |", (8, 7)),
            ("8\n7", (8, 7)),
            ("Scores: **8** and **7**.", (8, 7)),
            ("The scores are 8 and 7.", (8, 7)),
            ("```\n8 7\n```", (8, 7)),
            ("<think>9 9? no, 1 2</think>\n5 6", (5, 6)),
            ("７　８", (7, 8)),
            ("スコア：７／１０、４／１０。", (7, 4)),
            ("9点と3点です。", (9, 3)),
            # with an explanation, whose numbers do not count
            ("8 7\n\nAssistant 1 gives 3 examples, assistant 2 none.", (8, 7)),
            ("3 8\n\n**Assistant 1:** 7 claims, 6 of them wrong.\n**Assistant 2:** 1 claim, right.", (3, 8)),
            ("Answer 1: 4 steps.\nAnswer 2: 9 steps, 2 too many.\n\nRatings: 8 5", (8, 5)),
            ("Answer 1: 1. It is short.\nAnswer 2: 2. It is long.\n6 4", (6, 4)),
            ("7 4\n\n回答1は例が3つあります。回答2は1つだけです。", (7, 4)),
            # labelled
            ("Assistant 1: 8\nAssistant 2: 7", (8, 7)),
            ("Assistant 2: 7, Assistant 1: 8", (8, 7)),
            ("**Answer A:** 8/10.\n**Answer B:** 10/10.", (8, 10)),
            ("- Response 1: Score: 4 out of 10\n- Response 2: Score: 6 out of 10", (4, 6)),
            ("Assistant 1's score is 8. Assistant 2's score is 9.", (8, 9)),
            ("Answer 1 deserves 3 out of 10. Answer 2 deserves 8 out of 10.", (3, 8)),
            ("Assistant 1 (8), Assistant 2 (6)", (8, 6)),
            ("Réponse 1 : 8\nRéponse 2 : 6", (8, 6)),
            ("Assistant 1:\n1. Clear.\n2. Short.\nScore 1: 6\nAssistant 2:\n1. No.\nScore 2: 9", (6, 9)),
            ("回答１：８点\n回答２：５点", (8, 5)),
            ("回答Aは4点、回答Bは9点です。", (4, 9)),
        ],
    )
    def test_read(self, text, scores):
        assert read_scores(text) == scores

    @pytest.mark.parametrize(
        "text",
        [
            "both are great", "", "<think>8 7", "8", "8/10", "I give both 8", "7-8", "7 - 8", "8 7 6", "4/5 3/5",
            "[[8 7]]", "Assistant 1: 4/5\nAssistant 2: 3/5", "Assistant 1: 80%\nAssistant 2: 70%", "Assistant 1: 8",
            "Answer 1: 6-7\nAnswer 2: 5",
            "Answer 1: 7/10 for style, 5/10 for facts.\nAnswer 2: 6",
            "Answer 1: 9 for style and 4 for facts\nAnswer 2: 6",
            "Answer 1: 8/10 for style\nAnswer 1: 6\nAnswer 2: 5",
            "Style: 8 7\nFacts: 3 9",
            "Assistant 1: 5 arguments\nAssistant 2: 1 argument",
            "Assistant 1:\n1. It is clear.\n2. Short.\nAssistant 2:\n1. It is wrong.",
            "Assistant 1: 8\nAssistant 2: 7\nAssistant 1: 6",
            "Assistant 1: 3\nAssistant 2: 5\n\n9 2",
            "Reasons.\n8 7\n7 8",
            "12 5", "0 5", '{"score_1": 8, "score_2": 11}', '{"score_1": 8}', '{"score_1": 8, "score_2": true}',
            '{"style": {"answer_1": 8, "answer_2": 5}, "facts": {"answer_1": 7, "answer_2": 6}}',
            '{"score_1": 8, "answer_1": 6, "score_2": 7}',
            "回答1：7～8点\n回答2：5点",
            "どちらも良い回答です。",
        ],
    )  # fmt: skip
    def test_not_read(self, text):
        with pytest.raises(Unreadable) as caught:
            read_scores(text)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["9 1", "8/10, 7/10", "Answer 1: 9\nAnswer 2: 1", '{"score_1": 9, "score_2": 1'])
    def test_a_number_at_a_cut_may_be_half_of_one(self, text):
        with pytest.raises(Unreadable):
            read_scores(text, truncated=True)
        assert read_scores("9 1\nThe first", truncated=True) == (9, 1)

    @pytest.mark.parametrize(
        "text", ["*" * 200_000 + "8 7", "8 7\n" + "Assistant 1: " * 20_000, " " * 200_000 + "8 7"]
    )
    def test_long_runs_cost_no_time(self, text):
        assert read_scores(text) == (8, 7)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"rating": 7}', 7), ("7", 7), ("**7.5**", 7.5), ("8/10.", 8), ("Score: 8 out of 10", 8),
        ("The rating is 7.", 7),
        ("評価：８点。", 8), ('{"rating": 0}', None), ("", None), ("11", None), ("0", None), ("7 of 8", None),
        ("I'd say 7", None), ("7-8", None), ("7\n8", None), ("6 7", None), ("良い", None),
    ],
)  # fmt: skip
def test_read_rating(text, score):
    if score is None:
        with pytest.raises(Unreadable):
            read_rating(text)
    else:
        assert read_rating(text) == score


class TestReadVerdict:
    @pytest.mark.parametrize(
        ("text", "verdict"),
        [
            ('{"better": "B"}', "B"),
            ('```json\n{"better": "tie"}\n```', "tie"),
            ("A", "A"),
            ("**B**", "B"),
            ("(A)", "A"),
            ("Ｂ", "B"),
            ("[[A]]", "A"),
            ("<think>[[B]]</think>[[A]]", "A"),
            ("Because it is short, [[B]].", "B"),
            ("[[C]]", "tie"),
            ("It's a tie.", "tie"),
            ("Answer A", "A"),
            ("Winner: B", "B"),
            ("Final verdict: **tie**", "tie"),
            ("The better answer is B.", "B"),
            ("B\nAnswer A: it is too long.", "B"),
            ("Answer A: It is detailed.\nAnswer B: It is short.\n\nVerdict: A", "A"),
            ("<think>B?</think>\nA", "A"),
            ("勝者：回答B。", "B"),
            ("引き分け", "tie"),
        ],
    )
    def test_read(self, text, verdict):
        assert read_verdict(text) == {"A": (1, 0), "B": (0, 1), "tie": (0.5, 0.5)}[verdict]

    @pytest.mark.parametrize(
        "text",
        [
            "", "A good answer is one that helps.", "As an AI, I have no opinion.", "Both are great!",
            "A is not better", "Answer B is worse.", "A is as good as B", "A\nor rather\nB", "A: Hello!\nB: Good day.",
            "[[A]] or [[B]]",
            '{"better": "C"}', '{"worse": "A"}', "Aの方が詳しいとは言えません。",
        ],
    )  # fmt: skip
    def test_not_read(self, text):
        with pytest.raises(Unreadable):
            read_verdict(text)


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
            ("{{ first }} {{ secnd }}", "unknown variable 'secnd'; it may use criterion, first, prompt, second"),
            ("{{ first }}", "'second' is not in it"),
            ("{{ first }} {{ second", "line 1"),
            ("{{ first }} {{ second }}\n{{ prompt.__class__.__mro__ }}", "line 2: cannot be filled in .*unsafe"),
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
