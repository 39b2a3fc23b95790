"""What is counted in responses, against counts by hand, and how often it is obeyed, against intervals by hand."""

import math

import pytest
import yaml

from trl_extensions.sami.checks import (
    count_list_items,
    count_sentences,
    count_words,
    disobeys,
    obedience,
    paired_difference,
)
from trl_extensions.sami.principles import Principle, load_principles, parse_principles, save_principles


def principle(name="short", **check):
    document = {"name": name, "definition": f"Be {name}.", "antithesis": f"Do not be {name}.", "check": check or None}
    return parse_principles({"principles": [document]}, "file")[0]


class TestCounts:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Don't boil well-aged eggs.", 4),
            ("1. One\n2. Two three", 3),  # numbers of a list are no words
            ("卵をゆでます。", 3),  # 6 characters
            ("Python で書く", 3),  # one word, 3 characters
            ("トム・クルーズと人々", 5),  # 9 characters and a dot between names
            ("ﾊﾟﾝとﾊﾑ", 3),  # 6, of half width
            ("", 0),
        ],
    )
    def test_words(self, text, words):
        assert count_words(text) == words

    @pytest.mark.parametrize(
        ("text", "sentences"),
        [
            ("Keep it cold, e.g. in a fridge. Eat it soon!", 2),
            ("It costs 1.5 dollars. (Cheap.) And it was cut off he", 3),
            ("1. First\n2. Second", 2),
            ("パンは冷やします。早く食べましょう！", 2),
            ("「はい。」と言いました。\n・一つ\n・二つ", 4),
            ("---\n\n", 0),
        ],
    )
    def test_sentences(self, text, sentences):
        assert count_sentences(text) == sentences

    @pytest.mark.parametrize(
        ("text", "items"),
        [
            ("- a\n * b\n• c", 3),
            ("1. a\n2) b\na) c", 3),
            ("**Bold** words\n1.5 million\n--\nA. Smith\n-5 degrees", 0),
            ("・卵\n①お湯\n２．塩\n　●水", 4),
        ],
    )
    def test_list_items(self, text, items):
        assert count_list_items(text) == items


class TestChecks:
    def test_all_that_is_given_must_hold_and_the_antithesis_is_its_negation(self):
        own = principle(words={"at_most": 3}, list_items=2).check
        for text, holds in (("- a\n- b", True), ("- a\n- b\n- c", False), ("- a\n- b c d", False)):
            assert own.obeyed(True, text) is holds and own.obeyed(False, text) is not holds

    def test_an_antithesis_may_have_a_check_of_its_own(self):
        own = principle(words={"at_most": 1}, antithesis={"words": {"at_least": 3}}).check
        assert [own.obeyed(False, text) for text in ("a", "a b", "a b c")] == [False, False, True]

    def test_regular_expressions_and_languages(self):
        asks = principle(regex=r"[?？]\s*$").check
        assert asks.obeyed(True, "Why?\n") and asks.obeyed(True, "なぜ？") and not asks.obeyed(True, "Why? So.")
        pytest.importorskip("py3langid")
        japanese = principle(language="ja").check
        assert japanese.obeyed(True, "卵をお湯に入れて、十分間ゆでます。")
        assert japanese.obeyed(False, "Put the egg into water and boil it.")

    @pytest.mark.parametrize(
        ("check", "named"),
        [
            ({"word": 3}, "`word`"),
            ({"words": {"at_least": 4, "at_most": 2}}, "`at_least` 4 is above `at_most` 2"),
            ({"words": "few"}, "`words`"),
            ({"regex": "("}, "`regex`"),
            ({"judge": True, "words": 3}, "`judge: true` alone"),
            ({"antithesis": {"words": 3}}, "some of words"),
            ({"words": 3, "antithesis": {"lines": 3}}, "`antithesis`: `lines`"),
        ],
    )
    def test_bad_checks_are_named(self, check, named):
        with pytest.raises(ValueError, match=r"p\.yaml: principle 1: `check`") as error:
            parse_principles(
                {"principles": [{"name": "a", "definition": "b", "antithesis": "c", "check": check}]}, "p.yaml"
            )
        assert named in str(error.value) and "\n" not in str(error.value)

    def test_a_check_survives_its_file(self, tmp_path):
        own = [principle(sentences=1, antithesis={"sentences": {"at_least": 4}}), Principle("b", "c", "d")]
        save_principles(tmp_path / "p.yaml", own)
        assert load_principles(tmp_path / "p.yaml") == own
        written = yaml.safe_load((tmp_path / "p.yaml").read_text())["principles"]
        assert written[0]["check"]["antithesis"] == {"sentences": {"at_least": 4}} and "check" not in written[1]

    def test_a_filter_lets_pass_what_only_a_judge_can_tell(self):
        checks = {"a": principle(words=1).check, "b": principle(judge=True).check, "c": None}
        choices = [{"a": True, "b": True, "c": True}, {"a": False, "b": False, "c": True}]
        assert not disobeys(checks, choices, 0, "one") and disobeys(checks, choices, 0, "one two")
        assert disobeys(checks, choices, 1, "one")
        # chosen alike in both: nothing to contrast
        assert not disobeys(checks, [choices[0], choices[0] | {"b": False}], 0, "one two")


def row(id, *texts, sides=(True, False)):
    return {"id": id, "query": "q", "choices": [{"short": side} for side in sides], "completions": list(texts)}


class TestObedience:
    def test_by_hand(self):
        before = [row("1", "a b", "a b"), row("2", "a b", "a b"), row("3", "a", "")]
        after = [row("1", "a", "a b"), row("2", "a", "a"), row("3", "a", "a b")]
        found = obedience([principle(words=1), Principle("other", "b", "c")], after, before)
        assert list(found) == ["short"]
        definition, antithesis = found["short"]["definition"], found["short"]["antithesis"]
        assert definition["n"] == definition["queries"] == 3 and definition["obeyed"]["value"] == 1
        # Wilson at 3 of 3: 3 / (3 + 1.96^2)
        assert definition["obeyed"]["low"] == pytest.approx(3 / (3 + 1.959964**2))
        assert definition["original"]["value"] == pytest.approx(1 / 3)
        # differences 1, 1, 0; with two more pairs: mean 2/5, variance (2 + 1)/5 - 4/25
        error = math.sqrt((3 / 5 - 4 / 25) / 5)
        assert definition["difference"]["value"] == pytest.approx(2 / 3)
        assert definition["difference"]["se"] == pytest.approx(error)
        assert definition["difference"]["low"] == pytest.approx(0.4 - 1.96 * error)
        # an empty response obeys nothing; "a b" twice, then "a" and "a b"
        assert antithesis["original"]["value"] == pytest.approx(2 / 3)
        assert antithesis["obeyed"]["value"] == pytest.approx(2 / 3)
        assert found["short"]["all"]["n"] == 6

    def test_responses_to_one_query_count_once(self):
        rows = [row("1", "a", "a", sides=(True, True)), row("2", "a", "a b", sides=(True, True))]
        [own] = [found["definition"] for found in obedience([principle(words=1)], rows).values()]
        assert (own["n"], own["queries"], own["obeyed"]["value"]) == (4, 2, 0.75)
        assert "difference" not in own

    def test_shares_and_their_difference_weigh_queries_alike(self):
        sides = (True, True, True)
        before = [row("1", "a b", "a b", "a b", sides=sides), row("2", "a", sides=(True,))]
        after = [row("1", "a", "a b", "a", sides=sides), row("2", "a", sides=(True,))]
        own = obedience([principle(words=1)], after, before)["short"]["definition"]
        # means of 2/3 and 1, of 0 and 1; of four responses it would be 3/4 and 1/4
        assert own["obeyed"]["value"] == pytest.approx(5 / 6) and own["original"]["value"] == 0.5
        assert own["difference"]["value"] == pytest.approx(5 / 6 - 1 / 2) and own["n"] == 4

    def test_an_interval_ends_where_differences_do(self):
        # 8 of 8: (8 + 0)/10 and an error of sqrt((9/10 - 64/100)/10) = 0.16, so 1.11
        assert paired_difference([1.0] * 8)["high"] == 1 and paired_difference([-1.0] * 8)["low"] == -1

    def test_no_change_has_an_error_too(self):
        nothing = paired_difference([0.0] * 8)
        assert nothing["value"] == 0 and nothing["se"] == pytest.approx(math.sqrt(1 / 10 / 10))

    def test_a_judge_is_asked_and_may_be_unread(self):
        asked = []

        def judge(questions):
            asked.extend(questions)
            return [True, None]

        own = principle(judge=True)
        found = obedience([own], [row("1", "卵です。", "x")], judge=judge)["short"]
        assert asked == [("Be short.", "q", "卵です。"), ("Do not be short.", "q", "x")]
        assert found["definition"]["obeyed"]["value"] == 1 and "antithesis" not in found
        # without one there is nothing to tell, of an empty response neither
        assert obedience([own], [row("1", "a", "")]) == {}
        found = obedience([own], [row("1", "a", "")], judge=lambda questions: [True] * len(questions))["short"]
        assert [found[side]["obeyed"]["value"] for side in ("definition", "antithesis")] == [1, 0]
