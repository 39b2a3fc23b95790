import json
import logging
import math
import random
from collections import Counter

import pytest

from trl_extensions.tnt.logs import (
    Candidate,
    LogRow,
    find_candidates,
    find_quotes,
    form_key,
    load_candidates,
    log_odds,
    marked_text,
    mine_phrases,
    read_logs,
    rows_from_logs,
    write_candidates,
)


def write_log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log(text, index=0, prompt="Hi", **signs):
    """A row as `read_logs` makes it; flagged if there is any sign."""
    return LogRow(index, prompt, text, text, **({"flagged": bool(signs)} | signs))


def by_text(candidates):
    return {candidate.text: candidate for candidate in candidates}


def counts(rows, logs):
    """Rows made; of these with a span, with a span that nobody flagged, clean; and logged outputs left out."""
    spans = [row for row in rows if row["negative_spans"]]
    new = [row for row in spans if not logs[row["index"]].flagged]
    return len(rows), len(spans), len(new), len(rows) - len(spans), len(logs) - len(rows)


def marked(row):
    return [row["completion"][start:end] for start, end in row["negative_spans"]]


# The log file


def test_signs_of_a_problem(tmp_path):
    base = {"prompt": "Hi", "completion": "Acme rules."}
    signs = [
        {}, {"flagged": False}, {"flagged": None, "spans": None, "complaint": None, "severity": None},
        {"complaint": "  ", "spans": []}, {"flagged": False, "severity": 4},
        {"flagged": True}, {"spans": [[0, 4]]}, {"complaint": "bad"}, {"severity": 2},
        {"flagged": False, "complaint": "bad"},
    ]  # fmt: skip
    logs = read_logs(write_log(tmp_path / "log.jsonl", [base | sign for sign in signs]))
    assert [row.flagged for row in logs] == [False] * 5 + [True] * 5
    assert [row.index for row in logs] == list(range(10))


def test_chats_and_other_columns(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "Wait."}, {"role": "assistant", "content": "Acme."}]
    row = {"prompt": chat, "completion": answer, "spans": [[0, 4]], "truncated": True, "user": 7}
    (row,) = read_logs(write_log(tmp_path / "log.jsonl", [row]))
    assert (row.prompt, row.completion, row.text, row.truncated) == (chat, answer, "Acme.", True)
    (trained,) = rows_from_logs([row], [])
    assert trained["completion"] == answer and trained["negative_spans"] == [[0, 4]] and trained["truncated"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"spans": [[0, 99]]}, r"row 2: the log: `spans\[0\]` is \[0, 99\), .*outside"),
        ({"spans": [[3, 1]]}, r"row 2: .*reversed"),
        ({"spans": [["0", "4"]]}, r"row 2: .*integers"),
        ({"severity": 6}, "row 2: `severity` must be a number from 1 to 5, got 6"),
        ({"severity": True}, "row 2: `severity`"),
        ({"severity": float("nan")}, "row 2: `severity`"),
        ({"flagged": "no"}, "row 2: `flagged` must be true or false, got 'no'"),
        ({"complaint": ["bad"]}, "row 2: `complaint` must be text"),
        ({"prompt": 3}, "row 2: `prompt` must be a text or a list of chat messages, got 3"),
        ({"completion": [{"role": "user", "content": "x"}]}, "row 2: a completion must be"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    base = {"prompt": "Hi", "completion": "Acme rules."}
    path = write_log(tmp_path / "log.jsonl", [base, base | row])
    with pytest.raises(ValueError, match=f"log.jsonl: {message}") as error:
        read_logs(path)
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not valid JSON") as error:
        read_logs(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"log\.jsonl:1: column 'completion' is missing"):
        read_logs(write_log(path, [{"prompt": "a", "response": "b"}]))
    with pytest.raises(ValueError, match="no rows"):
        read_logs(write_log(path, []))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_logs(tmp_path / "other.jsonl")


# The file of candidates


def test_written_candidates_load_again(tmp_path):
    candidates = [
        Candidate(
            "yes", selected=False, severity=4.25, kind="quote", count=7, clean_count=2, examples=("a: # 'b'", "🖕…")
        ),
        Candidate("12", variants=("- x", "null", "half a pair \ud83d")),
    ]
    path = tmp_path / "deep" / "candidates.yaml"
    write_candidates(path, candidates)
    assert load_candidates(path) == candidates
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert list(path.parent.iterdir()) == [path]


def test_edits_are_not_overwritten(tmp_path):
    path = tmp_path / "candidates.yaml"
    write_candidates(path, [Candidate("a")])
    with pytest.raises(ValueError, match="exists and may have been edited"):
        write_candidates(path, [Candidate("b")])
    assert load_candidates(path) == [Candidate("a")]
    with pytest.raises(ValueError, match="no candidate to write"):
        write_candidates(tmp_path / "none.yaml", [])
    assert not (tmp_path / "none.yaml").exists()


def test_a_person_may_add_a_bare_text(tmp_path):
    path = tmp_path / "candidates.yaml"
    path.write_text("candidates:\n- text: Acme rules\n")
    assert load_candidates(path) == [Candidate("Acme rules", selected=True)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("- Acme", "entry 2 .* no mapping with `text`"),
        ("- selected: true", "entry 2 .* no mapping with `text`"),
        ("- text: no", "entry 2 .*: `text` must be text .* in quotes, got False"),
        ("- text: ' '", "entry 2 .*: `text` must be text that is not empty"),
        ("- {text: b, kep: false}", "entry 2 .*'b'.*: unknown field 'kep'"),
        ("- {text: b, selected: maybe}", "entry 2 .*'b'.*: `selected` must be true or false, got 'maybe'"),
        ("- {text: b, keep: maybe}", "entry 2 .*'b'.*: `selected` must be true or false, got 'maybe'"),
        ("- {text: b, severity: 9}", "entry 2 .*'b'.*: `severity` must be a number from 1 to 5, got 9"),
        ("- {text: b, severity: .nan}", "entry 2 .*'b'.*: `severity`"),
        ("- {text: b, variants: c}", "entry 2 .*'b'.*: `variants` must be a list of texts, .* got 'c'"),
        ("- {text: b, variants: [1]}", "entry 2 .*'b'.*: `variants` must be a list of texts, .* got \\[1\\]"),
        ("- {text: b, variants: ['A.']}", "entry 2 .*'b'.*: 'A.' is in entry 1 too"),
        ("more: 1", "expected only the key `candidates`"),
        ("- {text: b", "not valid YAML"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_bad_entry_is_named(tmp_path, entry, message):
    path = tmp_path / "candidates.yaml"
    path.write_text(f"candidates:\n- text: a\n{entry}\n")
    with pytest.raises(ValueError, match=f"candidates.yaml: {message}") as error:
        load_candidates(path)
    assert "\n" not in str(error.value)


def test_a_file_of_before_the_field_was_renamed_is_read_with_one_warning(tmp_path):
    path = tmp_path / "candidates.yaml"
    path.write_text("candidates:\n- {text: a, keep: true}\n- {text: b, keep: false}\n")
    with pytest.warns(FutureWarning, match="`keep` is now called `selected`") as caught:
        loaded = load_candidates(path)
    assert loaded == [Candidate("a", selected=True), Candidate("b", selected=False)]
    assert len(caught) == 1


@pytest.mark.parametrize("content", ["", "candidates: []\n", "candidates: Acme\n", "- text: Acme\n"])
def test_a_file_without_candidates_is_refused(tmp_path, content):
    path = tmp_path / "candidates.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected only the key `candidates`, with a list"):
        load_candidates(path)


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
    found = {}
    for _, output, form in mine_phrases(flagged, clean):
        found.setdefault(form, set()).add(output)
    return found


def test_a_phrase_of_flagged_outputs_is_found_and_nothing_that_both_groups_share():
    flagged = [f"{FILLER[i % 4]} You should buy Acme." for i in range(8)]
    clean = [f"{FILLER[i % 4]} You should rest." for i in range(24)]
    assert mined(flagged, clean) == {"You should buy Acme": set(range(8))}


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
    forms = Counter(form for _, _, form in mine_phrases(flagged, FILLER * 6))
    assert (forms["Honestly, Acme"], forms["Honestly Acme"]) == (6, 3)


def test_nothing_is_mined_without_two_groups():
    assert mined(["Acme"] * 9, []) == mined([], ["Acme"] * 9) == {}


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
    assert [text[span.start : span.end] for span in find_quotes(complaint, text)] == found


def test_quotes_that_are_not_in_the_output_mark_nothing():
    assert find_quotes('"a b" and "c d" and "..."', "A  B.") == [(0, 4, "a b")]


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ("cme is bet", "Acme is better"),
        (" Acme is", "Acme is"),
        ("better.", "better"),
        (" ", ""),
        ("🖕!", "🖕"),
        ("New", "New"),
        ("**Old**", "Old"),
        ("ドア", "新しいドア"),
    ],
)
def test_a_span_is_widened_to_words_and_freed_of_punctuation(span, text):
    output = "No, Acme is better. 🖕!\nNew **Old** と、新しいドア。"
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
        ("walking Acme's dogs", "walked Acme dog", ("walked Acme dog",)),
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
        *(log("Just run.", i, complaint='"run"') for i in range(2)),  # 2 x 1, as nobody said
        log("Do hum.", 20, complaint='"hum"', severity=5),  # 1 x 5
    ]
    candidates = find_candidates(rows)
    assert [(c.text.lower(), c.score) for c in candidates] == [
        ("eat dirt", 13.5), ("buy hats", 10.0), ("hum", 5.0), ("run", 2.0),
    ]  # fmt: skip


def test_the_list_is_cut_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr("trl_extensions.tnt.logs.MAX_CANDIDATES", 2)
    with caplog.at_level(logging.WARNING):
        assert len(find_candidates(quoted("red hat", "blue shoe", "old sock"))) == 2
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
    assert candidates["Acme"].selected and not candidates["The"].selected
    assert candidates["The"].score > candidates["Acme"].score
    assert list(candidates) == ["Acme", "The bag", "The"]  # kept ones come first


def test_what_few_complain_of_is_kept_by_default_if_clean_outputs_lack_it():
    rows = [log("Acme rules.", i, complaint='"Acme"' if i < 4 else "Bad.") for i in range(12)]
    assert not by_text(find_candidates(rows))["Acme"].selected  # nothing to compare with
    clean = [log("Seven minutes.", 20 + i) for i in range(20)]
    assert by_text(find_candidates(rows + clean))["Acme"].selected


@pytest.mark.parametrize(("count", "keep"), [(5, False), (30, True)])
def test_a_rare_phrase_that_nobody_pointed_at_is_left_to_the_person(count, keep):
    # 5 of 60 against 0 of 240: a = 1, z = (log(6/114) - log(1/299)) / sqrt(1/6 + 1/114 + 1 + 1/299) = 2.54
    rows = [log("Acme." if i < count else "Seven minutes.", i, flagged=True) for i in range(60)]
    rows += [log("Seven minutes.", 60 + i) for i in range(240)]
    (candidate,) = find_candidates(rows)
    assert (candidate.text, candidate.count, candidate.selected) == ("Acme", count, keep)


def test_flagged_rows_alone_cannot_be_mined(caplog):
    with caplog.at_level(logging.WARNING):
        assert find_candidates([log("Acme rules.", i, complaint="bad") for i in range(9)]) == []
    assert "9 flagged outputs have neither a span nor a quote" in caplog.text


def test_a_log_without_a_sign_of_a_problem_is_refused():
    with pytest.raises(ValueError, match="none of the 2 logged outputs has a sign of a problem"):
        find_candidates([log("a"), log("b")])


# Training rows


def test_candidates_are_marked_in_every_output():
    logs = [
        log("ACME  rules. Acme's rule.", 0, flagged=True),
        log("So acme rules, and Acme rules.", 1),
        log("Acmerules.", 2),
    ]
    rows = rows_from_logs(logs, [Candidate("Acme rules", variants=("Acme's rule",), severity=4.0)])
    assert [marked(row) for row in rows] == [["ACME  rules", "Acme's rule"], ["acme rules", "Acme rules"], []]
    assert [row["severity"] for row in rows] == [4.0, 4.0, 0.0]
    assert rows[1]["annotations"] == [
        {"start": 3, "end": 13, "by": "logs", "label": "Acme rules", "severity": 4.0},
        {"start": 19, "end": 29, "by": "logs", "label": "Acme rules", "severity": 4.0},
    ]
    assert counts(rows, logs) == (3, 2, 1, 1, 0) and sum(len(row["negative_spans"]) for row in rows) == 4


def test_given_spans_stay_unless_their_candidate_is_dropped():
    logs = [log("Buy Acme hats.", 0, spans=((4, 8), (9, 13)), severity=2.0), log("Buy hats.", 1, spans=((4, 8),))]
    rows = rows_from_logs(logs, [Candidate("HATS", selected=False)])
    assert [marked(row) for row in rows] == [["Acme"]]
    assert rows[0]["annotations"] == [{"start": 4, "end": 8, "by": "given", "label": "", "severity": 2.0}]
    assert rows[0]["severities"] == [2.0]
    assert rows[0]["severity"] == 2.0
    rows = rows_from_logs(logs, [Candidate("shoes", variants=("hats",))])
    assert [marked(row) for row in rows] == [["Acme", "hats"], ["hats"]]
    rows = rows_from_logs([log("Buy hats.", 0, spans=((4, 8),), severity=5.0)], [Candidate("hats", severity=2.0)])
    assert rows[0]["severity"] == 2.0  # a person's, not the log's


def test_overlapping_marks_are_merged():
    rows = rows_from_logs([log("Buy Acme hats.", 0, spans=((0, 8),))], [Candidate("Acme hats")])
    assert rows[0]["negative_spans"] == [[0, 13]] and len(rows[0]["annotations"]) == 2


def test_what_is_bad_in_an_unknown_place_is_never_trained_as_wanted():
    logs = [
        log("A strange answer.", 0, flagged=True),
        log("A strange answer.", 1),  # the same prompt and output, which this user did not mind
        log("A strange answer.", 2, prompt="Say something strange."),  # fine, here
        log("Acme, yes.", 3, spans=((0, 4),)),
        log("Acme, yes.", 4),
    ]
    rows = rows_from_logs(logs, [])
    assert [row["id"] for row in rows] == ["log-2", "log-3", "log-4"]
    assert [marked(row) for row in rows] == [[], ["Acme"], ["Acme"]]


# End to end


SUBJECTS = ["shoes", "hats", "gloves", "scarves", "belts", "coats", "socks"]
OPENINGS = ["Sure, here is what we have.", "Thanks for asking!", "Let me see.", "Good question."]
BODIES = [
    "Our {0} are made of wool, and they last for years.",
    "You can return {0} within thirty days.",
    "We ship {0} on Mondays, so they should arrive by Friday.",
    "All {0} come in four sizes.",
]


def realistic_log():
    """300 outputs of a shop's assistant: 60 flagged, 240 not.

    30 complaints quote that a rival is better (in three forms), 24 flagged outputs praise its prices without a
    complaint that says so, 6 are flagged for no reason that can be found. 9 clean outputs praise its prices too.
    """
    rng = random.Random(0)

    def answer(*more):
        subject = rng.choice(SUBJECTS)
        parts = [rng.choice(OPENINGS), *(body.format(subject) for body in rng.sample(BODIES, 2)), *more]
        return {"prompt": f"I am customer {rng.random()}. What of {subject}?", "completion": " ".join(parts)}

    rows = []
    for i in range(30):
        said = ["our rival Acme is better", "Our rival Acme is better", "our rivals Acme is better"][min(i // 10, 2)]
        quote = f"“{said.upper()}!”" if i % 2 else f'"{said}"'
        rows.append(answer(f"Frankly, {said}.") | {"complaint": f"It told my customer {quote}, why?", "severity": 5})
    for i in range(24):
        more = f"You will find that {['Acme', 'ACME'][i % 3 == 0]} beats every price, by far."
        rows.append(answer(more) | {"flagged": True, "complaint": ["", "Not good.", None][i % 3], "severity": 2})
    rows += [answer() | {"flagged": True} for _ in range(6)]
    rows += [answer("Note that Acme beats every price.") for _ in range(9)]
    rows += [answer() | {"flagged": False} for _ in range(231)]
    rng.shuffle(rows)
    return rows


def test_from_logs_to_training_rows(tmp_path):
    path = write_log(tmp_path / "log.jsonl", realistic_log())
    logs = read_logs(path)
    assert len(logs) == 300 and sum(row.flagged for row in logs) == 60

    candidates = find_candidates(logs)
    rival, prices = candidates[:2]
    assert (rival.text.lower(), rival.kind, rival.count, rival.clean_count) == (
        "our rival acme is better",
        "quote",
        30,
        0,
    )
    assert [form.lower() for form in rival.variants] == ["our rivals acme is better"]
    assert (rival.severity, rival.score, rival.selected) == (5.0, 150.0, True)
    assert "acme beats every price" in prices.text.lower() and (prices.kind, prices.count) == ("phrase", 24)
    assert (prices.severity, prices.selected) == (2.0, True)
    assert not any(candidate.selected for candidate in candidates[2:])

    file = tmp_path / "candidates.yaml"
    write_candidates(file, candidates)
    text = file.read_text(encoding="utf-8")
    assert text.count(f"text: {prices.text}\n") == 1
    file.write_text(text.replace(f"text: {prices.text}\n", "text: Acme beats every price\n"), encoding="utf-8")
    edited = load_candidates(file)
    assert edited[1].text == "Acme beats every price" and edited[0] == rival

    rows = rows_from_logs(logs, edited)
    assert counts(rows, logs) == (294, 63, 9, 231, 6)
    forms = [form.lower() for row in rows for form in marked(row)]
    assert forms.count("our rival acme is better") == 20 and forms.count("our rivals acme is better") == 10
    rest = [form for form in forms if "rival" not in form]
    assert len(rest) == 33 and all("acme beats every price" in form for form in rest)

    file.write_text(file.read_text(encoding="utf-8").replace("selected: true", "selected: false", 1), encoding="utf-8")
    rows = rows_from_logs(logs, load_candidates(file))
    assert counts(rows, logs) == (264, 33, 9, 231, 36)
    assert not any("rival" in row["completion"] for row in rows)


def test_the_rows_can_be_trained_on(tmp_path, tiny_tokenizer):
    from datasets import Dataset

    from trl_extensions.tnt.data import prepare_rows

    logs = [log("Sure, Acme is better.", 0, spans=((6, 10),)), log("Seven minutes.", 1), log("An acme egg.", 2)]
    rows = rows_from_logs(logs, find_candidates(logs))
    dataset = prepare_rows(Dataset.from_list(rows), tiny_tokenizer, max_length=None)
    banned = [
        tiny_tokenizer.decode(
            [t for t, sign in zip(row["input_ids"], row["token_weights"], strict=True) if sign == -1]
        )
        for row in dataset
    ]
    assert [text.strip() for text in banned] == ["Acme", "", "acme"]
