"""Capacity recovery before and after training, with engines that answer by rule; the numbers are counted by hand."""

import json
import re
import subprocess
import sys

import pytest

from trl_extensions.codeclm import comparison
from trl_extensions.codeclm.comparison import answer, capacity_recovery, compare
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.judge.pairwise import Judgment, PairwiseJudge
from trl_extensions.core.stats import wilson


QUERIES = [Query.from_text(f"question {number}") for number in range(6)]
ANSWERS = {
    "strong": ["5", "5", "5", "5", "5", "5"],
    "before": ["1", "6", "5", "0", "13", "2"],
    "after": ["6", "6", "6", "2", "2", "5 "],
}


class Answers:
    """Answers question k with entry k of a list; dies after `lives` answers."""

    def __init__(self, name, lives=100):
        self.name, self.lives, self.asked = name, lives, []

    def generate(self, prompts, params, seeds=None):
        for place, prompt in enumerate(prompts):
            if not self.lives:
                raise KeyboardInterrupt
            self.lives -= 1
            self.asked.append((prompt, params.temperature))
            number = int(prompt[-1]["content"].split()[1])
            yield place, Generation(ANSWERS[self.name][number], "length" if number == 3 else "stop", 1)


class Larger:
    """Judges numbers: the larger is better. Says A where one is 0, and nothing where one is 13."""

    name = "judge"

    def __init__(self):
        self.calls = 0

    def generate(self, prompts, params, seeds=None):
        for place, prompt in enumerate(prompts):
            self.calls += 1
            first, second = (int(number) for number in re.findall(r"\d+", prompt[0]["content"]))
            if 13 in (first, second):
                verdict = "both are great"
            else:
                verdict = "A" if first > second or 0 in (first, second) else "B"
            yield place, Generation(verdict, "stop", 1)


@pytest.fixture
def run(tmp_path):
    template = tmp_path / "question.jinja"
    template.write_text("{{ first }} or {{ second }}?")

    def build(engines, larger=None, params=None, folder="out"):
        with ResponseCache(tmp_path / "calls.sqlite") as log:
            return compare(
                tmp_path / folder,
                QUERIES,
                engines,
                lambda: PairwiseJudge(larger or Larger(), mode="verdict", template=template, cache=log),
                params or GenerationParams(8),
            )

    return build


def loaders():
    return {name: lambda name=name: Answers(name) for name in ANSWERS}


def refuse():
    raise AssertionError("nothing is left to ask, so no engine should be loaded")


def test_outcomes_are_counted(run, tmp_path):
    result = run(loaders())
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result
    assert result["prompts"] == 6
    # Before: lost, won, equal, contradicted (a tie), unread, lost
    before = {"crr": 3 / 5, "wins": 1, "ties": 2, "losses": 2, "judged": 5, "unread": 1}
    assert before.items() <= result["before"].items()
    assert result["before"]["interval"] == list(wilson(3, 5))
    assert result["before"]["equal"] == 1 and result["before"]["contradictions"] == 1
    assert result["before"]["contradiction_share"] == 1 / 4
    # After: won three times, lost twice, equal but for white space
    after = {"crr": 4 / 6, "wins": 3, "ties": 1, "losses": 2, "judged": 6, "unread": 0, "contradictions": 0}
    assert after.items() <= result["after"].items()
    # After against before: won, equal, won, contradicted, unread, won; a tie is half a win
    direct = {"win_rate": 4 / 5, "wins": 3, "ties": 2, "losses": 0, "judged": 5, "unread": 1}
    assert direct.items() <= result["after_vs_before"].items() and "crr" not in result["after_vs_before"]
    # On the five that were read twice: better, same, same, worse, better
    assert result["change"]["crr"] == pytest.approx(1 / 5) and result["change"]["judged"] == 5
    low, high = result["change"]["interval"]
    assert -1 <= low < 1 / 5 < high <= 1
    assert result["answers"]["after"] == {"mean_words": 1.0, "empty": 0, "truncated": 1}
    assert result["judge"]["engine"] == "judge" and result["judge"]["mode"] == "verdict"
    judgments = (tmp_path / "out" / "judgments.jsonl").read_text().splitlines()
    assert len(judgments) == 18
    unread = [row for row in map(json.loads, judgments) if row["winner"] is None]
    assert len(unread) == 2 and unread[0]["raw"][0] == "both are great"


def test_a_second_run_asks_nothing(run):
    first, larger = run(loaders()), Larger()
    second = run(dict.fromkeys(ANSWERS, refuse), larger)
    assert larger.calls == 0
    assert first.pop("judge")["counts"]["calls"] > 0
    assert "calls" not in second.pop("judge")["counts"]
    assert second == first


def test_a_run_that_was_stopped_asks_for_what_is_missing(run):
    whole = run(loaders())
    stopped = Answers("before", lives=2)
    with pytest.raises(KeyboardInterrupt):
        run(loaders() | {"before": lambda: stopped}, folder="other")
    rest = Answers("before")
    result = run(loaders() | {"strong": refuse, "before": lambda: rest}, folder="other")
    assert len(stopped.asked) == 2 and len(rest.asked) == 4
    assert result["before"] == whole["before"]


def test_settings_and_prompts_bind(run, tmp_path):
    run(loaders())
    with pytest.raises(
        ValueError, match=r"answers_strong\.jsonl was made with other settings: params\.max_new_tokens"
    ):
        run(loaders(), params=GenerationParams(16))
    path = tmp_path / "out" / "answers_after.jsonl"
    other = [{"id": "another", "prompt": [{"role": "user", "content": "another 1"}]}]
    with pytest.raises(ValueError, match=r"answers_after\.jsonl"):
        answer(path, other, lambda: Answers("after"), GenerationParams(8))


def test_a_sample_at_a_temperature(run):
    engine = Answers("strong")
    run(loaders() | {"strong": lambda: engine}, params=GenerationParams(8, temperature=0.7))
    assert {temperature for _, temperature in engine.asked} == {0.7} and len(engine.asked) == 6


def test_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="no engine answers for 'after'"):
        compare(tmp_path, QUERIES, {"strong": refuse, "before": refuse}, refuse, GenerationParams(8))
    with pytest.raises(ValueError, match="no benchmark prompts"):
        compare(tmp_path, [], loaders(), refuse, GenerationParams(8))


def test_a_judge_that_says_nothing_gives_no_share(run):
    class Mute(Larger):
        def generate(self, prompts, params, seeds=None):
            for place, _ in enumerate(prompts):
                yield place, Generation("", "stop", 0)

    result = run(loaders(), Mute())
    # What is left are the answers that are equal: one before, one after, one between them
    assert result["before"]["crr"] == 1.0 and result["before"]["judged"] == 1 and result["before"]["unread"] == 5
    assert result["change"] == {"crr": None, "interval": None, "judged": 0}


def test_it_needs_no_torch():
    code = "import sys, trl_extensions.codeclm.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_margin_is_the_mean_difference_of_scores():
    # Differences 0.2, -0.1 and 0.5; the pair without scores is left out
    scores = [(0.6, 0.4), (0.45, 0.55), (0.75, 0.25), None]
    judgments = [Judgment(f"x/{i}", "tie", own, ("first", "second")) for i, own in enumerate(scores)]
    margin = comparison._margin(judgments)
    assert margin["mean"] == pytest.approx(0.2) and margin["positive"] == 2
    assert -0.11 < margin["interval"][0] <= 0.2 <= margin["interval"][1] < 0.51
    assert comparison._margin(judgments[3:]) is None
    assert comparison._margin(judgments[:1])["interval"] is None


def test_capacity_recovery_by_hand():
    # 2 wins, 1 tie, 3 losses
    result = capacity_recovery([1, 1, 0.5, 0, 0, 0])
    assert (result["crr"], result["wins"], result["ties"], result["losses"], result["n"]) == (0.5, 2, 1, 3, 6)
    assert (result["low"], result["high"]) == wilson(3, 6)
    with pytest.raises(ValueError, match="row 1: 2 is no outcome"):
        capacity_recovery([1, 2])
