"""What judges really write, and what is to be read out of it."""

import math

import pytest

from trl_extensions.core.generation.replies import Unreadable, as_text, fenced_parts, without_fences, without_thoughts
from trl_extensions.core.judge.replies import SCALE, expected_score, parse_scores, parse_verdict


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain", "plain"),
        ("<think>a\nb</think>yes", "yes"),
        ("no <think>never closed", "no "),
        ("begun by the template</think>yes", "yes"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("a</think>x<think>b</think>y", "xy"),
        ("", ""),
    ],
)
def test_thoughts(text, left):
    assert without_thoughts(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("```\nx\n```", "x\n"),
        ("```json\n[1]\n```", "[1]\n"),
        ("```c++\nint x;\n```", "int x;\n"),
        ("before ```text x``` after", "before x after"),
        ("```python\ncut off", "cut off"),
        ("```x```", "x"),
        ("none", "none"),
    ],
)
def test_fences(text, left):
    assert without_fences(text) == left
    if "```" in text:
        assert [part.strip() for part in fenced_parts(text)] == [
            left.replace("before", "").replace("after", "").strip()
        ]


def test_prompts_as_text():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nyou"}]
    assert as_text(chat) == "system: Be kind.\nuser: Hi\nyou"
    assert (as_text("Hi"), as_text(""), as_text([])) == ("Hi", "(none)", "(none)")


class TestScores:
    @pytest.mark.parametrize(
        ("text", "scores"),
        [
            ("8 7", (8, 7)),
            ("8, 7", (8, 7)),
            ("8,7", (8, 7)),
            ("8.5 7", (8.5, 7)),
            ("8,5 7,5", (8.5, 7.5)),
            ("10 10", (10, 10)),
            ("1 10", (1, 10)),
            ("8/10, 7/10", (8, 7)),
            ("8 out of 10 and 7 out of 10", (8, 7)),
            ("**8** **7**", (8, 7)),
            ("[8, 7]", (8, 7)),
            ("| 8 | 7 |", (8, 7)),
            ("8\n7", (8, 7)),
            ("Scores: **8** and **7**.", (8, 7)),
            ("The scores are 8 and 7.", (8, 7)),
            ("Scores:\n8 7", (8, 7)),
            ("8 7\n\nAssistant 1 gives 3 examples, assistant 2 none.", (8, 7)),
            ("The first has 3 examples, the second 1.\n\n8 7", (8, 7)),
            ("Assistant 1: 8\nAssistant 2: 7", (8, 7)),
            ("Assistant 2: 7, Assistant 1: 8", (8, 7)),
            ("**Answer A:** 8/10\n**Answer B:** 10/10", (8, 10)),
            ('{"assistant_1": 8, "assistant_2": 7}', (8, 7)),
            ("Assistant 1's score is 8. Assistant 2's score is 9.", (8, 9)),
            ("Assistant 1 (8), Assistant 2 (6)", (8, 6)),
            ("Antwort 1: 8\nAntwort 2: 6", (8, 6)),
            ("Réponse 1 : 8\nRéponse 2 : 6", (8, 6)),
            ("Assistant 1:\n1. It is clear.\n2. It is short.\nScore 1: 6\nAssistant 2:\n1. No.\nScore 2: 9", (6, 9)),
            ("<think>9 9? no, 1 2</think>\n5 6", (5, 6)),
            ("```\n8 7\n```", (8, 7)),
            ("７　８", (7, 8)),
        ],
    )
    def test_read(self, text, scores):
        assert parse_scores(text) == scores

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("both are great", "no two scores"),
            ("", "empty"),
            ("<think>8 7", "empty"),
            ("8", "no two scores"),
            ("8/10", "no two scores"),
            ("I give both 8", "no two scores"),
            ("7-8", "no two scores"),
            ("8 7 6", "no two scores"),
            ("4/5 3/5", "no two scores"),
            ("Assistant 1: 4/5\nAssistant 2: 3/5", "no two scores"),
            ("Assistant 1: 80%\nAssistant 2: 70%", "no two scores"),
            ("Assistant 1: 8", "no two scores"),
            ("Assistant 1:\n1. It is clear.\n2. Short.\nAssistant 2:\n1. It is wrong.", "no two scores"),
            ("Assistant 1: 8\nAssistant 2: 7\nAssistant 1: 6", "several scores for one answer"),
            ("Reasons.\n8 7\n7 8", "several pairs"),
            ("12 5", "12 is not within 1 to 10"),
            ("0 5", "0 is not within 1 to 10"),
        ],
    )
    def test_not_read(self, text, reason):
        with pytest.raises(Unreadable, match=reason) as caught:
            parse_scores(text)
        assert "\n" not in str(caught.value)

    def test_a_number_at_a_cut_may_be_half_of_one(self):
        assert parse_scores("9 1") == (9, 1)
        with pytest.raises(Unreadable):
            parse_scores("9 1", truncated=True)
        assert parse_scores("9 1\nThe first", truncated=True) == (9, 1)

    def test_long_runs_of_marks_cost_no_time(self):
        assert parse_scores("*" * 200_000 + "8 7") == (8, 7)


class TestVerdicts:
    @pytest.mark.parametrize(
        ("text", "verdict"),
        [
            ("A", "A"),
            ("**B**", "B"),
            ("(A)", "A"),
            ("a", "A"),
            ("Ｂ", "B"),
            ("[[A]]", "A"),
            ("Because it is short, [[B]].", "B"),
            ("[[C]]", "tie"),
            ("tie", "tie"),
            ("It's a tie.", "tie"),
            ("neither", "tie"),
            ("Both answers are equally helpful.", "tie"),
            ("A and B are equally good", "tie"),
            ("Answer A", "A"),
            ("Winner: B", "B"),
            ("Final verdict: **tie**", "tie"),
            ("The better answer is B.", "B"),
            ("A is clearly better than B, since it has more.", "A"),
            ("Answer B wins!", "B"),
            ("A, because it lists three reasons.", "A"),
            ("B\nAnswer A: it is too long.", "B"),
            ("Answer A: It is detailed.\nAnswer B: It is short.\n\nVerdict: A", "A"),
            ("<think>B?</think>\nA", "A"),
        ],
    )
    def test_read(self, text, verdict):
        assert parse_verdict(text) == verdict

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "empty"),
            ("A good answer is one that helps.", "no verdict"),
            ("As an AI, I have no opinion.", "no verdict"),
            ("Both are great!", "no verdict"),
            ("Answer B is worse.", "no verdict"),
            ("A is not better", "no verdict"),
            ("A is as good as B", "no verdict"),
            ("A\nor rather\nB", "different verdicts"),
            ("A: Hello!\nB: Good day.", "different verdicts"),
            ("[[A]] or [[B]]", "different verdicts"),
        ],
    )
    def test_not_read(self, text, reason):
        with pytest.raises(Unreadable, match=reason):
            parse_verdict(text)


class TestExpectedScore:
    def test_by_hand(self):
        # 0.2 on the digit 3 and 0.6 on 7: (0.2 * 4 + 0.6 * 8) / 0.8 = 7
        logprobs = [-math.inf] * 10
        logprobs[3], logprobs[7] = math.log(0.2), math.log(0.6)
        assert expected_score(logprobs) == pytest.approx((7.0, 0.8))

    @pytest.mark.parametrize("digit", range(10))
    def test_one_digit_alone(self, digit):
        logprobs = [0.0 if number == digit else -math.inf for number in range(10)]
        assert expected_score(logprobs) == (digit + 1, 1.0)
        assert SCALE[digit] == str(digit)

    def test_uniform_is_the_middle(self):
        assert expected_score([math.log(0.05)] * 10) == pytest.approx((5.5, 0.5))

    def test_a_model_that_would_not_write_a_digit(self):
        assert expected_score([math.log(0.0011)] * 10) == pytest.approx((5.5, 0.011))
        for logprob in (math.log(0.0009), -math.inf):
            with pytest.raises(Unreadable, match="the digits have less than 1% of the probability"):
                expected_score([logprob] * 10)

    @pytest.mark.parametrize("logprobs", [[0.0] * 9, [math.nan] * 10])
    def test_what_is_no_distribution(self, logprobs):
        with pytest.raises(ValueError, match="ten log-probabilities"):
            expected_score(logprobs)
