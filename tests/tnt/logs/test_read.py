import json
import random

import pytest

from trl_extensions.tnt.logs.candidate_file import load_candidates, write_candidates
from trl_extensions.tnt.logs.candidates import Candidate, find_candidates
from trl_extensions.tnt.logs.read import LogRow, read_logs, rows_from_logs


def write_log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log(text, index=0, prompt="Hi", **signs):
    """A row as `read_logs` makes it; flagged if there is any sign."""
    return LogRow(index, prompt, text, text, **({"flagged": bool(signs)} | signs))


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
    path = write_log(tmp_path / "log.jsonl", [{"asked": chat, "said": answer, "spans": [[0, 4]], "truncated": True}])
    (row,) = read_logs(path, prompt_column="asked", completion_column="said")
    assert (row.prompt, row.completion, row.text, row.truncated) == (chat, answer, "Acme.", True)
    ((trained,), _) = rows_from_logs([row], [])
    assert trained["completion"] == answer and trained["negative_spans"] == [[0, 4]] and trained["truncated"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"spans": [[0, 99]]}, r"row 2: the log: `spans\[0\]` is \[0, 99\), outside"),
        ({"spans": [[3, 1]]}, r"row 2: .*reversed"),
        ({"spans": [["0", "4"]]}, r"row 2: .*integers"),
        ({"severity": 6}, "row 2: `severity` must be a number from 1 to 5, got 6"),
        ({"severity": True}, "row 2: `severity`"),
        ({"severity": float("nan")}, "row 2: `severity`"),
        ({"flagged": "no"}, "row 2: `flagged` must be true or false, got 'no'"),
        ({"complaint": ["bad"]}, "row 2: `complaint` must be text"),
        ({"prompt": 3}, "row 2: the prompt must be a text or a list of chat messages, got 3"),
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
            "yes", keep=False, severity=4.25, kind="quote", count=7, clean_count=2, examples=("a: # 'b'", "🖕…")
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
    assert load_candidates(path) == [Candidate("Acme rules", keep=True)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("- Acme", "entry 2: expected a mapping with `text`"),
        ("- keep: true", "entry 2: `text` is missing"),
        ("- text: no", "entry 2: `text` must be text, got False; put it in quotes"),
        ("- text: ' '", r"entry 2 \(' '\): `text` is empty"),
        ("- {text: b, kep: false}", r"entry 2 \('b'\): unknown field 'kep'"),
        ("- {text: b, keep: maybe}", r"entry 2 \('b'\): `keep` must be true or false, got 'maybe'"),
        ("- {text: b, severity: 9}", r"entry 2 \('b'\): `severity` must be a number from 1 to 5, got 9"),
        ("- {text: b, severity: .nan}", r"entry 2 \('b'\): `severity`"),
        ("- {text: b, count: -1}", r"entry 2 \('b'\): `count` must be a number of outputs"),
        ("- {text: b, kind: word}", r"entry 2 \('b'\): `kind` must be one of span, quote, phrase"),
        ("- {text: b, kind: [span]}", r"entry 2 \('b'\): `kind` must be one of"),
        ("- {text: b, variants: c}", r"entry 2 \('b'\): `variants` must be a list of texts, got 'c'"),
        ("- {text: b, variants: [1]}", r"entry 2 \('b'\): `variants` must be text, got 1"),
        ("- {text: b, variants: ['A.']}", r"entry 2 \('b'\): 'A.' is in entry 1 too"),
        ("more: 1", "unknown key 'more'"),
        ("- {text: b", "not valid YAML"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, entry, message):
    path = tmp_path / "candidates.yaml"
    path.write_text(f"candidates:\n- text: a\n{entry}\n")
    with pytest.raises(ValueError, match=f"candidates.yaml: {message}") as error:
        load_candidates(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "candidates: []\n", "candidates: Acme\n", "- text: Acme\n"])
def test_a_file_without_candidates_is_refused(tmp_path, content):
    path = tmp_path / "candidates.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected the key `candidates` with a list"):
        load_candidates(path)


# Training rows


def test_candidates_are_marked_in_every_output():
    logs = [
        log("ACME  rules. Acme's rule.", 0, flagged=True),
        log("So acme rules, and Acme rules.", 1),
        log("Acmerules.", 2),
    ]
    rows, report = rows_from_logs(logs, [Candidate("Acme rules", variants=("Acme's rule",), severity=4.0)])
    assert [marked(row) for row in rows] == [["ACME  rules", "Acme's rule"], ["acme rules", "Acme rules"], []]
    assert [row["severity"] for row in rows] == [4.0, 4.0, 0.0]
    assert rows[1]["annotations"] == [
        {"start": 3, "end": 13, "by": "logs", "label": "Acme rules"},
        {"start": 19, "end": 29, "by": "logs", "label": "Acme rules"},
    ]
    assert (report.rows, report.with_span, report.newly_marked, report.clean, report.spans) == (3, 2, 1, 1, 4)


def test_given_spans_stay_unless_their_candidate_is_dropped():
    logs = [log("Buy Acme hats.", 0, spans=((4, 8), (9, 13)), severity=2.0), log("Buy hats.", 1, spans=((4, 8),))]
    rows, report = rows_from_logs(logs, [Candidate("HATS", keep=False)])
    assert [marked(row) for row in rows] == [["Acme"]] and report.unknown == 1
    assert rows[0]["annotations"] == [{"start": 4, "end": 8, "by": "given", "label": ""}]
    assert rows[0]["severity"] == 2.0
    rows, report = rows_from_logs(logs, [Candidate("shoes", variants=("hats",))])
    assert [marked(row) for row in rows] == [["Acme", "hats"], ["hats"]] and report.unknown == 0
    rows, _ = rows_from_logs([log("Buy hats.", 0, spans=((4, 8),), severity=5.0)], [Candidate("hats", severity=2.0)])
    assert rows[0]["severity"] == 2.0  # a person's, not the log's


def test_overlapping_marks_are_merged():
    rows, _ = rows_from_logs([log("Buy Acme hats.", 0, spans=((0, 8),))], [Candidate("Acme hats")])
    assert rows[0]["negative_spans"] == [[0, 13]] and len(rows[0]["annotations"]) == 2


def test_what_is_bad_in_an_unknown_place_is_never_trained_as_wanted():
    logs = [
        log("A strange answer.", 0, flagged=True),
        log("A strange answer.", 1),  # the same prompt and output, which this user did not mind
        log("A strange answer.", 2, prompt="Say something strange."),  # fine, here
        log("Acme, yes.", 3, spans=((0, 4),)),
        log("Acme, yes.", 4),
    ]
    rows, report = rows_from_logs(logs, [])
    assert [row["id"] for row in rows] == ["log-2", "log-3", "log-4"]
    assert [marked(row) for row in rows] == [[], ["Acme"], ["Acme"]]
    assert report.unknown == 2
    assert report.summary.endswith("2 left out because their bad part is unknown")


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
    assert (rival.severity, rival.score, rival.keep) == (5.0, 150.0, True)
    assert "acme beats every price" in prices.text.lower() and (prices.kind, prices.count) == ("phrase", 24)
    assert (prices.severity, prices.keep) == (2.0, True)
    assert not any(candidate.keep for candidate in candidates[2:])

    file = tmp_path / "candidates.yaml"
    write_candidates(file, candidates)
    text = file.read_text(encoding="utf-8")
    assert text.count(f"text: {prices.text}\n") == 1
    file.write_text(text.replace(f"text: {prices.text}\n", "text: Acme beats every price\n"), encoding="utf-8")
    edited = load_candidates(file)
    assert edited[1].text == "Acme beats every price" and edited[0] == rival

    rows, report = rows_from_logs(logs, edited)
    assert (report.rows, report.with_span, report.newly_marked, report.clean, report.unknown) == (294, 63, 9, 231, 6)
    forms = [form.lower() for row in rows for form in marked(row)]
    assert forms.count("our rival acme is better") == 20 and forms.count("our rivals acme is better") == 10
    rest = [form for form in forms if "rival" not in form]
    assert len(rest) == 33 and all("acme beats every price" in form for form in rest)

    file.write_text(file.read_text(encoding="utf-8").replace("keep: true", "keep: false", 1), encoding="utf-8")
    rows, report = rows_from_logs(logs, load_candidates(file))
    assert (report.with_span, report.clean, report.unknown) == (33, 231, 36)
    assert not any("rival" in row["completion"] for row in rows)


def test_the_rows_can_be_trained_on(tmp_path, tiny_tokenizer):
    from datasets import Dataset

    from trl_extensions.tnt.data import prepare_rows

    logs = [log("Sure, Acme is better.", 0, spans=((6, 10),)), log("Seven minutes.", 1), log("An acme egg.", 2)]
    rows, _ = rows_from_logs(logs, find_candidates(logs))
    dataset = prepare_rows(Dataset.from_list(rows), tiny_tokenizer, max_length=None)
    banned = [
        tiny_tokenizer.decode(
            [t for t, sign in zip(row["input_ids"], row["token_weights"], strict=True) if sign == -1]
        )
        for row in dataset
    ]
    assert [text.strip() for text in banned] == ["Acme", "", "acme"]
