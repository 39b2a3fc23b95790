"""Win rates of a SAMI run against its original, by judges that follow a rule."""

import json
from contextlib import contextmanager

import pytest
import yaml

import trl_extensions.sami.evaluation as module
from tests.core.judges import RuleJudge, shorter
from tests.sami.test_run import arguments, digests, files  # noqa: F401 (fixtures)
from trl_extensions.cli.main import main
from trl_extensions.cli.sami import METHOD
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.judge.pairwise import PairwiseJudge
from trl_extensions.core.runs.report import RunReport
from trl_extensions.core.stats import wilson
from trl_extensions.sami.config import SAMIArguments
from trl_extensions.sami.data import load_rows
from trl_extensions.sami.evaluation import compare
from trl_extensions.sami.report import report_win_rates


def row(id_, *responses):
    return {
        "id": id_,
        "index": int(id_),
        "prompts": [[{"role": "user", "content": f"Under {j}: {id_}?"}] for j in range(len(responses))],
        "completions": [[{"role": "assistant", "content": text}] for text in responses],
        "num_tokens": [len(text) for text in responses],
        "choices": [{"brief": j == 0} for j in range(len(responses))],
        "truncated": [False] * len(responses),
        "kept": True,
    }


ORIGINALS = [row("0", "aaaa", "bbbb"), row("1", "cccc", "dddd"), row("2", "eeee", "ffff")]
ROWS = [row("0", "aa", "bbbb"), row("1", "c", "dddddddd"), row("2", "ee", "xxxx")]


def compared(rule, rows=ROWS, originals=ORIGINALS, **settings):
    return compare(PairwiseJudge(RuleJudge(rule), **settings), rows, originals)


class TestComparison:
    def test_by_hand(self):
        # shorter wins: 0/0, 1/0 and 2/0 win, 1/1 loses, 2/1 is a tie, 0/1 an equal text
        result = compared(shorter)
        names = ("pairs", "queries", "wins", "losses", "ties", "equal", "contradictions", "unread")
        assert [result[name] for name in names] == [6, 3, 3, 1, 2, 1, 0, 0]
        assert result["raw"]["value"] == 4 / 6 and result["raw"]["interval"] == "bootstrap"
        assert (result["tokens"], result["original_tokens"]) == ((2 + 4 + 1 + 8 + 2 + 4) / 6, 4.0)
        strata = result["length_balanced"]["strata"]
        assert {name: (own["n"], own["value"]) for name, own in strata.items()} == {
            "shorter": (3, 1.0),
            "equal": (2, 0.5),
            "longer": (1, 0.0),
        }
        assert result["length_balanced"]["value"] == 0.5  # length alone decided
        assert result["length_adjusted"]["slope"] < 0 and result["length_adjusted"]["value"] < 4 / 6

    def test_breakdown_by_hand(self):
        # the first response of each query has the definition: three wins; of the others, two ties and a loss
        found = compared(shorter)["breakdown"]
        assert found["desired"]["desired"]["value"] == 1.0 and found["desired"]["desired"]["n"] == 3
        assert found["principle"]["brief: antithesis"]["value"] == pytest.approx(1 / 3)
        assert found["constitution"] == {
            "+brief": found["desired"]["desired"], "−brief": found["principle"]["brief: antithesis"]
        }  # fmt: skip

    def test_intervals_are_by_query(self):
        # three queries that are won throughout: Wilson's of 3, not of 6
        rows = [row(str(i), "a", "b") for i in range(3)]
        result = compared(shorter, rows)
        assert (result["raw"]["low"], result["raw"]["high"]) == wilson(3, 3)

    def test_a_judge_of_places(self):
        result = compared(lambda *_: "A", mode="verdict")
        assert (result["ties"], result["equal"], result["contradictions"]) == (6, 1, 5)
        assert result["raw"]["value"] == 0.5 and result["first_place_share"] == 1.0

    def test_nothing_read(self):
        result = compared(lambda *_: "hm", rows=[row("0", "a")], originals=[row("0", "b")])
        assert result["unread"] == 1
        assert result["raw"] is result["length_balanced"] is result["length_adjusted"] is None

    def test_queries_of_one_side_only_are_left_out(self):
        result = compared(shorter, [*ROWS, row("3", "a", "b")], ORIGINALS[1:])
        assert (result["queries"], result["pairs"], result["tokens"]) == (2, 4, (1 + 8 + 2 + 4) / 4)

    def test_what_does_not_belong_together(self):
        with pytest.raises(ValueError, match="there is no query that both"):
            compared(shorter, [row("7", "a", "b")])
        other = row("0", "a", "b") | {"prompts": ["something", "else"]}
        with pytest.raises(ValueError, match="query '0' was asked with other prompts"):
            compared(shorter, [other])


class TestReport:
    def lines(self, tmp_path, result):
        report = RunReport("title")
        judge = {"model": "m", "mode": "scores"}
        entry = {"round": 1, "win_rate": result | {"judge": judge, "low_mass": 0}}
        report_win_rates(report, [{"round": 0}, entry])
        return report.write(tmp_path).read_text()

    def test_table(self, tmp_path):
        text = self.lines(tmp_path, compared(shorter))
        assert "| 1 | 6 | 3 | 2 (1 of equal texts) | 1 | 0 | 67% [" in text and "| 50% " in text
        assert "too few pairs to balance lengths (shorter 3, equal 2, longer 1)" in text
        assert "contradicts itself on most" not in text

    def test_a_judge_that_cannot_tell_is_named(self, tmp_path):
        assert "contradicts itself on most" in self.lines(tmp_path, compared(lambda *_: "9 5"))

    def test_nothing_read(self, tmp_path):
        result = compared(lambda *_: "hm", rows=[row("0", "a")], originals=[row("0", "b")])
        assert "no reply of the judge could be read" in self.lines(tmp_path, result)

    def test_nothing_judged(self, tmp_path):
        report = RunReport("title")
        report_win_rates(report, [{"round": 0}, {"round": 1}])
        assert "Win rate" not in report.write(tmp_path).read_text()


@pytest.fixture
def judges(monkeypatch):
    """In place of the engine that `judge` names: a judge that prefers the shorter response."""
    made = []

    def create(engine_args):
        made.append(RuleJudge(shorter, name=f"{engine_args.engine}:{engine_args.engine_model}"))
        return made[-1]

    monkeypatch.setattr(module, "create_engine", create)
    return made


@contextmanager
def only_judging(run):
    def perform(name, round_):
        assert name == "judge"
        run.perform(name, round_)

    yield perform


def expected(folder):
    """Wins, losses and ties of the shorter text, counted from the samples."""
    before = {own["id"]: own for own in load_rows(folder / "round_0" / "eval_samples.jsonl", kept_only=False)}
    counts = {"wins": 0, "losses": 0, "ties": 0}
    for own in load_rows(folder / "round_1" / "eval_samples.jsonl", kept_only=False):
        for new, old in zip(own["completions"], before[own["id"]]["completions"], strict=True):
            one, two = (len(text[0]["content"] or "(empty)") for text in (new, old))
            counts["wins" if one < two else "losses" if one > two else "ties"] += 1
    return counts


class TestRun:
    def test_judged_afterwards_resumed_and_judged_again(self, arguments, files, judges):  # noqa: F811
        settings = {"rounds": 1, "learning_rate": 0.05}
        report = METHOD.parse("run", arguments(**settings)).execute()
        assert "Win rate" not in report.read_text()
        folder = files / "run"
        before = digests(folder)

        # a judge may be named after the fact; nothing but its own stage is done
        run = METHOD.parse("run", arguments(**settings, judge="some/judge"))
        with only_judging(run) as perform:
            report = run.execute(perform)
        result = json.loads((folder / "round_1" / "win_rate.json").read_text())
        assert {name: result[name] for name in ("wins", "losses", "ties")} == expected(folder)
        assert result["wins"] + result["losses"] > 0  # or this shows nothing
        assert result["pairs"] == 16 and result["queries"] == 4 and result["judge"]["model"] == "some/judge"
        assert "## Win rate against the original" in report.read_text()
        assert json.loads((folder / "report.json").read_text())["rounds"][1]["win_rate"] == result
        with ResponseCache(folder / "judge_calls.sqlite") as cache:
            calls = len(cache)
        assert calls == len(judges[0].questions) == 2 * (16 - result["equal"])
        after = digests(folder)
        own = {"round_1/win_rate.json", "judge_calls.sqlite", "report.md", "report.json"}
        assert {name: after[name] for name in before if name not in own} == {
            name: digest for name, digest in before.items() if name not in own
        }

        # lost before it was written: the calls are not made again
        (folder / "round_1" / "win_rate.json").unlink()
        METHOD.parse("run", arguments(**settings, judge="some/judge")).execute()
        assert judges[1].questions == [] and digests(folder) == after

        # another judge judges again, and the first one's calls are still there
        METHOD.parse("run", arguments(**settings, judge="other/judge")).execute()
        assert len(judges[2].questions) == calls
        assert json.loads((folder / "round_1" / "win_rate.json").read_text())["judge"]["model"] == "other/judge"
        METHOD.parse("run", arguments(**settings, judge="some/judge")).execute()
        assert judges[3].questions == []
        assert json.loads((folder / "round_1" / "win_rate.json").read_text()) == result

        # without a judge nothing is judged and nothing lost
        METHOD.parse("run", arguments(**settings)).execute()
        assert len(judges) == 4 and (folder / "round_1" / "win_rate.json").exists()

    def test_evaluate(self, arguments, files, judges, capsys):  # noqa: F811
        assert main(["sami", "evaluate", *arguments("one")]) == 0
        assert main(["sami", "evaluate", *arguments("two", judge="some/judge")]) == 0
        assert "not judged: set `judge_against`" in capsys.readouterr().out
        against = str(files / "one" / "eval_samples.jsonl")
        assert main(["sami", "evaluate", *arguments("two", judge="some/judge", judge_against=against)]) == 0
        assert "0 wins, 16 ties, 0 losses" in capsys.readouterr().out  # the same model twice, greedily
        assert json.loads((files / "two" / "win_rate.json").read_text())["equal"] == 16
        assert judges[0].questions == []


class TestArguments:
    def test_a_dict_in_the_recipe(self, arguments, files):  # noqa: F811
        judge = {"engine": "endpoint", "model": "m", "base_url": "http://localhost:1/v1"}
        (files / "c.yaml").write_text(yaml.safe_dump({"judge": judge, "judge_mode": "verdict"}))
        run = METHOD.parse("run", ["--config", str(files / "c.yaml"), *arguments()])
        assert run.args.judge == judge
        settings = module.judge_settings(run.args)
        assert (settings["engine"], settings["model"], settings["mode"]) == ("endpoint", "m", "verdict")
        # a server may move
        moved = SAMIArguments(judge=judge | {"base_url": "http://elsewhere:1/v1"}, judge_mode="verdict")
        assert module.judge_settings(moved) == settings

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"judge_mode": "score"}, "`judge_mode` must be one of scores, verdict, logprobs, got 'score'"),
            ({"judge": {"engine": "vllm"}}, "`judge` names no model"),
            ({"judge": {"modle": "m"}}, "`judge` has no key 'modle'"),
            ({"judge_max_new_tokens": 0}, "`judge_max_new_tokens` must be a whole number of at least 1"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(ValueError, match=message) as caught:
            SAMIArguments(**settings)
        assert "\n" not in str(caught.value)
