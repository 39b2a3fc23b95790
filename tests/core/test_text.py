"""Repetition and likeness of texts, by hand."""

import math
import re

import pytest

from trl_extensions.core.text import bleu, exact_match, mean_seq_rep_n, pattern_finder, rouge_l, seq_rep_n


class TestRepetition:
    def test_seq_rep_by_hand(self):
        # abcd bcda cdab dabc abcd: 4 distinct of 5; in pairs: ab bc cd da ab bc cd: 4 distinct of 7
        assert seq_rep_n("a b c d a B  c\nd") == pytest.approx(1 / 5)
        assert seq_rep_n("a b c d a b c d", n=2) == pytest.approx(3 / 7)
        assert seq_rep_n("no no no no no no no") == pytest.approx(3 / 4)

    def test_no_repetition(self):
        assert seq_rep_n("every word is here once") == 0.0
        assert seq_rep_n("no no no") == seq_rep_n("") == 0.0  # too short for a 4-gram

    def test_mean_leaves_short_texts_out(self):
        assert mean_seq_rep_n(["a b c d a b c d", "too short now", "", "a b c d"]) == pytest.approx(1 / 10)
        assert mean_seq_rep_n(["too short"]) == mean_seq_rep_n([]) == 0.0


class TestExactMatch:
    def test_by_hand(self):
        a = ["Same words.", "white  space\nonly ", "Case", "one two", ""]
        b = ["Same words.", "white space only", "case", "one two three", " "]
        assert exact_match(a, b) == pytest.approx(3 / 5)


class TestBleu:
    HYPOTHESIS, REFERENCE = "the cat sat on the mat", "the cat sat on a mat"

    def test_one_text_by_hand(self):
        # Matches: 5 of 6 words (the second "the" is one too many), 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples.
        expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
        assert bleu([self.HYPOTHESIS], [self.REFERENCE]) == pytest.approx(expected)

    def test_counts_are_pooled_over_the_corpus(self):
        # Beside the text above, one that is equal with 4, 3, 2, 1 n-grams; "a mean of texts" would be larger.
        expected = 100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** (1 / 4)
        assert bleu([self.HYPOTHESIS, "w x y z"], [self.REFERENCE, "w x y z"]) == pytest.approx(expected)

    def test_a_short_hypothesis_is_penalised(self):
        assert bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 4))
        assert bleu(["a b c d e f"], ["a b c d"]) == pytest.approx(
            100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
        )  # a long one is not, beyond what it adds

    def test_equal_texts_get_100_even_if_short(self):
        assert bleu(["Yes."], ["Yes."]) == pytest.approx(100) and bleu(["Yes."], ["Yes."]) <= 100
        assert bleu(["nothing"], ["alike"]) == 0.0


class TestRougeL:
    def test_by_hand(self):
        # Longest common subsequence "b d": precision 2/2, recall 2/4, F = 2/3; the second pair: 3 of 4 and 3 of 3.
        assert rouge_l(["b, d!"], ["a b c d"]) == pytest.approx(2 / 3)
        assert rouge_l(["b d", "x y q z"], ["a b c d", "X y z"]) == pytest.approx((2 / 3 + 6 / 7) / 2)

    def test_no_stemmer(self):
        assert rouge_l(["walking"], ["walked"]) == 0.0

    def test_words_are_the_package_s_on_ascii(self):
        from rouge_score.rouge_scorer import RougeScorer

        a, b = "It's 3.5 km_h -- don't STOP, e.g. here", "its 3 5 km h: do not stop here (e.g.)"
        expected = RougeScorer(["rougeL"], use_stemmer=False).score(b, a)["rougeL"].fmeasure
        assert 0 < expected < 1
        assert rouge_l([a], [b]) == pytest.approx(expected)

    def test_other_scripts_are_not_dropped(self):
        # "кот" and "спит" of three words each; the package's own tokenizer sees no word at all
        assert rouge_l(["кот спит дома"], ["Кот не спит"]) == pytest.approx(2 / 3)

    def test_equal_texts_without_words(self):
        assert rouge_l(["", "!!!"], [" ", "!!!"]) == 1.0
        assert rouge_l(["", "!!!"], ["word", "???"]) == 0.0


@pytest.mark.parametrize("metric", [exact_match, bleu, rouge_l])
class TestPairs:
    def test_no_texts(self, metric):
        assert math.isnan(metric([], []))

    def test_unequal_numbers(self, metric):
        with pytest.raises(ValueError, match="1 texts against 2"):
            metric(["a"], ["a", "b"])

    def test_a_text_is_not_a_list_of_texts(self, metric):
        with pytest.raises(TypeError, match="give two lists"):
            metric("ab", ["a", "b"])


class TestPatterns:
    @pytest.mark.parametrize("text", ["x" * 5000, "あ" * 5000])
    def test_one_that_tries_every_way_is_stopped(self, monkeypatch, text):
        monkeypatch.setattr("trl_extensions.core.text._LONGEST_SEARCH", 0.1)
        find = pattern_finder(f"({text[0]}+{text[0]}+)+y", "`check`")
        assert [found.span() for found in find(f"{text[:3]}y {text[:2]}y")] == [(0, 4), (5, 8)]
        with pytest.raises(
            ValueError, match=r"^`check` .* takes more than 0.1 seconds for a text of 5000 characters; "
        ):
            next(find(text))

    @pytest.mark.parametrize("pattern", ["(", "(?P<a>x)(?P<a>y)", "a{99999999999}", "[z-a]", r"\p{L}"])
    def test_what_is_none(self, pattern):
        with pytest.raises(ValueError, match=r"^`check` .* is not a regular expression"):
            pattern_finder(pattern, "`check`")

    @pytest.mark.parametrize("pattern", [r"\bcat\b", r"(?i)É", r"^\d+\Z", r"[\w'’-]+", "猫|犬", r"a.c", r"(?m)^-\s"])
    def test_matches_are_those_of_python(self, pattern):
        text = "A cat, a-b cats\n- 猫 and é É 12\na\nc abc don’t"
        assert [own.span() for own in pattern_finder(pattern, "`p`")(text)] == [
            own.span() for own in re.finditer(pattern, text)
        ]
