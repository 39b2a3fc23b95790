"""One small run with checks, references and questions: what its folder and its report then hold."""

import json

import pytest

from tests.sami.test_run import arguments, files  # noqa: F401 (fixtures)
from trl_extensions.cli.sami import METHOD
from trl_extensions.sami.report import verdict


PRINCIPLES = """\
principles:
  - {name: brief, definition: Be brief., antithesis: Explain at length., check: {words: {at_most: 3}}}
  - {name: 箇条書き, definition: 箇条書きで書く。, antithesis: 一つの段落で書く。, check: {list_items: {at_least: 2}}}
  - {name: warm, definition: Be friendly and warm., antithesis: Be cold and plain., check: {judge: true}}
"""


@pytest.mark.parametrize(
    ("rise", "changes", "judge", "losses", "queries", "kind"),
    [
        (0.0, {"brief": 0.3}, None, [1, 2], 64, "obeys"),
        (0.0, {"brief": 0.3, "箇条書き": -0.3}, None, [2, 1], 64, "disobeys"),
        (0.3, {"brief": -0.3}, None, [2, 1], 64, "disobeys"),
        (0.3, {"brief": 0.15}, None, [2, 1], 64, "told_apart"),  # of errors of .1 and, of the bound, .1 * sqrt(2)
        (-0.3, {}, None, [2, 1], 64, "less_apart"),
        (0.2, {}, 1.0, [2, 1], 64, "judge"),
        (0.2, {}, 0.5, [1, 2], 64, "loss"),
        (0.2, {}, None, [2, 1], 8, "too_few"),
        (0.2, {"brief": None}, None, [2, 1], 64, "unclear"),
    ],
)
def test_what_came_of_it(rise, changes, judge, losses, queries, kind):
    bounds = [{"mi_bound": {"mean": mean, "se": 0.1}, "num_queries": queries} for mean in (0.2, 0.2 + rise)]
    obedience = {
        name: {"all": {"difference": {"value": own, "se": 0.1}} if own else {}} for name, own in changes.items()
    }
    last = {"evaluation": bounds[1] | {"obedience": obedience}, "steps": [{"loss": loss} for loss in losses]}
    if judge is not None:
        last["win_rate"] = {"contradiction_share": judge}
    assert verdict([{"evaluation": bounds[0]}, last])[0] == kind


def test_both_axes_are_in_the_report(arguments, files):  # noqa: F811
    (files / "principles.yaml").write_text(PRINCIPLES, encoding="utf-8")
    (files / "people.jsonl").write_text('{"prompt": "卵は？", "completion": "ゆでる。"}\n' * 4, encoding="utf-8")
    question = {"question": "2 + 2?", "choices": ["four", "five"], "answer": "four"}
    (files / "choices.jsonl").write_text(json.dumps(question) + "\n")
    extra = {"rounds": 1, "eval_references": files / "people.jsonl", "eval_multiple_choice": files / "choices.jsonl"}
    report = METHOD.parse("run", arguments(**extra)).execute()
    first, last = (json.loads((files / f"run/round_{n}/evaluation.json").read_text()) for n in (0, 1))
    # what only a judge can tell is left out, and the run goes on
    assert list(last["obedience"]) == ["brief", "箇条書き"]
    assert "difference" in last["obedience"]["brief"]["all"] and "difference" not in first["obedience"]["brief"]["all"]
    moved = last["side_effects"]
    assert moved["plain_answers"]["n"] == 4 and 0 <= moved["plain_answers"]["unchanged"]["value"] <= 1
    was = first["side_effects"]["references"]["nats_per_token"]["value"]
    assert moved["references"]["original"]["value"] == pytest.approx(was, rel=1e-4)
    assert moved["multiple_choice"]["original"] == first["side_effects"]["multiple_choice"]["accuracy"]
    text = report.read_text(encoding="utf-8")
    assert text.index("tight bound") < text.index("## Obedience") < text.index("## What else moved")
    assert "| 箇条書き | antithesis |" in text and (files / "run" / "axes.png").stat().st_size > 0
    found = json.loads((files / "run" / "report.json").read_text())["verdict"]
    assert found["kind"] and text.split("\n\n")[1].startswith(f"**{found['text']}** ")


def test_checks_may_change_where_they_only_measure(arguments, files):  # noqa: F811
    (files / "principles.yaml").write_text(PRINCIPLES, encoding="utf-8")
    METHOD.parse("run", arguments(rounds=1)).execute()
    (files / "principles.yaml").write_text(PRINCIPLES.replace("at_most: 3", "at_most: 100"), encoding="utf-8")
    METHOD.parse("run", arguments(rounds=2)).execute()
    brief = json.loads((files / "run/round_2/evaluation.json").read_text())["obedience"]["brief"]["definition"]
    assert brief["original"] == brief["obeyed"] and brief["obeyed"]["value"] == 1
    (files / "principles.yaml").write_text(PRINCIPLES.replace("Be brief.", "Be short."), encoding="utf-8")
    with pytest.raises(ValueError, match="other settings"):
        METHOD.parse("run", arguments(rounds=2)).execute()


def test_empty_responses_to_unseen_principles_count(arguments, files):  # noqa: F811
    unseen = {"name": "short", "definition": "短く。", "antithesis": "長く。", "check": {"words": {"at_most": 100}}}
    (files / "unseen.yaml").write_text(json.dumps({"principles": [unseen]}))
    run = METHOD.parse("evaluate", arguments(eval_principles=files / "unseen.yaml"))
    sample = run._sample_held_out

    def with_an_empty_one(model, folder, **how):
        sample(model, folder, **how)
        path = folder / "eval_principles_samples.jsonl"
        first, *rest = map(json.loads, path.read_text().splitlines())
        first |= {"kept": False, "completions": [[{"role": "assistant", "content": ""}]] * 2}
        path.write_text("".join(json.dumps(row) + "\n" for row in (first, *rest)))

    run._sample_held_out = with_an_empty_one
    own = run.evaluate()["obedience_held_out_principles"]["short"]["definition"]
    assert (own["n"], own["obeyed"]["value"]) == (4, 0.75)


def test_only_responses_that_obey_are_trained_on(arguments, files):  # noqa: F811
    # an answer of 8 tokens of the tiny model has at most 8 words, and none is a list
    checked = PRINCIPLES.replace("at_most: 3", "at_least: 0").replace("{judge: true}", "{list_items: 0}")
    (files / "principles.yaml").write_text(checked, encoding="utf-8")
    run = METHOD.parse("sample", arguments(filter_by_check=True))
    report = run.sample()
    assert report.dropped.get("disobedient", 0) == report.sampled - report.kept > 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"filter_by_check": True}, "no principle has a `check`"),
        ({"eval_references": "people.jsonl"}, "people.jsonl: no such file"),
        ({"eval_principles": "unseen.yaml"}, "'xx' is not told apart"),
    ],
)
def test_refused_before_anything_is_loaded(extra, message, arguments, files, monkeypatch):  # noqa: F811
    monkeypatch.chdir(files)
    if "eval_principles" in extra:
        pytest.importorskip("py3langid")
    judged, language = ({"name": "a", "definition": "b", "antithesis": "c", "check": own}
                        for own in ({"judge": True}, {"language": "xx"}))  # fmt: skip
    (files / "unseen.yaml").write_text(json.dumps({"principles": [language]}))
    # a check that only a judge can make filters nothing
    (files / "principles.yaml").write_text(json.dumps({"principles": [judged, judged | {"name": "d"}]}))
    with pytest.raises(ValueError, match=message):
        METHOD.parse("run", arguments(**extra)).execute()
    assert not (files / "run" / "round_0").exists()
