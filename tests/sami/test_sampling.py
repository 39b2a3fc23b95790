import json
import logging
import random

import pytest

from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.sami.data import TRAINING_TEMPLATE, load_rows, render, to_dataset
from trl_extensions.sami.principles import Principle, sample_constitutions
from trl_extensions.sami.sampling import (
    REASONS,
    ResponseFilters,
    is_echo,
    is_evasive,
    rejection_reason,
    sample_rows,
)


PRINCIPLES = [Principle("brief", "Be {brief}.", "Be long."), Principle("kind", "Be kind.", "Be stern.")]
QUERIES = [Query.from_text(f"question {{number}} {number}?") for number in range(12)]
PARAMS = GenerationParams(max_new_tokens=20, stop=("END",))
SAMPLE, TRAIN = "S {{ {query} | {constitution}", "T {constitution} | {query}"


class KilledError(Exception):
    pass


def answer(prompt):
    """A response that depends on the prompt alone; queries 3, 6 and 9 get equal ones, query 4 an evasive one."""
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    number = int(text.split("?")[0].split()[-1])
    if number in (3, 6, 9):
        return "the same"
    if number == 4:
        return "I'm sorry."
    return "response to " + text.replace("\n", " ").replace("1. ", "").replace("2. ", "")


class ScriptedEngine:
    """Answers in shuffled order; is killed after `dies_after` answers."""

    name = "scripted"

    def __init__(self, shuffle=0, dies_after=None):
        self.random = random.Random(shuffle)
        self.dies_after = dies_after
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append(list(prompts))
        order = list(range(len(prompts)))
        self.random.shuffle(order)
        for index in order:
            if self.dies_after is not None:
                if self.dies_after == 0:
                    raise KilledError
                self.dies_after -= 1
            text = answer(prompts[index])
            finish = "length" if "question {number} 7?" in str(prompts[index]) else "stop"
            yield index, Generation(text=text, finish_reason=finish, num_tokens=len(text.split()))

    @property
    def asked(self):
        return [prompt for call in self.calls for prompt in call]


def run(tmp_path, engine=None, name="rows.jsonl", **options):
    settings = {
        "sampling_template": SAMPLE,
        "training_template": TRAIN,
        "params": PARAMS,
        "seed": 5,
        "conversational": False,
        "filters": ResponseFilters(drop_echo=False),
        "output": tmp_path / name,
    } | options
    queries = settings.pop("queries", QUERIES)
    principles = settings.pop("principles", PRINCIPLES)
    return sample_rows(engine or ScriptedEngine(), queries, principles, **settings)


def by_id(path):
    return {row["id"]: row for row in read_jsonl(path)}


def test_a_row_pairs_each_constitution_with_its_own_response(tmp_path):
    engine = ScriptedEngine()
    run(tmp_path, engine, queries=QUERIES[:2], num_constitutions=3)
    rows = by_id(tmp_path / "rows.jsonl")
    for index, query in enumerate(QUERIES[:2]):
        constitutions = sample_constitutions(PRINCIPLES, 3, seed=5, key=query.id)
        row = rows[query.id]
        assert (row["query"], row["index"], row["kept"], row["reason"]) == (query.text, index, True, None)
        assert row["constitutions"] == [c.text for c in constitutions]
        assert row["choices"] == [c.choices for c in constitutions]
        assert row["sampled_prompts"] == [f"T {c.text} | {query.text}" for c in constitutions]
        redrawn = sample_constitutions(PRINCIPLES, 3, seed=5, key=query.id, purpose="train")
        assert row["prompts"] == [f"T {c.text} | {query.text}" for c in redrawn]
        assert [c.choices for c in redrawn] == row["choices"]
        sampled = [f"S {{ {query.text} | {c.text}" for c in constitutions]
        assert row["completions"] == [answer(prompt) for prompt in sampled]
        assert row["num_tokens"] == [len(answer(prompt).split()) for prompt in sampled]
        assert row["truncated"] == [False] * 3
        assert all(prompt in engine.asked for prompt in sampled)


def test_conversational_rows_hold_messages(tmp_path):
    engine = ScriptedEngine()
    run(tmp_path, engine, queries=QUERIES[:1], conversational=True)
    [row] = read_jsonl(tmp_path / "rows.jsonl")
    assert [prompt[0]["role"] for prompt in engine.asked] == ["user", "user"]
    assert [[message["role"] for message in prompt] for prompt in row["prompts"]] == [["user"], ["user"]]
    assert row["sampled_prompts"] == [
        [{"role": "user", "content": f"T {text} | {QUERIES[0].text}"}] for text in row["constitutions"]
    ]
    assert row["completions"] == [[{"role": "assistant", "content": answer(prompt)}] for prompt in engine.asked]


def test_dropped_rows_are_kept_on_disk_and_counted(tmp_path):
    report = run(tmp_path)
    rows = by_id(tmp_path / "rows.jsonl")
    reasons = {3: "equal", 4: "equal", 6: "equal", 7: "too_long", 9: "equal"}
    assert [rows[query.id]["reason"] for query in QUERIES] == [reasons.get(number) for number in range(12)]
    assert rows[QUERIES[7].id]["truncated"] == [True, True]
    assert (report.sampled, report.kept, report.dropped, report.resumed) == (12, 7, {"equal": 4, "too_long": 1}, 0)
    assert report.tokens == sum(sum(row["num_tokens"]) for row in rows.values())
    assert "12 rows sampled, 7 kept, 5 dropped (4 equal, 1 too_long)" in report.summary
    assert "\n" not in report.summary


def test_rows_load_in_query_order_without_the_dropped_ones(tmp_path):
    run(tmp_path, ScriptedEngine(shuffle=3))
    in_file = [row["index"] for row in read_jsonl(tmp_path / "rows.jsonl")]
    assert in_file != sorted(in_file)
    assert [row["index"] for row in load_rows(tmp_path / "rows.jsonl")] == [0, 1, 2, 5, 8, 10, 11]
    assert [row["index"] for row in load_rows(tmp_path / "rows.jsonl", kept_only=False)] == list(range(12))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_sampling_stops_at_the_needed_rows_whatever_the_chunk_size_and_timing(tmp_path, chunk_size):
    engine = ScriptedEngine(shuffle=chunk_size)
    report = run(tmp_path, engine, needed=5, chunk_size=chunk_size)
    # The fifth good query is number 8.
    assert set(by_id(tmp_path / "rows.jsonl")) == {query.id for query in QUERIES[:9]}
    assert (report.sampled, report.kept) == (9, 5)
    assert len(engine.asked) == 18


@pytest.mark.parametrize("dies_after", [0, 1, 3, 7, 8, 15])
def test_a_killed_run_resumes_without_repeating_a_finished_row(tmp_path, dies_after):
    whole = run(tmp_path, needed=5, chunk_size=4, name="whole.jsonl")
    killed = ScriptedEngine(shuffle=1, dies_after=dies_after)
    with pytest.raises(KilledError):
        run(tmp_path, killed, needed=5, chunk_size=4)
    finished = by_id(tmp_path / "rows.jsonl")
    engine = ScriptedEngine(shuffle=2)
    report = run(tmp_path, engine, needed=5, chunk_size=4)
    assert report.resumed == len(finished)
    assert len(engine.asked) == 2 * (whole.sampled - len(finished))
    assert not any(row["query"] in prompt for row in finished.values() for prompt in engine.asked)
    assert by_id(tmp_path / "rows.jsonl") == by_id(tmp_path / "whole.jsonl")
    assert (report.sampled, report.kept, report.dropped) == (whole.sampled, whole.kept, whole.dropped)


def test_finished_rows_are_on_disk_when_the_engine_dies(tmp_path):
    # Thirteen answers to twelve queries: at least one query has both of its own.
    with pytest.raises(KilledError):
        run(tmp_path, ScriptedEngine(shuffle=0, dies_after=13))
    assert len(read_jsonl(tmp_path / "rows.jsonl")) >= 1


def test_a_half_written_last_line_is_repaired(tmp_path):
    run(tmp_path, name="whole.jsonl")
    path = tmp_path / "rows.jsonl"
    run(tmp_path)
    complete = path.read_bytes()
    path.write_bytes(complete[:-30])
    engine = ScriptedEngine()
    assert run(tmp_path, engine).resumed == 11
    assert len(engine.asked) == 2
    assert by_id(path) == by_id(tmp_path / "whole.jsonl")


def test_a_finished_run_does_nothing_again(tmp_path):
    run(tmp_path)
    before = (tmp_path / "rows.jsonl").read_bytes()
    engine = ScriptedEngine()
    report = run(tmp_path, engine)
    assert engine.asked == [] and (tmp_path / "rows.jsonl").read_bytes() == before
    assert (report.sampled, report.resumed, report.tokens) == (12, 12, 0)


def test_more_queries_or_more_needed_rows_extend_a_run(tmp_path):
    run(tmp_path, queries=QUERIES[:6], needed=2)
    assert run(tmp_path, needed=6).sampled == 11


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 6}, "seed was 5, now 6"),
        ({"params": GenerationParams(max_new_tokens=21, stop=("END",))}, "params.max_new_tokens was 20, now 21"),
        ({"sampling_template": SAMPLE + "!"}, "sampling_template was"),
        ({"training_template": TRAIN + "!"}, "training_template was"),
        ({"num_constitutions": 3}, "num_constitutions was 2, now 3"),
        ({"principles": PRINCIPLES[::-1]}, "principles was"),
        ({"conversational": True}, "conversational was false, now true"),
        ({"filters": ResponseFilters()}, "filters.drop_echo was false, now true"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, changed, named):
    run(tmp_path, queries=QUERIES[:2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError) as error:
        run(tmp_path, **changed)
    assert named in str(error.value) and "another output" in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_engine_is_refused(tmp_path):
    run(tmp_path, queries=QUERIES[:2])
    engine = ScriptedEngine()
    engine.name = "other"
    with pytest.raises(ValueError, match='engine was "scripted", now "other"'):
        run(tmp_path, engine)


def test_settings_without_rows_may_change(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, ScriptedEngine(dies_after=0))
    assert run(tmp_path, seed=6).sampled == 12
    assert json.loads((tmp_path / "rows.settings.json").read_text())["seed"] == 6


def test_rows_of_other_queries_or_without_settings_are_refused(tmp_path):
    run(tmp_path, queries=QUERIES[:3])
    with pytest.raises(ValueError, match="is not among the rows given"):
        run(tmp_path, queries=QUERIES[2:])
    (tmp_path / "rows.settings.json").unlink()
    with pytest.raises(ValueError, match=r"rows\.settings\.json is missing"):
        run(tmp_path)


def test_too_few_kept_rows_warn_with_counts(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report = run(tmp_path, needed=8)
    assert report.kept == 7
    assert "only 7 of 8 needed rows kept: all 12 queries are used up, 5 dropped (4 equal, 1 too_long)" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampling_template": "{query} {constitution} {persona}"}, "persona"),
        ({"sampling_template": "{query} only"}, "constitution"),
        ({"training_template": "{constitution} only"}, "query"),
        ({"training_template": "{query} {constitution} {"}, "training_template"),
        ({"training_template": "{query} {constitution} {}"}, "training_template"),
        ({"queries": []}, "no rows"),
        ({"queries": [QUERIES[0], QUERIES[0]]}, "occurs twice"),
        ({"num_constitutions": 5}, "at least 3 principles"),
        ({"num_constitutions": 1}, "at least 2"),
        ({"chunk_size": 0}, "`chunk_size` is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, changed, message):
    with pytest.raises(ValueError) as error:
        run(tmp_path, **changed)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_template_holds_query_and_constitution_as_they_are():
    query, constitution = "What {is} it?", "1. Be {kind}.\n2. Be brief."
    text = render(TRAINING_TEMPLATE, query=query, constitution=constitution, conversational=False)
    assert text.count(query) == text.count(constitution) == 1


def test_kept_rows_become_a_dataset(tmp_path):
    pytest.importorskip("datasets")
    run(tmp_path, conversational=True)
    rows = load_rows(tmp_path / "rows.jsonl")
    dataset = to_dataset(rows)
    assert dataset.column_names == ["id", "prompts", "completions", "truncated", "query"]
    assert dataset[3] == {name: rows[3][name] for name in dataset.column_names}
    with pytest.raises(ValueError, match="no rows"):
        to_dataset([])


def test_rows_that_are_not_ours_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: column 'index' is missing"):
        load_rows(path)


# Filters

CONSTITUTIONS = ["1. Be brief.\n2. Answer like a pirate would do.", "1. Answer like a judge would do.\n2. Be long."]


def reason(*texts, filters=None, finish="stop", tokens=3, constitutions=CONSTITUTIONS):
    responses = [Generation(text=text, finish_reason=finish, num_tokens=tokens) for text in texts]
    return rejection_reason(responses, constitutions, filters or ResponseFilters())


def test_good_responses_pass():
    assert reason("Arr, seven minutes.", "The court finds that seven minutes suffice.") is None


@pytest.mark.parametrize("blank", ["", "  \n", "...", "**"])
def test_a_response_without_a_letter_is_empty(blank):
    assert reason("Fine.", blank) == "empty"


def test_equal_up_to_case_and_white_space():
    assert reason("Seven  minutes.\n", "seven minutes.") == "equal"
    assert reason("Seven minutes.", "Seven minutes!") is None
    assert reason("Seven.", "seven.", filters=ResponseFilters(drop_equal=False)) is None


def test_equal_looks_at_every_pair():
    three = [*CONSTITUTIONS, "1. Be kind.\n2. Be odd."]
    assert reason("a", "b", "A", constitutions=three) == "equal"
    assert reason("a", "b", "c", constitutions=three) is None


@pytest.mark.parametrize(
    ("text", "evasive"),
    [
        ("I'm sorry, but no.", True),
        ("I’m  SORRY to say", True),
        ('"I cannot do that."', True),
        ("As an AI language model, I think", True),
        ("**Sorry**, no.", True),
        ("Sorrysburg is a town.", False),
        ("You could say: I'm sorry.", False),
        ("I cannotate text.", False),
        ("As an aide, I help.", False),
        ("申し訳ありませんが、お答えできません。", True),
        ("「私はAIなので分かりません」", True),
        ("卵は申し訳ありませんが切れています。", False),
    ],
)
def test_evasive_openings_match_whole_words_at_the_start(text, evasive):
    assert is_evasive(text) is evasive
    assert (reason("Fine.", text) == "evasive") is evasive


def test_evasive_openings_can_be_set():
    assert reason("Nope, never.", "Yes.", filters=ResponseFilters(evasive_openings=("nope",))) == "evasive"
    assert reason("I'm sorry.", "Yes.", filters=ResponseFilters(evasive_openings=())) is None


def test_too_long():
    assert reason("a", "b", finish="length") == "too_long"
    assert reason("a", "b", finish="length", filters=ResponseFilters(drop_truncated=False)) is None
    assert reason("a", "b", tokens=9, filters=ResponseFilters(max_tokens=9)) is None
    assert reason("a", "b", tokens=10, filters=ResponseFilters(max_tokens=9)) == "too_long"


def test_echo_in_a_script_without_spaces():
    rules = "1. 短く。\n2. 答えは箇条書きで書いてください。"
    assert is_echo("はい、答えは箇条書きで書いてください、ですね。", rules)
    assert not is_echo("話は短く。卵は十分です。", rules)  # "短く。" is too short to be one


@pytest.mark.parametrize(
    ("text", "echo"),
    [
        ("Sure:\n1. Be brief.\nSeven.", True),  # a numbered line
        ("be  brief. Seven.", True),  # starts with an instruction
        ("I will answer like a pirate would do: arr.", True),  # a long instruction anywhere
        ("It pays to be brief. Seven.", False),  # a short one inside ordinary speech
        ("Like a judge, I say seven.", False),
    ],
)
def test_echo(text, echo):
    assert is_echo(text, CONSTITUTIONS[0]) is echo
    assert (reason(text, "A fine answer.") == "echo") is echo


def test_echo_is_about_the_responses_own_constitution():
    assert reason("Answer like a judge would do.", "Answer like a pirate would do.") is None
    assert reason("Fine.", "Answer like a judge would do.") == "echo"
    assert reason("Fine.", "Answer like a judge would do.", filters=ResponseFilters(drop_echo=False)) is None


def test_the_first_reason_counts():
    assert REASONS == ("empty", "equal", "evasive", "too_long", "echo", "disobedient")
    assert reason("", "", finish="length") == "empty"
    assert reason("I'm sorry", "I'm sorry", finish="length") == "equal"
    assert reason("I'm sorry", "1. Be brief.", finish="length") == "evasive"
    assert reason("1. Be brief.", "Fine.", finish="length") == "too_long"


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`max_tokens` is 0"):
        ResponseFilters(max_tokens=0)
    with pytest.raises(ValueError, match="empty opening"):
        ResponseFilters(evasive_openings=("I'm sorry", " "))
    with pytest.raises(TypeError, match="list of openings"):
        ResponseFilters(evasive_openings="I'm sorry")
    with pytest.raises(ValueError, match="1 responses for 2 constitutions"):
        reason("alone")
