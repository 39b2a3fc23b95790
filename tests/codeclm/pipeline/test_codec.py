"""The pipeline, with models that answer by rule: in this process, and behind a real HTTP server that misbehaves."""

import json
import logging
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import openai
import pytest

from tests.codeclm.fake import FakeEngine, Rules
from tests.codeclm.server import FAILURES, Server, finished_calls, key_of_call, serving
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.codeclm.pipeline.steps import ACTIONS
from trl_extensions.codeclm.report import collect
from trl_extensions.core.generation import endpoint
from trl_extensions.core.generation.endpoint import EndpointEngine, EndpointError
from trl_extensions.core.generation.types import Generation
from trl_extensions.core.runs.jsonl import read_jsonl


SEEDS = [f"Please help me with the {word} that I found in my old {word} box" for word in "abcdefghijkl"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, request):
    """No figures where they are not looked at: drawing takes longer than all the rest; retries come at once, and
    without warnings."""
    for module, first, longest in (
        (openai._base_client, "INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"),
        (endpoint, "_FIRST_PAUSE", "_LONGEST_PAUSE"),
    ):
        monkeypatch.setattr(module, first, 0.001)
        monkeypatch.setattr(module, longest, 0.001)
    monkeypatch.setattr(logging.getLogger("trl_extensions.core.generation.endpoint"), "disabled", True)
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("trl_extensions.codeclm.pipeline.codec.write_codeclm_report", lambda folder, **_: folder)


@pytest.fixture
def with_report():
    pass


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    path.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in SEEDS))
    return str(path)


def codec(folder, engines, *, prices=None, seed=42, **settings):
    """A run of two engines, or one, with rewrites by Self-Rubrics unless said otherwise."""
    roles = dict(zip(("strong", "target"), engines, strict=False))
    settings = {"num_instructions": 12, "max_rounds": 3} | settings
    return CodecLM(CodecLMConfig(**settings), folder, prices=prices, seed=seed, **roles)


def fakes(rules=None):
    rules = rules or Rules()
    return [FakeEngine(rules, "strong"), FakeEngine(rules, "target")]


def remote(url, concurrency=8, max_retries=60):
    options = {"concurrency": concurrency, "max_retries": max_retries}
    return [EndpointEngine(url, name, **options) for name in ("strong", "target")]


def data(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("metadata.jsonl", "basics.jsonl", "data.jsonl")}


def items(folder):
    return {row["id"]: row for row in read_jsonl(Path(folder) / "items.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(seeds, tmp_path_factory):
    """The folder of a run in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_extensions.codeclm.pipeline.codec.write_codeclm_report", lambda folder, **_: folder)
        result = codec(folder, fakes(), prompts=seeds).run()
    outcomes = Counter(row["outcome"] for row in items(folder).values())
    assert result.stopped is None and outcomes["kept"] == result.pairs and min(outcomes.values()) > 0, outcomes
    return folder


# The same data, whatever happens on the way


SERVERS = {
    "one at a time": (1, {}),
    "64 at a time": (64, {}),
    "every third fails": (64, {"failures": 0.35, "seed": 1}),
    "most fail, in any order": (16, {"failures": 0.6, "seed": 2, "delay": 0.002, "spread": 1.0}),
}


@pytest.mark.parametrize("name", list(SERVERS))
def test_the_same_data_through_a_server(seeds, undisturbed, tmp_path, name):
    """As in this process, nothing lost, nothing answered twice; what is in the log is what the server answered."""
    concurrency, behaviour = SERVERS[name]
    server = Server(**behaviour)
    with serving(server) as url:
        result = codec(tmp_path, remote(url, concurrency), prompts=seeds).run()
    assert result.failed == 0 and result.stopped is None
    assert data(tmp_path) == data(undisturbed)
    assert items(tmp_path) == items(undisturbed)
    calls = Counter(map(key_of_call, finished_calls(tmp_path)))
    assert set(server.answered.values()) == {1} and calls == server.answered
    assert server.most_in_flight <= 2 * concurrency
    if "failures" in behaviour:
        assert set(server.failed) == set(FAILURES)
        assert sum(server.received.values()) == sum(server.failed.values()) + len(calls)


def test_empty_answers_are_asked_for_again(seeds, undisturbed, tmp_path):
    server = Server(failures=0.3, kinds=("empty", "500"), seed=3)
    with serving(server) as url:
        codec(tmp_path, remote(url), prompts=seeds).run()
    assert server.failed["empty"] > 3
    assert data(tmp_path) == data(undisturbed) and set(server.answered.values()) == {1}


def test_another_seed_is_other_data(seeds, undisturbed, tmp_path):
    codec(tmp_path, fakes(), prompts=seeds, seed=7).run()
    assert data(tmp_path)["basics.jsonl"] != data(undisturbed)["basics.jsonl"]


def test_a_finished_run_asks_nothing_more(seeds, undisturbed, tmp_path):
    engines = fakes()
    before = data(undisturbed)
    result = codec(undisturbed, engines, prompts=seeds).run()
    assert sum(engine.calls for engine in engines) == 0 and data(undisturbed) == before and result.failed == 0


# Counted by hand

METADATA = """\
- {use_case: trip planning, skills: [geography]}
- {use_case: poem writing, skills: [rhyme, patience]}
- {use_case: bug fixing, skills: [logic]}
"""
BASICS = {
    "trip planning": [
        "Plan a trip to the lake at grade 0.",
        "List what one packs for the mountains at grade 1.",
        "Compare three night trains across the country at grade 3.",
    ],
    "poem writing": [
        "Write a poem about an old bridge at grade 5.",
        "Invent a rhyme on rain that stands upside down at grade 0.",
        "Compose four lines about a cat that sleeps, when wavering at grade 0.",
    ],
    "bug fixing": [
        "Find the fault in this loop with flattery at grade 0.",
        "Fix it.",
        "Find the fault in this loop with flattery at grade 0 today.",
    ],
}


@pytest.fixture
def metadata(tmp_path):
    (tmp_path / "metadata.yaml").write_text(METADATA)
    return {"metadata": str(tmp_path / "metadata.yaml"), "num_instructions": 9, "max_rounds": 4}


def steps_of(folder):
    return Counter(row["step"] for row in finished_calls(folder))


def test_counts_by_hand(metadata, tmp_path, with_report):
    """Three basic instructions of each of three metadata; of the third one is too short, and one a copy."""
    folder = tmp_path / "run"
    engines = fakes(Rules(BASICS))
    prices = {"strong": (2e6, 0.0), "target": (0.0, 1e6)}
    result = codec(folder, engines, prices=prices, **metadata).run()
    assert (result.pairs, result.failed, result.stopped) == (5, 0, None)
    got = items(folder)
    assert set(got) == {f"m00{m}-i000{i}" for m, n in enumerate((3, 3, 1)) for i in range(n)}
    outcomes = {
        id: (row["outcome"], row["reason"], row["winner"], row["iteration"], len(row["rounds"]))
        for id, row in got.items()
    }
    assert outcomes == {
        "m000-i0000": ("kept", None, "strong", 2, 2),
        "m000-i0001": ("kept", None, "strong", 2, 2),
        "m000-i0002": ("kept", None, "strong", 4, 4),
        "m001-i0000": ("dropped", "no gap", None, None, 5),
        "m001-i0001": ("kept", None, "target", 2, 2),
        "m001-i0002": ("kept", None, "strong", 2, 2),
        "m002-i0000": ("set_aside", "score: there are no two scores", None, None, 2),
    }
    # The scorer gives a point more to the first: 10 and 3, then 4 and 9
    basic, first = got["m000-i0000"]["rounds"]
    assert basic == {"instruction": BASICS["trip planning"][0], "action": None}, (
        "it is rewritten before it is filtered"
    )
    assert first["orders"] == [[10.0, 3.0], [9.0, 4.0]]
    assert first["scores"] == {"strong": 9.5, "target": 3.5, "gap": 6.0}
    assert [own["scores"]["gap"] for own in got["m000-i0002"]["rounds"][1:]] == [1.0, 1.0, 6.0]
    assert got["m001-i0001"]["rounds"][1]["scores"] == {"strong": 3.5, "target": 9.5, "gap": -6.0}
    assert got["m002-i0000"]["raw"] == ["Both are great."] * 2
    assert got["m000-i0001"]["rounds"][0]["action"] is None and got["m000-i0001"]["rounds"][1]["action"]
    # Three waves for what is missing of the third metadata: each time the same copy, and one that is too short
    counts = json.loads((folder / "basics.json").read_text())
    assert counts == {"asked": 9, "made": 7, "dropped": {"too short": 3, "near-duplicate": 3}}
    # 12 rounds: a rewrite, two answers and two scores each, and for two of the rounds both scores again
    assert steps_of(folder) == {
        "decode": 3 + 1 + 1, "answer": 24, "score": 24, "score:again": 4, "rewrite": 1 + 1 + 3 + 4 + 3, "rubrics": 3,
    }  # fmt: skip
    rows = read_jsonl(folder / "data.jsonl")
    assert [row["lineage"]["id"] for row in rows] == [id for id in sorted(outcomes) if outcomes[id][0] == "kept"]
    assert rows[2]["lineage"]["gaps"] == [1.0, 1.0, 6.0] and rows[1]["iteration"] == 2
    assert (
        rows[1]["lineage"]["basic"] == BASICS["trip planning"][1] and "Also mention" in rows[1]["prompt"][0]["content"]
    )
    assert rows[3]["completion"][0]["content"].startswith("target answers with quality 9 under seed ")
    report = json.loads((folder / "report.json").read_text())
    calls = finished_calls(folder)
    cost = sum(
        2.0 * row["reply"]["num_prompt_tokens"] if row["engine"] == "endpoint:strong" else row["reply"]["num_tokens"]
        for row in calls
    )
    assert report["calls"]["cost"] == pytest.approx(cost) and cost > 0
    assert "7 basic instructions" in result.report.read_text() and result.report.name == "report.md"


def test_scores_by_probabilities(metadata, tmp_path):
    """Scores are what the digits say: 9 and 3 where there is a gap, without a bias; four calls a round."""
    server = Server(Rules(BASICS))
    with serving(server) as url:
        codec(tmp_path / "run", remote(url), scoring="logprobs", **metadata).run()
    got = items(tmp_path / "run")
    _, first = got["m000-i0000"]["rounds"]
    assert first["scores"] == pytest.approx({"strong": 9.0, "target": 3.0, "gap": 6.0})
    assert [own["scores"]["gap"] for own in got["m000-i0002"]["rounds"][1:]] == pytest.approx([1.0, 1.0, 6.0])
    assert got["m001-i0002"]["outcome"] == "kept" and got["m001-i0002"]["scoring"] == "logprobs"
    aside = got["m002-i0000"]
    assert aside["outcome"] == "set_aside" and "of the probability" in aside["reason"] and aside["raw"] == []
    assert steps_of(tmp_path / "run")["score_one"] == 12 * 4 and set(server.answered.values()) == {1}
    codec(tmp_path / "local", fakes(Rules(BASICS)), scoring="logprobs", **metadata).run()
    assert items(tmp_path / "local") == got and data(tmp_path / "local") == data(tmp_path / "run")


def test_the_threshold_is_not_included(metadata, tmp_path):
    codec(tmp_path / "run", fakes(Rules(BASICS)), gap_threshold=6.0, **metadata).run()
    outcomes = Counter(row["outcome"] for row in items(tmp_path / "run").values())
    assert outcomes == {"dropped": 6, "set_aside": 1} and read_jsonl(tmp_path / "run" / "data.jsonl") == []


class Told(FakeEngine):
    """Writes down what it is asked, in order, with the instruction it is about."""

    asked: list

    def generate(self, prompts, params, seeds=None):
        for place, own in super().generate(prompts, params, seeds):
            step, fields = self.rules._recognise(prompts[place][0]["content"])
            self.asked.append((step, fields.get("instruction"), fields.get("action")))
            yield place, own


@pytest.mark.parametrize(("rewrite", "step"), [("rubrics", "rewrite"), ("evol", "evol")])
def test_rewritten_before_it_is_filtered_and_by_another_action_each_time(tmp_path, rewrite, step):
    """One instruction without a gap: four rounds, in each of which it is rewritten, answered and scored."""
    (tmp_path / "one.yaml").write_text("- {use_case: poem writing, skills: [rhyme]}\n")
    rules, asked = Rules({"poem writing": ["Write a poem about an old bridge at grade 5."]}), []
    engines = [Told(rules, "strong"), Told(rules, "target")]
    for engine in engines:
        engine.asked = asked
    codec(
        tmp_path / "run", engines, metadata=str(tmp_path / "one.yaml"), num_instructions=1, max_rounds=4,
        rewrite=rewrite,
    ).run()  # fmt: skip
    before = ["decode"] + ["rubrics"] * (rewrite == "rubrics")
    one_round = [step, "respond", "respond", "score", "score"]
    assert [name for name, *_ in asked] == before + 4 * one_round
    texts = [own["instruction"] for own in items(tmp_path / "run")["m000-i0000"]["rounds"]]
    for number in range(4):
        name, *others = asked[len(before) + 5 * number : len(before) + 5 * number + 5]
        assert name[1] == texts[number] and {own[1] for own in others} == {texts[number + 1]}
    actions = [action for name, _, action in asked if name == step]
    assert len(set(actions)) == 4 and (rewrite != "evol" or set(actions) < set(ACTIONS))


@pytest.mark.parametrize(("selection", "outcome"), [("gap", "dropped"), ("all", "kept"), ("random", "kept")])
def test_a_chain_ends_with_its_actions(metadata, tmp_path, selection, outcome):
    """Two rubrics, so two rewrites at most of an instruction that would need five."""
    settings = metadata | {"num_rubrics": 2, "selection": selection}
    codec(tmp_path / "run", fakes(Rules(BASICS)), **settings).run()
    row = items(tmp_path / "run")["m001-i0000"]
    assert row["outcome"] == outcome and len(row["rounds"]) == 3 - (row["iteration"] == 2)
    assert selection != "gap" or "no action" in row["reason"]


@pytest.mark.parametrize(("rewrite", "step"), [("rubrics", "rewrite"), ("evol", "evol")])
def test_the_last_version_unscored(metadata, tmp_path, rewrite, step):
    """Every instruction is rewritten three times and answered once, by the strong model, also without a target."""
    folder = tmp_path / "run"
    codec(
        folder, fakes(Rules(BASICS))[:1], **(metadata | {"selection": "all", "rewrite": rewrite, "max_rounds": 3})
    ).run()
    got = items(folder).values()
    assert len(got) == 7 and all(row["outcome"] == "kept" and row["iteration"] == 4 for row in got)
    assert all(row["scoring"] is None and list(row["rounds"][3]["answers"]) == ["strong"] for row in got)
    expected = {"decode": 5, "answer": 7, step: 21} | ({"rubrics": 3} if rewrite == "rubrics" else {})
    assert steps_of(folder) == expected
    actions = {own["action"] for row in got for own in row["rounds"][1:]}
    assert (actions <= set(ACTIONS)) is (rewrite == "evol") and len(actions) > 1
    assert all(row["scores"] is None and row["winner"] == "strong" for row in read_jsonl(folder / "data.jsonl"))


def test_a_version_at_random(seeds, tmp_path):
    """Sixty draws of one to three rewrites: each comes up, as the seed has it."""
    settings = {"prompts": seeds, "selection": "random", "num_instructions": 60}
    codec(tmp_path / "one", fakes()[:1], **settings).run()
    drawn = Counter(row["iteration"] for row in items(tmp_path / "one").values())
    assert sorted(drawn) == [2, 3, 4] and min(drawn.values()) >= 5
    rewrites = steps_of(tmp_path / "one")["rewrite"]
    assert rewrites == drawn[2] + 2 * drawn[3] + 3 * drawn[4], "what comes after the version is not made"
    codec(tmp_path / "two", fakes()[:1], **settings).run()
    assert items(tmp_path / "two") == items(tmp_path / "one")


@pytest.mark.parametrize("selection", ["gap", "random", "all"])
def test_basic_instructions_only(metadata, tmp_path, selection):
    folder = tmp_path / "run"
    codec(folder, fakes(Rules(BASICS)), rewrite="none", selection=selection, **metadata).run()
    kept = [id for id, row in items(folder).items() if row["outcome"] == "kept"]
    if selection == "gap":
        assert sorted(kept) == ["m000-i0000", "m001-i0001", "m001-i0002"]
    assert len(kept) == (3 if selection == "gap" else 7)
    assert all(len(row["rounds"]) == 1 for row in items(folder).values())
    assert not {"rewrite", "rubrics", "evol"} & set(steps_of(folder))


@pytest.mark.parametrize("selection", ["gap", "all", "random"])
def test_a_rewrite_that_the_filters_refuse(metadata, tmp_path, selection):
    """The second has nine words and three more once it is rewritten: the one before stays, and is looked at once."""
    folder = tmp_path / "run"
    codec(folder, fakes(Rules(BASICS)), **(metadata | {"max_words": 11, "selection": selection})).run()
    row = items(folder)["m000-i0001"]
    [version] = row["rounds"]
    assert version["instruction"] == BASICS["trip planning"][1] and version["answers"]
    assert {own["reason"] for own in version["refused"]} == {"too long"}
    actions = [own["action"] for own in version["refused"]]
    assert len(set(actions)) == len(actions) and (selection == "random" or len(actions) > 1)
    assert row["outcome"] == ("dropped" if selection == "gap" else "kept")
    refused = sum(len(own.get("refused", ())) for row in items(folder).values() for own in row["rounds"])
    assert collect(folder)["refused"] == {"too long": refused}


def test_answers_that_were_cut_off(metadata, tmp_path):
    """Eight words say whose answer it is, its quality and its seed: all are cut off there."""
    folder = tmp_path / "run"
    settings = metadata | {"max_answer_tokens": 8}
    assert codec(folder, fakes(Rules(BASICS)), **settings).run().pairs == 0
    assert all(
        own["truncated"] == {"strong": True, "target": True} for own in items(folder)["m000-i0002"]["rounds"][1:]
    )
    engines = fakes(Rules(BASICS))
    assert codec(folder, engines, **settings, keep_truncated=True).run().pairs == 5
    assert engines[0].calls == 0, "a setting of the export asks nothing again"


def test_a_scorer_of_its_own(metadata, tmp_path):
    rules = Rules(BASICS)
    strong, target = fakes(rules)
    scorer = FakeEngine(rules, "judge")
    config = CodecLMConfig(**metadata)
    CodecLM(config, tmp_path / "run", strong=strong, target=target, scorer=scorer).run()
    assert scorer.calls == 28 and {
        row["step"] for row in finished_calls(tmp_path / "run") if row["engine"] == "endpoint:judge"
    } == {"score", "score:again"}


# Replies that are not whole


class Odd(FakeEngine):
    """Whose answers have thoughts around them, or another end than their own."""

    def __init__(self, rules, model, marks="{}", finish="stop"):
        super().__init__(rules, model)
        self.marks, self.finish, self.schemas = marks, finish, {}

    def generate(self, prompts, params, seeds=None):
        self.schemas[params.max_new_tokens] = params.schema
        for place, own in super().generate(prompts, params, seeds):
            if own.text.startswith(self.model):
                own = Generation(self.marks.format(own.text), self.finish, own.num_tokens, own.num_prompt_tokens)
            yield place, own


@pytest.mark.parametrize("marks", ["<think>hmm</think>\n{}", "[THINK]hmm[/THINK]{}", "<reasoning>hmm</reasoning>{}"])
def test_thoughts_are_neither_scored_nor_exported(metadata, tmp_path, marks):
    rules = Rules(BASICS)
    codec(tmp_path / "run", [Odd(rules, "strong", marks), Odd(rules, "target", marks)], **metadata).run()
    codec(tmp_path / "plain", fakes(rules), **metadata).run()
    assert data(tmp_path / "run") == data(tmp_path / "plain") and "hmm" not in str(data(tmp_path / "run"))


def test_marks_of_thoughts_that_are_left_set_an_answer_aside(metadata, tmp_path):
    rules = Rules(BASICS)
    codec(tmp_path / "run", [Odd(rules, "strong", "{}<|message|>plan"), FakeEngine(rules, "target")], **metadata).run()
    reasons = {row["reason"] for row in items(tmp_path / "run").values()}
    assert len(reasons) == 1 and "thoughts are left" in reasons.pop()
    assert read_jsonl(tmp_path / "run" / "data.jsonl") == []


def test_half_an_answer_is_not_exported(metadata, tmp_path):
    """What a filter of the server cut off is set aside, even where answers at the token limit are kept."""
    rules = Rules(BASICS)
    engines = [Odd(rules, "strong", finish="content_filter"), FakeEngine(rules, "target")]
    result = codec(tmp_path / "run", engines, keep_truncated=True, **metadata).run()
    assert result.pairs == 0
    assert all("content_filter" in row["reason"] for row in items(tmp_path / "run").values())


def test_nothing_but_thoughts_names_the_setting(metadata, tmp_path):
    rules = Rules(BASICS)
    engines = [Odd(rules, "strong", "<think>hm", finish="length"), FakeEngine(rules, "target")]
    codec(tmp_path / "run", engines, **metadata).run()
    reasons = [row["reason"] for row in items(tmp_path / "run").values()]
    assert all("thoughts" in reason and "`max_answer_tokens` is 1024" in reason for reason in reasons)


def test_engines_are_held_to_the_form_but_for_answers(metadata, tmp_path):
    strong = Odd(Rules(BASICS), "strong")
    codec(tmp_path / "run", [strong, FakeEngine(Rules(BASICS), "target")], **metadata).run()
    assert strong.schemas[1024] is None and json.loads(strong.schemas[64])["type"] == "object"
    assert json.loads(strong.schemas[512])["type"] == "object"


# Stopped and resumed


@pytest.mark.parametrize("budget", [1, 12, 22, 70])
def test_a_budget_of_calls_stops_and_a_larger_one_goes_on(seeds, undisturbed, tmp_path, budget):
    """Exactly as many calls as the budget says, wherever it ends; then all the others, none of them again."""
    server = Server(delay=0.001, spread=1.0)
    with serving(server) as url:
        result = codec(tmp_path, remote(url), prompts=seeds, max_calls=budget).run()
        assert "budget" in result.stopped and len(finished_calls(tmp_path)) == budget
        assert sum(server.answered.values()) == budget
        same = codec(tmp_path, remote(url), prompts=seeds, max_calls=budget).run()
        assert same.stopped == result.stopped and sum(server.answered.values()) == budget
        assert codec(tmp_path, remote(url), prompts=seeds).run().stopped is None
    assert data(tmp_path) == data(undisturbed) and items(tmp_path) == items(undisturbed)
    assert set(server.answered.values()) == {1}


def test_a_budget_of_tokens(seeds, undisturbed, tmp_path):
    calls = finished_calls(undisturbed)
    spent = [row["reply"].get("num_tokens", 0) + row["reply"].get("num_prompt_tokens", 0) for row in calls]
    total, largest = sum(spent), max(spent)
    assert "tokens" in codec(tmp_path, fakes(), prompts=seeds, max_tokens=total // 2).run().stopped
    made = finished_calls(tmp_path)
    used = sum(row["reply"].get("num_tokens", 0) + row["reply"].get("num_prompt_tokens", 0) for row in made)
    assert total // 2 <= used <= total // 2 + 600 * largest, "what was under way is finished, and nothing more begun"
    assert len(made) < len(calls)
    codec(tmp_path, fakes(), prompts=seeds).run()
    assert data(tmp_path) == data(undisturbed)


@pytest.mark.parametrize("after", [4, 18, 60])
def test_a_server_that_goes_down(seeds, undisturbed, tmp_path, after):
    """One line after ten failures in a row; once it is up again the same call goes on, and repeats nothing."""
    server = Server()
    answer = server.rules.answer

    def count_down(*args):
        server.down = sum(server.answered.values()) >= after
        return answer(*args)

    server.rules.answer = count_down
    with serving(server) as url:
        with pytest.raises((EndpointError, ValueError)) as caught:
            codec(tmp_path, remote(url, max_retries=0), prompts=seeds).run()
        assert "\n" not in str(caught.value)
        assert "failed" in str(caught.value) and sum(server.answered.values()) < 40 + after
        if after == 60:
            assert "10 calls in a row have failed" in str(caught.value) and "HTTP 500" in str(caught.value)
        server.rules.answer, server.down = answer, False
        codec(tmp_path, remote(url), prompts=seeds).run()
    assert data(tmp_path) == data(undisturbed) and items(tmp_path) == items(undisturbed)
    assert set(server.answered.values()) == {1}


def test_nobody_there(seeds, tmp_path):
    with serving(Server()) as url:
        pass
    with pytest.raises(EndpointError, match=r"10 calls in a row have failed.*ConnectError") as caught:
        codec(tmp_path, remote(url, max_retries=0), prompts=seeds).run()
    assert "\n" not in str(caught.value)


def test_nobody_there_for_a_few_seeds(seeds, tmp_path):
    with serving(Server()) as url:
        pass
    with pytest.raises(ValueError, match=r"calls for instructions failed \(4\)"):
        codec(tmp_path, remote(url, max_retries=0), prompts=seeds, num_prompts=4).run()


def test_a_wrong_key_ends_at_once(seeds, tmp_path):
    server = Server()
    server.refused = {"": 401}
    with serving(server) as url, pytest.raises(EndpointError, match="HTTP 401: not this one"):
        codec(tmp_path, remote(url), prompts=seeds).run()
    assert sum(server.received.values()) <= 2 * 8


@pytest.mark.parametrize("status", [500, 400])
def test_one_instruction_fails(metadata, tmp_path, status):
    """A server error leaves it open, to be tried again another time; a refusal sets it aside. The others are done."""
    server, folder = Server(Rules(BASICS)), tmp_path / "run"
    server.refused = {"mountains": status}
    with serving(server) as url:
        result = codec(folder, remote(url, max_retries=0), **metadata).run()
        assert (result.failed, result.pairs) == ((1, 4) if status == 500 else (0, 4))
        got = items(folder)
        if status == 400:
            assert got["m000-i0001"]["outcome"] == "set_aside"
            assert (
                "rewrite: " in got["m000-i0001"]["reason"] and "HTTP 400: not this one" in got["m000-i0001"]["reason"]
            )
            return
        assert len(got) == 6 and "m000-i0001" not in got
        assert not read_jsonl(folder / "set_aside.jsonl"), "another time it may be answered"
        server.refused = {}
        result = codec(folder, remote(url), **metadata).run()
    assert (result.failed, result.pairs, len(items(folder))) == (0, 5, 7)
    codec(tmp_path / "local", fakes(Rules(BASICS)), **metadata).run()
    assert data(folder) == data(tmp_path / "local") and set(server.answered.values()) == {1}


def test_a_seed_that_fails_is_not_left_out_of_the_data(seeds, undisturbed, tmp_path):
    """Without it there would be other metadata and so other data: the run ends, and the next one asks again."""
    server = Server()
    server.refused = {SEEDS[3]: 503}
    with serving(server) as url:
        with pytest.raises(ValueError, match=r"failed \(1\); the same command makes them again"):
            codec(tmp_path, remote(url, max_retries=0), prompts=seeds).run()
        assert not (tmp_path / "basics.jsonl").exists()
        server.refused = {}
        codec(tmp_path, remote(url), prompts=seeds).run()
    assert data(tmp_path) == data(undisturbed) and set(server.answered.values()) == {1}


# Refused


def test_other_settings_are_refused_by_name(seeds, undisturbed, tmp_path):
    def refused(engines=None, **settings):
        with pytest.raises(ValueError) as caught:
            codec(undisturbed, engines or fakes(), **({"prompts": seeds} | settings)).run()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    before = data(undisturbed)
    assert "gap_threshold was 3.0, now 2.0" in refused(gap_threshold=2.0)
    assert "seed was 42, now 1" in refused(seed=1)
    assert 'strong was "endpoint:strong", now "endpoint:stronger"' in refused(
        [FakeEngine(Rules(), "stronger"), FakeEngine(Rules(), "target")]
    )
    message = refused(rewrite="evol", max_rounds=4)
    assert 'rewrite was "rubrics", now "evol"' in message and "max_rounds was 3, now 4" in message
    (tmp_path / "score.jinja").write_text("{{ instruction }} {{ first }} {{ second }}: two numbers")
    assert "prompts.score was " in refused(prompt_folder=str(tmp_path))
    original = Path(seeds).read_text()
    try:
        Path(seeds).write_text(original + '{"instruction": "One more seed, with a few words."}\n')
        assert "content was " in refused()
    finally:
        Path(seeds).write_text(original)
    assert data(undisturbed) == before
    codec(undisturbed, fakes(), prompts=seeds, max_calls=10**6, max_rows=3).run()  # these may change
    assert len(read_jsonl(undisturbed / "data.jsonl")) == 3
    codec(undisturbed, fakes(), prompts=seeds).run()
    assert data(undisturbed) == before


def test_a_folder_of_before_rewriting_first_is_refused(seeds, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "old")
    settings = json.loads((tmp_path / "old" / "settings.json").read_text())
    del settings["format"]
    (tmp_path / "old" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is of an earlier version") as caught:
        codec(tmp_path / "old", fakes(), prompts=seeds).run()
    assert "\n" not in str(caught.value)


def test_a_second_process_is_refused(seeds, tmp_path):
    program = (
        "import sys\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is working in it"):
            codec(tmp_path, fakes(), prompts=seeds).run()
        other.stdin.close()
    assert codec(tmp_path, fakes(), prompts=seeds).run().pairs > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "seeds.jsonl"), ('{"instruction": ""}\n', "seeds.jsonl"), ('{"instruction": \n{}\n', "seeds.jsonl: line 1")],
)
def test_seeds_that_are_none(tmp_path, content, message):
    (tmp_path / "seeds.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        codec(tmp_path / "run", fakes(), prompts=str(tmp_path / "seeds.jsonl")).run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"encode": "I like it."}, "no metadata could be read"),
        ({"decode": "I'm sorry, but I can't help with that."}, "not one basic instruction is left"),
        ({"decode": '{"instructions": ["Too short"]}'}, r"not one basic instruction is left .*'too short': "),
    ],
)
def test_a_model_that_cannot_do_it(seeds, tmp_path, rules, message):
    own = Rules()
    for step, reply in rules.items():
        setattr(own, step, lambda reply=reply, **_: reply)
    with pytest.raises(ValueError, match=message) as caught:
        codec(tmp_path, fakes(own), prompts=seeds).run()
    assert "\n" not in str(caught.value) and not (tmp_path / "basics.jsonl").exists()
    if "Too short" not in str(rules):
        raws = [row["raw"] for row in read_jsonl(tmp_path / "set_aside.jsonl")]
        assert raws and all(raw == [*rules.values()] * 2 for raw in raws)


def test_rubrics_that_cannot_be_read(metadata, tmp_path):
    """Asked for twice for a metadata, not for each of its instructions."""
    rules = Rules(BASICS)
    rules.rubrics = lambda **_: "No idea."
    codec(tmp_path / "run", fakes(rules), **metadata).run()
    reasons = {id: row["reason"] for id, row in items(tmp_path / "run").items()}
    assert len(reasons) == 7 and all(reason.startswith("rubrics: ") for reason in reasons.values())
    assert steps_of(tmp_path / "run")["rubrics"] == 3 == steps_of(tmp_path / "run")["rubrics:again"]


@pytest.mark.parametrize(
    ("settings", "engines", "message"),
    [
        ({}, 2, "nothing to start from: set `prompts`"),
        ({"prompts": "x.jsonl"}, 1, "`selection: gap` compares two models: give the `target`"),
    ],
)
def test_nothing_to_work_with(tmp_path, settings, engines, message):
    with pytest.raises(ValueError, match=message):
        codec(tmp_path, fakes()[:engines], **settings)


def test_a_prompt_of_the_user(metadata, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "answer.jinja").write_text("Be brief. {{ instruction }}")
    codec(tmp_path / "run", fakes(Rules(BASICS)), prompt_folder=str(tmp_path / "prompts"), **metadata).run()
    answers = [row for row in finished_calls(tmp_path / "run") if row["step"] == "answer"]
    assert all(row["prompt"][0]["content"].startswith("Be brief. ") for row in answers) and len(answers) == 24


def test_inside_an_event_loop(metadata, tmp_path):
    import asyncio

    async def notebook():
        return await codec(tmp_path / "run", fakes(Rules(BASICS)), **metadata).arun()

    assert asyncio.run(notebook()).pairs == 5


def test_order_of_completion_does_not_matter(seeds, undisturbed, tmp_path):
    """In this process: ids in items.jsonl come in another order, rows of data.jsonl do not."""
    orders = set()
    for number in range(3):
        random.seed(number)
        codec(tmp_path / str(number), fakes(), prompts=seeds).run()
        assert data(tmp_path / str(number)) == data(undisturbed)
        orders.add(tuple(items(tmp_path / str(number))))
    assert len(orders) > 1
