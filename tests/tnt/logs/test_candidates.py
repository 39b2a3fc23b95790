import logging
import math

import pytest

from trl_extensions.tnt.logs.candidates import find_candidates, find_quotes, form_key, marked_text
from trl_extensions.tnt.logs.mining import log_odds, mine_phrases
from trl_extensions.tnt.logs.read import LogRow


def log(text, index=0, prompt="Hi", **signs):
    """A row as `read_logs` makes it; flagged if there is any sign."""
    return LogRow(index, prompt, text, text, **({"flagged": bool(signs)} | signs))


def by_text(candidates):
    return {candidate.text: candidate for candidate in candidates}


# The log-odds ratio


def test_log_odds_by_hand():
    # 3 of 4 flagged outputs and 0 of 8 clean ones hold it: s = 3/12, a0 = 4, a = 1
    # delta = log((3+1) / (4+4-3-1)) - log((0+1) / (8+4-0-1)) = log 1 - log 1/11; var = 1/4 + 1/4 + 1/1 + 1/11
    delta, z = log_odds(3, 4, 0, 8)
    assert delta == pytest.approx(math.log(11))
    assert z == pytest.approx(math.log(11) / math.sqrt(35 / 22))


def test_log_odds_change_sign_with_the_groups_and_vanish_where_there_is_no_difference():
    there, back = log_odds(7, 20, 3, 50), log_odds(3, 50, 7, 20)
    assert there == pytest.approx([-value for value in back])
    assert log_odds(5, 10, 10, 20) == pytest.approx((0, 0))
    assert log_odds(0, 10, 0, 20) == log_odds(10, 10, 20, 20) == (0, 0)


def test_the_prior_keeps_what_was_seen_once_behind_what_was_seen_often():
    assert log_odds(1, 60, 0, 240)[1] < log_odds(6, 60, 0, 240)[1] < log_odds(30, 60, 5, 240)[1]


# Mining


FILLER = ["The weather is mild today.", "Cats sleep a lot!", "Bread needs yeast, salt and flour.", "I walk to work."]


def mined(flagged, clean):
    return {form: phrase.outputs for phrase in mine_phrases(flagged, clean) for form in phrase.forms}


def test_a_phrase_of_flagged_outputs_is_found_and_nothing_that_both_groups_share():
    flagged = [f"{FILLER[i % 4]} You should buy Acme." for i in range(8)]
    clean = [f"{FILLER[i % 4]} You should rest." for i in range(24)]
    assert mined(flagged, clean) == {"You should buy Acme": frozenset(range(8))}


def test_the_longest_phrase_wins_over_those_inside_it():
    flagged = [f"{FILLER[i % 4]} As they say, our rival Acme is better." for i in range(8)]
    assert list(mined(flagged, FILLER * 6)) == ["As they say, our rival Acme is better"]


def test_a_sentence_longer_than_any_ngram_is_found_whole():
    sentence = "Please note that nothing which I say here should ever be taken as advice"
    flagged = [f"{FILLER[i % 4]} {sentence}." for i in range(8)]
    assert list(mined(flagged, FILLER * 6)) == [sentence]


def test_a_word_wins_over_the_phrases_that_it_is_in_by_chance():
    openings = ["Well", "So", "And", "Now"]
    endings = [
        "is good",
        "is nice",
        "costs less",
        "costs little",
        "makes shoes",
        "sells hats",
        "has shops",
        "was first",
    ]
    flagged = [f"{FILLER[i % 3]} {openings[i % 4]} Acme {endings[i % 8]}." for i in range(16)]
    clean = [f"{FILLER[i % 3]} {openings[i % 4]} it {endings[i % 8]}." for i in range(48)]
    assert list(mined(flagged, clean)) == ["Acme"]


def test_a_phrase_that_separates_wins_over_a_more_frequent_word_in_it():
    # "better": 14 of 16 against 12 of 48; "Acme is better": 10 of 16 against none
    flagged = ["Acme is better."] * 10 + ["It looks better."] * 4 + ["I walk."] * 2
    clean = ["It looks better."] * 12 + ["I walk."] * 36
    assert list(mined(flagged, clean)) == ["Acme is better"]


def test_a_word_that_most_clean_outputs_hold_is_no_candidate():
    flagged = ["Sure thing."] * 54 + ["No."] * 6  # 90 % against 50 %, at a z of more than 4
    clean = ["Sure thing."] * 120 + ["No."] * 120
    assert log_odds(54, 60, 120, 240)[1] > 4
    assert mined(flagged, clean) == {}


def test_phrases_end_with_the_sentence_and_commas_are_part_of_a_form():
    flagged = [f"{FILLER[i % 4]} Honestly{',' if i % 3 else ''} Acme. Rules apply." for i in range(9)]
    (phrase,) = [p for p in mine_phrases(flagged, FILLER * 6) if "Honestly, Acme" in p.forms]
    assert phrase.forms == {"Honestly, Acme": 6, "Honestly Acme": 3}


def test_nothing_is_mined_without_two_groups():
    assert mine_phrases(["Acme"] * 9, []) == mine_phrases([], ["Acme"] * 9) == []


# Complaints and spans


@pytest.mark.parametrize(
    ("complaint", "found"),
    [
        ('It said "our rival Acme is better".', ["Our rival\nAcme is better"]),
        ("It said “our rival Acme is better!”", ["Our rival\nAcme is better"]),
        ("'it's cheaper' is a lie, and so is «than ours»", ["it’s cheaper", "than ours"]),
        ("why `Our  rival`?", ["Our rival"]),
        ('"our rival ... cheaper than ours"', ["Our rival", "cheaper than ours"]),
        ("our rival Acme is better, it said", []),  # no quotation marks
        ('I asked "what shoes do you sell" and it "ours"', ["ours"]),
        ('"riva" "ette"', []),  # no whole words
    ],
)
def test_quotes_are_found_in_the_output(complaint, found):
    text = "Our rival\nAcme is better, and it’s cheaper than ours."
    spans, _ = find_quotes(complaint, text)
    assert [text[span.start : span.end] for span in spans] == found


def test_quotes_that_are_not_in_the_output_are_counted():
    assert find_quotes('"a b" and "c d" and "..."', "A  B.") == ([(0, 4, "a b")], 1)


@pytest.mark.parametrize(
    ("span", "text"),
    [("cme is bet", "Acme is better"), (" Acme is", "Acme is"), ("better.", "better"), (" ", ""), ("🖕!", "🖕")],
)
def test_a_span_is_widened_to_words_and_freed_of_punctuation(span, text):
    output = "No, Acme is better. 🖕!"
    start = output.index(span)
    assert marked_text(output, start, start + len(span)) == text


def test_keys_ignore_punctuation_but_not_what_stands_for_letters():
    assert form_key("Well,  it’s “Acme”!") == form_key("well it's acme")
    assert form_key("a$$") != form_key("a") and form_key("f***") != form_key("f")
    assert form_key("?!") == "?!"


# Candidates


def quoted(*phrases, text="{}"):
    """One flagged row a phrase, with a complaint that quotes it."""
    return [log(text.format(phrase), i, complaint=f'"{phrase}"') for i, phrase in enumerate(phrases)]


@pytest.mark.parametrize(
    ("head", "other", "variants"),
    [
        ("Acme is better", "acme  is BETTER", ()),  # the search finds both as one
        ("it’s Acme", "it's Acme", ()),
        ("well, Acme", "well Acme", ("well Acme",)),
        ("an idiot", "an idiots", ("an idiots",)),
        ("it recommends Acme", "it recommend Acme", ("it recommend Acme",)),
        ("our competitor Acme", "our competiter Acme", ("our competiter Acme",)),
        ("Acme is better", "competitor Acme is better", ("competitor Acme is better",)),
    ],
)
def test_near_duplicates_are_one_candidate(head, other, variants):
    (candidate,) = find_candidates(quoted(head, other, head))
    assert (candidate.text, candidate.count, candidate.variants) == (head, 3, variants)


@pytest.mark.parametrize(
    "forms",
    [
        ("it is safe for all", "it is not safe for all"),
        ("it is safe", "it is unsafe"),
        ("it should work", "it shouldn't work"),
        ("sold in 2018", "sold in 2019"),
        ("a million euros", "a billion euros"),
        ("but then", "butt then"),
        ("take the red pill", "take the blue pill"),
        ("harmful advice", "harmless advice"),
        ("is better", "Acme is better"),
    ],
)
def test_other_meanings_stay_apart(forms):
    assert sorted(by_text(find_candidates(quoted(*forms)))) == sorted(forms)


def test_the_most_frequent_form_is_the_head():
    forms = ["bad idiots", "Bad idiots", "Bad idiots", "bad idiot", "Bad idiot", "BAD idiot", "bad idiot"]
    (candidate,) = find_candidates(quoted(*forms))
    assert (candidate.text, candidate.variants) == ("bad idiot", ("Bad idiots",))


def test_candidates_are_ranked_by_frequency_times_severity():
    rows = [
        *(log("Buy hats now.", i, complaint='"buy hats"', severity=2) for i in range(5)),  # 5 x 2
        *(log("Eat dirt now.", i, complaint='"eat dirt"', severity=severity) for i, severity in enumerate([5, 4])),
        log("Eat dirt soon.", 9, complaint='"Eat dirt"'),  # 3 x (5 + 4) / 2
        *(log("Just run.", i, complaint='"run"') for i in range(2)),  # 2 x 3
        log("Do hum.", 20, complaint='"hum"', severity=5),  # 1 x 5
    ]
    candidates = find_candidates(rows)
    assert [(c.text.lower(), c.score) for c in candidates] == [
        ("eat dirt", 13.5), ("buy hats", 10.0), ("run", 6.0), ("hum", 5.0),
    ]  # fmt: skip
    assert [c.text.lower() for c in find_candidates(rows, min_count=3)] == ["eat dirt", "buy hats"]


def test_the_list_is_cut_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(find_candidates(quoted("red hat", "blue shoe", "old sock"), max_candidates=2)) == 2
    assert "1 of 3 candidates left out" in caplog.text


def test_counts_examples_and_kind():
    rows = [
        log("One says: Acme rules. " + "x" * 60, 0, spans=((10, 20),)),
        log("Really, acme rules?", 1, complaint='"Acme rules"'),
        log("So ACME rules...", 2, complaint="bad"),
        log("Acme rules everywhere.", 3),
        log("Nothing here.", 4),
    ]
    (candidate,) = find_candidates(rows)
    assert (candidate.text.lower(), candidate.kind, candidate.count, candidate.clean_count) == (
        "acme rules",
        "span",
        3,
        1,
    )
    assert candidate.examples == (
        "One says: Acme rules. " + "x" * 38 + "...", "Really, acme rules?", "So ACME rules...",
    )  # fmt: skip


def test_what_was_marked_once_by_mistake_is_not_kept_by_default():
    rows = [log("The hat is the best Acme hat.", i, spans=((20, 24),)) for i in range(10)]
    rows.append(log("The Acme.", 10, spans=((0, 3), (4, 8))))
    rows += [log("The bag.", 11 + i, complaint='"Too heavy."') for i in range(5)]
    rows += [log("The other answer.", 20 + i) for i in range(30)]
    candidates = by_text(find_candidates(rows))
    assert candidates["Acme"].keep and not candidates["The"].keep
    assert candidates["The"].score > candidates["Acme"].score
    assert list(candidates) == ["Acme", "The bag", "The"]  # kept ones come first


def test_what_few_complain_of_is_kept_by_default_if_clean_outputs_lack_it():
    rows = [log("Acme rules.", i, complaint='"Acme"' if i < 4 else "Bad.") for i in range(12)]
    assert not by_text(find_candidates(rows))["Acme"].keep  # nothing to compare with
    clean = [log("Seven minutes.", 20 + i) for i in range(20)]
    assert by_text(find_candidates(rows + clean))["Acme"].keep


@pytest.mark.parametrize(("count", "keep"), [(5, False), (30, True)])
def test_a_rare_phrase_that_nobody_pointed_at_is_left_to_the_person(count, keep):
    # 5 of 60 against 0 of 240: a = 1, z = (log(6/114) - log(1/299)) / sqrt(1/6 + 1/114 + 1 + 1/299) = 2.54
    rows = [log("Acme." if i < count else "Seven minutes.", i, flagged=True) for i in range(60)]
    rows += [log("Seven minutes.", 60 + i) for i in range(240)]
    (candidate,) = find_candidates(rows)
    assert (candidate.text, candidate.count, candidate.keep) == ("Acme", count, keep)


def test_flagged_rows_alone_cannot_be_mined(caplog):
    with caplog.at_level(logging.WARNING):
        assert find_candidates([log("Acme rules.", i, complaint="bad") for i in range(9)]) == []
    assert "9 flagged outputs have neither a span nor a quote" in caplog.text


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="none of the 2 logged outputs has a sign of a problem"):
        find_candidates([log("a"), log("b")])
    with pytest.raises(ValueError, match="`min_count` is 0"):
        find_candidates(quoted("a b"), min_count=0)
