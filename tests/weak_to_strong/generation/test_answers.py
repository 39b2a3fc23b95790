"""Sampling from weak models: a scripted engine for what happens around it, and tiny models for the thing itself."""

import json
from functools import partial

import pytest

from tests.conftest import make_tiny_model
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.weak_to_strong.generation.run import load_answers, sample_answers


class Engine:
    """Answers with its name and what it was asked; stops after `budget` answers, as a kill would."""

    def __init__(self, name, budget=10**6, reason="stop"):
        self.name, self.budget, self.reason = f"scripted:{name}", budget, reason
        self.asked = []

    def __call__(self):
        return self

    def generate(self, prompts, params):
        for index in reversed(range(len(prompts))):
            if not self.budget:
                raise KeyboardInterrupt
            self.budget -= 1
            prompt = prompts[index]
            self.asked.append((prompt, params.temperature, params.seed))
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            yield index, Generation("" if text == "mute" else f"{self.name} on {text}", self.reason, 3)


PROMPTS = [Query.from_text(text) for text in ("one", "two", "mute")]
PARAMS = GenerationParams(16, 0.7, 0.9, (), 5)


def test_every_model_answers_every_prompt(tmp_path):
    engines, output = {"small": Engine("s"), "tiny": Engine("t", reason="length")}, tmp_path / "answers.jsonl"
    report = sample_answers(engines, PROMPTS, PARAMS, output, num_samples=2, greedy=True)
    rows = load_answers(output)
    assert [(row["index"], row["model"], row["sample"], row["temperature"]) for row in rows] == [
        (i, model, s, 0.7 if s else 0.0) for i in range(3) for model in ("small", "tiny") for s in range(3)
    ]
    assert rows[0] == {
        "id": f"small-{PROMPTS[0].id}-0", "index": 0, "sample": 0, "temperature": 0.0, "model": "small",
        "prompt": [{"role": "user", "content": "one"}],
        "completion": [{"role": "assistant", "content": "scripted:s on one"}],
        "truncated": False, "num_tokens": 3,
    }  # fmt: skip
    assert len({row["id"] for row in rows}) == 18
    assert (report.sampled, report.resumed, report.empty, report.truncated, report.tokens) == (18, 0, 6, 9, 54)
    assert {model: (n["sampled"], n["truncated"], n["tokens"]) for model, n in report.models.items()} == {
        "small": (9, 0, 27), "tiny": (9, 9, 27),
    }  # fmt: skip
    assert "18 answers of 2 models, 9 cut off" in report.summary and "6 empty" in report.summary


def test_models_and_samples_are_drawn_independently(tmp_path):
    engines = {"a": Engine("x"), "b": Engine("x")}
    sample_answers(engines, PROMPTS, PARAMS, tmp_path / "answers.jsonl", num_samples=2, greedy=False)
    seeds = [{seed for _, _, seed in engine.asked} for engine in engines.values()]
    assert [len(own) for own in seeds] == [2, 2] and not seeds[0] & seeds[1]


def test_plain_prompts_are_continued_and_chats_get_the_system_prompt(tmp_path):
    plain, chat = Engine("s"), Engine("s")
    sample_answers({"s": plain}, PROMPTS, PARAMS, tmp_path / "plain.jsonl", num_samples=1, greedy=False, conversational=False)
    assert {prompt for prompt, _, _ in plain.asked} == {"one", "two", "mute"}
    assert [row["completion"] for row in load_answers(tmp_path / "plain.jsonl")] == [
        "scripted:s on one", "scripted:s on two", "",
    ]  # fmt: skip
    sample_answers({"s": chat}, PROMPTS[:1], PARAMS, tmp_path / "chat.jsonl", num_samples=1, greedy=False, system_prompt="Be kind.")
    [(prompt, _, _)] = chat.asked
    assert prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "one"}]


@pytest.mark.parametrize("budget", [1, 5])
def test_a_kill_loses_nothing_and_more_models_may_follow(tmp_path, budget):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    sample_answers({"a": Engine("a"), "b": Engine("b")}, PROMPTS, PARAMS, whole, num_samples=2, greedy=False)
    with pytest.raises(KeyboardInterrupt):
        sample_answers({"a": Engine("a", budget)}, PROMPTS, PARAMS, output, num_samples=2, greedy=False)
    first, second = Engine("a"), Engine("b")
    report = sample_answers({"a": first, "b": second}, PROMPTS, PARAMS, output, num_samples=2, greedy=False)
    assert (len(first.asked), len(second.asked), report.resumed) == (6 - budget, 6, budget)
    assert load_answers(output) == load_answers(whole)


def test_engines_may_be_made_when_their_turn_comes(tmp_path):
    alive = []

    def make(name):
        alive.append(name)
        return Engine(name)

    report = sample_answers(
        {"a": lambda: make("a"), "b": lambda: make("b")}, PROMPTS, PARAMS, tmp_path / "x.jsonl", num_samples=1, greedy=False
    )
    assert alive == ["a", "b"] and report.sampled == 6


def test_other_settings_prompts_or_models_are_refused(tmp_path):
    output = tmp_path / "answers.jsonl"
    sample_answers({"a": Engine("a"), "b": Engine("b")}, PROMPTS, PARAMS, output, num_samples=1, greedy=False)
    before = output.read_bytes()
    for engines, prompts, message in (
        ({"a": Engine("other"), "b": Engine("b")}, PROMPTS, 'engine was "scripted:a", now "scripted:other"'),
        ({"a": Engine("a"), "b": Engine("b")}, PROMPTS[1:], "is not among the rows given"),
        ({"a": Engine("a")}, PROMPTS, "holds answers of b, of which no engine is given"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            sample_answers(engines, prompts, PARAMS, output, num_samples=1, greedy=False)
        assert "\n" not in str(error.value)
    assert output.read_bytes() == before
    settings = json.loads((tmp_path / "answers.a.settings.json").read_text())
    assert settings["params"]["temperature"] == 0.7


@pytest.mark.parametrize(
    ("engines", "prompts", "options", "message"),
    [
        ({"../a": Engine("a")}, PROMPTS, {}, "called '../a'"),
        ({"a": Engine("a")}, PROMPTS, {"num_samples": 0, "greedy": False}, "nothing to sample"),
        ({"a": Engine("a")}, PROMPTS, {"params": GenerationParams(16)}, "temperature above 0"),
        ({"a": Engine("a")}, PROMPTS, {"system_prompt": "x", "conversational": False}, "needs a model with a chat"),
    ],
)
def test_what_cannot_be_sampled(tmp_path, engines, prompts, options, message):
    params = options.pop("params", PARAMS)
    with pytest.raises(ValueError, match=message):
        sample_answers(engines, prompts, params, tmp_path / "answers.jsonl", **options)


def test_tiny_models_sample_in_process_and_continue_text_as_it_stands(tmp_path, tiny_tokenizer):
    engines = {
        f"seed{seed}": TransformersEngine(make_tiny_model(len(tiny_tokenizer), seed=seed), tiny_tokenizer)
        for seed in (0, 1)
    }
    prompts = [Query.from_text("The quick brown"), Query.from_text("Put the egg")]
    params = GenerationParams(max_new_tokens=8, temperature=1.0)
    output = tmp_path / "answers.jsonl"
    made = {name: partial(lambda engine: engine, engine) for name, engine in engines.items()}
    report = sample_answers(made, prompts, params, output, num_samples=2, greedy=True, conversational=False)
    rows = load_answers(output)
    assert report.sampled == len(rows) == len(read_jsonl(output)) == 12
    greedy = {(row["model"], row["prompt"]): row["completion"] for row in rows if row["sample"] == 0}
    for (model, prompt), text in greedy.items():
        [(_, again)] = engines[model].generate([prompt], GenerationParams(max_new_tokens=8))
        assert again.text == text
    assert greedy["seed0", "The quick brown"] != greedy["seed1", "The quick brown"]
