"""Sampling with a scripted engine: rows, resuming, and what is refused."""

import pytest

from trl_extensions.core.generation.sampling import as_prompt, load_outputs, sample_outputs
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.runs.jsonl import read_jsonl


class Engine:
    """Answers with what it was asked and how; stops after `budget` answers, as a kill would."""

    name = "scripted"

    def __init__(self, budget: int = 10**6):
        self.budget = budget
        self.asked = []

    def generate(self, prompts, params):
        for index in reversed(range(len(prompts))):
            if not self.budget:
                raise KeyboardInterrupt
            self.budget -= 1
            self.asked.append((prompts[index], params.temperature, params.seed))
            text = f"{prompts[index][-1]['content']} at {params.temperature}"
            yield index, Generation(text, "stop", 3)


QUERIES = [Query.from_text(text) for text in ("one", "two", "three")]
PARAMS = GenerationParams(16, 0.7, 0.9, (), 5)


def test_a_greedy_output_and_random_ones_for_each_prompt(tmp_path):
    engine, output = Engine(), tmp_path / "outputs.jsonl"
    report = sample_outputs(engine, QUERIES, PARAMS, output, num_samples=2)
    rows = load_outputs(output)
    assert [(row["index"], row["sample"], row["temperature"]) for row in rows] == [
        (i, s, 0.7 if s else 0.0) for i in range(3) for s in range(3)
    ]
    assert rows[3]["completion"] == [{"role": "assistant", "content": "two at 0.0"}]
    assert len({row["id"] for row in rows}) == 9
    # two random samples of one prompt must not be the same draw
    assert len({seed for _, temperature, seed in engine.asked if temperature}) == 2
    assert (report.sampled, report.resumed, report.tokens, report.empty) == (9, 0, 27, 0)


@pytest.mark.parametrize("budget", [1, 4, 8])
def test_a_kill_loses_nothing_and_nothing_is_asked_twice(tmp_path, budget):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "outputs.jsonl"
    sample_outputs(Engine(), QUERIES, PARAMS, whole, num_samples=2)
    with pytest.raises(KeyboardInterrupt):
        sample_outputs(Engine(budget), QUERIES, PARAMS, output, num_samples=2)
    assert len(read_jsonl(output)) == budget
    rest = Engine()
    report = sample_outputs(rest, QUERIES, PARAMS, output, num_samples=2)
    assert len(rest.asked) == 9 - budget and report.resumed == budget
    assert load_outputs(output) == load_outputs(whole)


def test_other_settings_or_prompts_are_refused(tmp_path):
    output = tmp_path / "outputs.jsonl"
    sample_outputs(Engine(), QUERIES, PARAMS, output)
    with pytest.raises(ValueError, match=r"params.top_p was 0.9, now 1.0"):
        sample_outputs(Engine(), QUERIES, GenerationParams(16, 0.7, 1.0, (), 5), output)
    with pytest.raises(ValueError, match="not among the rows given"):
        sample_outputs(Engine(), QUERIES[:2], PARAMS, output)


def test_how_a_query_is_put():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    text, messages = Query.from_text("Why?"), Query.from_messages(chat)
    assert as_prompt(text, None, False) == "Why?"
    assert as_prompt(text, "Be brief.", True) == [{"role": "system", "content": "Be brief."}, chat[1]]
    assert as_prompt(messages, None, True) == chat
    with pytest.raises(ValueError, match="system message of its own"):
        as_prompt(messages, "Be brief.", True)
    with pytest.raises(ValueError, match="is a chat, but prompts are plain text"):
        as_prompt(messages, None, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"greedy": False, "num_samples": 0}, "nothing to sample"),
        ({"num_samples": 1, "params": GenerationParams(16)}, "temperature above 0"),
        ({"system_prompt": "Be brief.", "conversational": False}, "needs a model with a chat template"),
    ],
)
def test_what_cannot_be_sampled(tmp_path, settings, message):
    params = settings.pop("params", PARAMS)
    with pytest.raises(ValueError, match=message):
        sample_outputs(Engine(), QUERIES, params, tmp_path / "outputs.jsonl", **settings)
