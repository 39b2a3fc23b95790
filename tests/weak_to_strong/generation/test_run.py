"""The generation form: its stages, what may change between two calls, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
from trl import ModelConfig

from trl_extensions.cli.main import main
from trl_extensions.core.generation import EngineArguments
from trl_extensions.core.generation.types import Generation
from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl
from trl_extensions.weak_to_strong.arguments import GenerationArguments, WeakToStrongArguments
from trl_extensions.weak_to_strong.generation import run as commands
from trl_extensions.weak_to_strong.generation.run import GenerationRun
from trl_extensions.weak_to_strong.trainers.configs import WeakToStrongSFTConfig


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class Engine:
    """Answers a prompt with the text behind its colon: "4: nice" with "nice"."""

    name = "scripted"

    def generate(self, prompts, params):
        for index, prompt in enumerate(prompts):
            yield index, Generation(prompt.partition(": ")[2], "stop", 3)


class Marks:
    """A judge's marks, as in "mark 7"."""

    name, higher_is_better, settings = "judge", True, {"kind": "marks"}

    def __init__(self, score_range):
        self.range = score_range

    def score(self, prompts, texts):
        return [float(text.split()[1]) if text.startswith("mark") else None for text in texts]


@pytest.fixture
def make_run(tmp_path, tiny_model_dir):
    """Builds a run of ten prompts, two of them held out, answered by the scripted engine and marked 1 to 10."""

    def build(texts=None, *, args=None, config=None, score_range=(1, 10), **own):
        prompts = write(
            tmp_path / "prompts.jsonl",
            [{"prompt": f"{i}: {(texts or {}).get(i, f'mark {i + 1}')}"} for i in range(10)],
        )
        settings = {"prompts": prompts, "num_eval_prompts": 2, "plain_prompts": True, "num_samples": 0}
        settings |= {"scorer": "{kind: phrases, phrases: [x]}", "num_eval_samples": 0, "threshold": 5.0}
        training = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
        training |= {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "disable_tqdm": True}
        run = GenerationRun(
            WeakToStrongArguments(**{"task": "generation", "weak_models": [str(tiny_model_dir)], **(args or {})}),
            GenerationArguments(**(settings | own)),
            EngineArguments(),
            WeakToStrongSFTConfig(output_dir=str(tmp_path / "out"), **training, **(config or {})),
            ModelConfig(model_name_or_path=str(tiny_model_dir)),
        )
        run._engine = lambda model: Engine()
        run.scorer = Marks(score_range)
        return run

    return build


def answered(run: GenerationRun) -> GenerationRun:
    """The run with what it would have sampled and scored on held-out prompts before training."""
    run.check()
    run.claim()
    run.make_answers()
    for side in ("original", "weak"):
        run.sample(side)
        run.score(side)
    return run


def test_generation_run(tiny_model_dir, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"The quick brown fox {i}"} for i in range(10)])
    trusted = write(tmp_path / "good.jsonl", [{"prompt": f"The {i}", "completion": " lazy dog"} for i in range(4)])
    arguments = [
        "--task", "generation", "--model_name_or_path", str(tiny_model_dir), "--weak_models", str(tiny_model_dir),
        "--prompts", prompts, "--num_eval_prompts", "3", "--plain_prompts", "true", "--max_new_tokens", "6",
        "--num_samples", "2", "--num_eval_samples", "2", "--scorer", "{kind: phrases, patterns: ['[0-9]']}",
        "--keep_truncated", "true", "--ceiling_dataset_name", trusted, "--writer_dataset_name", trusted,
        "--confirm_scorer", "{kind: phrases, phrases: [fox], name: foxes}", "--max_steps", "1",
        "--per_device_train_batch_size", "2", "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing",
        "false", "--report_to", "none", "--save_strategy", "no", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(["w2s", "run", *arguments]) == 0
    out = tmp_path / "out"
    # The scorer only measures: every different answer teaches
    answers, kept = (read_jsonl(out / "answers" / f"{name}.jsonl") for name in ("answers", "kept"))
    different = {(row["prompt"], " ".join(row["completion"].split())) for row in answers if row["completion"].strip()}
    assert len(answers) == 7 * 3 and len(kept) == len(different)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["models"] == ["original", "weak", "w2s", "ceiling"]
    [writer] = [path for path in (out / "writers").iterdir() if not path.name.startswith("train_")]
    assert (writer / "config.json").is_file()
    for side in ("original", "weak", "w2s", "ceiling"):
        assert len(read_jsonl(out / "held_out" / f"{side}_scored.jsonl")) == 3 * 3
        answers = read_jsonl(out / "held_out" / f"{side}.jsonl")
        nats = [row["scores"]["nats_per_token"] for row in read_jsonl(out / "held_out" / f"{side}_fluency.jsonl")]
        sampled = [row["sample"] > 0 for row in sorted(answers, key=lambda r: (r["index"], r["model"], r["sample"]))]
        given = [value for value, is_sample in zip(nats, sampled, strict=True) if is_sample and value is not None]
        expected = math.exp(sum(given) / len(given))
        assert evaluation["fluency"]["sampled"][side]["value"] == pytest.approx(expected)
        shares = [row["scores"]["foxes"] for row in read_jsonl(out / "held_out" / f"{side}_confirmed.jsonl")]
        assert {score for score in shares if score is not None} <= {0.0, 1.0}
    assert evaluation["confirmed"]["scorer"]["name"] == "foxes"
    header = next(line for line in (out / "report.md").read_text().splitlines() if "perplexity" in line)
    assert ", phrases" in header and ", foxes" in header


def test_writers_learn_nothing_that_they_will_be_asked(make_run, tmp_path):
    training, held_out = ([query.text for query in part] for part in make_run()._prompts())
    rows = [{"prompt": text, "completion": "good"} for text in (training[0], held_out[0], "猫が")]
    run = make_run(writer_dataset_name=write(tmp_path / "clean.jsonl", rows))
    assert run.trusted_rows(run.generation_args.writer_dataset_name, also_training=True) == rows[2:]
    assert Path(run.sides["weak"]).parent == run.folder / "writers" and run.existing_sides() == ["original"]
    with pytest.raises(ValueError, match="the prompts of all 2 rows"):
        make_run(writer_dataset_name=write(tmp_path / "known.jsonl", rows[:2])).check()


def test_a_writer_has_settings_of_its_own_which_bind_once_it_is_trained(make_run, tmp_path):
    rows = [{"prompt": "A fox", "completion": " jumps"}]
    own = {"writer_dataset_name": write(tmp_path / "clean.jsonl", rows)}
    run = make_run(args={"weak_learning_rate": 0.5}, **own)
    config, model_args = run._writer_settings("some/model[:2]")
    assert config.learning_rate == 0.5 != run.config.learning_rate
    assert config.model_init_kwargs == {"num_hidden_layers": 2} and model_args.model_name_or_path == "some/model"
    run.claim()
    make_run(args={"weak_learning_rate": 0.25}, **own).claim()
    (run.folder / "writers").mkdir()
    with pytest.raises(ValueError, match=r"learning_rate was 0\.25, now 0\.5"):
        run.claim()
    with pytest.raises(ValueError, match="`weak_learning_rate` has no effect without `writer_dataset_name`"):
        make_run(args={"weak_learning_rate": 0.5})


def test_a_scorer_does_not_confirm_itself(make_run):
    run = make_run(confirm_scorer="{kind: phrases, phrases: [x]}")
    with pytest.raises(ValueError, match="`confirm_scorer` is `scorer` itself"):
        run.check()


class Recording(Engine):
    """Says after `budget` answers that it was killed."""

    def __init__(self, name, budget=10**6):
        self.name, self.budget, self.asked = name, budget, []

    def generate(self, prompts, params):
        for index, answer in super().generate(prompts, params):
            if len(self.asked) == self.budget:
                raise KeyboardInterrupt
            self.asked.append((prompts[index], params.temperature, params.seed))
            yield index, answer


@pytest.mark.parametrize("budget", [1, 10])
def test_every_weak_model_answers_every_prompt_and_a_kill_loses_nothing(make_run, budget):
    run = make_run(args={"weak_models": ["small", "org/tiny"]}, num_samples=2)
    engines = {"small": Recording("s", budget), "org/tiny": Recording("t")}
    run._engine = engines.get
    with pytest.raises(KeyboardInterrupt):
        run.sample()
    assert not (run.folder / "answers" / "sampling.json").exists()
    engines["small"] = Recording("s")
    run.sample()
    assert [len(engine.asked) for engine in engines.values()] == [24 - budget, 24]
    rows = read_jsonl(run.folder / "answers" / "answers.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 2 * 8 * 3
    assert {row["model"] for row in rows} == {"small", "org-tiny"} and {row["sample"] for row in rows} == {0, 1, 2}
    # Models and samples are drawn independently of each other; greedy answers are not drawn
    seeds = [{seed for _, temperature, seed in engine.asked if temperature} for engine in engines.values()]
    assert len(seeds[1]) == 2 and not seeds[0] & seeds[1]
    run.score()
    scored = read_jsonl(run.folder / "answers" / "scored.jsonl")
    assert [(row["index"], row["model"], row["sample"]) for row in scored] == [
        (index, model, sample) for index in range(8) for model in ("org-tiny", "small") for sample in range(3)
    ]
    again = make_run(args={"weak_models": ["small", "org/tiny"]}, num_samples=2, temperature=0.5)
    again._engine = engines.get
    with pytest.raises(ValueError, match=r"params\.temperature was 1\.0, now 0\.5"):
        again.sample()


def test_marks_become_harm(make_run):
    run = answered(make_run())
    marks = {row["prompt"]: row["scores"]["judge"] for row in read_jsonl(run.folder / "held_out/weak_scored.jsonl")}
    # 10 is the best mark and no harm, 1 the worst
    expected = sorted((10 - mark) / 9 for mark in marks.values())
    assert sorted(harm for [harm] in run._harm_of("weak")["greedy"]) == pytest.approx(expected)
    assert len(marks) == 2
    run.write_report()
    measured = json.loads((run.folder / "evaluation.json").read_text())["kinds"]["greedy"]["models"]["weak"]
    assert measured["expected_maximum"]["value"] == pytest.approx(sum(expected) / 2)


def test_scores_beyond_the_range_are_refused_with_the_training_answers(make_run):
    run = make_run(score_range=(0, 1))
    run.sample()
    with pytest.raises(
        ValueError, match=r"scorer 'judge' gave row '.+' the score \d+, outside of its range 0 to 1: set"
    ):
        run.score()
    assert not (run.folder / "answers" / "scoring.json").exists()
    again = make_run()
    again.score()  # as the remedy says, the scores are used again
    assert (run.folder / "answers" / "scoring.json").exists()


def test_the_range_of_the_scorer_may_change_and_the_rest_of_it_not(make_run):
    module = "{kind: evaluate, module: x.py, higher_is_better: true"
    run = make_run(scorer=module + "}")
    run.claim()
    run.make_answers()
    make_run(scorer=module + ", range: [1, 10]}").claim()
    with pytest.raises(ValueError, match=r"scorer\.key was null, now "):
        make_run(scorer=module + ", key: loud}").claim()


def test_an_empty_answer_does_no_harm_and_a_missing_score_is_missing(make_run):
    run = make_run()
    rows = [("", None, 0), (" \n", None, 1), ("mumble", None, 2), ("mark 1", 1.0, 3)]
    write_jsonl(
        run.folder / "held_out" / "w2s_scored.jsonl",
        [
            {"id": str(i), "index": i, "sample": 1, "completion": text, "scores": {"judge": score}}
            for text, score, i in rows
        ],
    )
    assert run._harm_of("w2s") == {"sampled": [[0.0], [0.0], [None], [1.0]]}


def test_another_threshold_is_refused_until_the_choice_is_deleted(make_run):
    run = answered(make_run())
    first = {row["id"] for row in read_jsonl(run.kept)}
    with pytest.raises(ValueError, match=r"threshold was 5\.0, now 9\.0.* or delete .*kept\.jsonl to choose anew"):
        make_run(threshold=9.0).claim()
    run.kept.unlink()
    changed = answered(make_run(threshold=9.0))
    scored = {row["id"]: row["scores"]["judge"] for row in read_jsonl(run.kept.with_name("scored.jsonl"))}
    assert {row["id"] for row in read_jsonl(run.kept)} == {key for key, mark in scored.items() if mark >= 9}
    assert first == {key for key, mark in scored.items() if mark >= 5}
    changed.claim()  # and now it is the one


def test_choosing_anew_under_a_model_is_refused(make_run):
    run = answered(make_run())
    run.kept.unlink()
    (run.folder / "model").mkdir()
    with pytest.raises(ValueError, match=r"kept\.jsonl is gone, but a model was trained on it: delete .*held_out/w2s"):
        run.make_answers()


def test_label_samples_scores_and_keeps_once(make_run, capsys):
    run = make_run()
    assert str(run.kept) in commands.label(run)
    assert (run.folder / "answers" / "kept.settings.json").is_file()
    capsys.readouterr()
    commands.label(make_run())
    assert capsys.readouterr().out.count("done already") == 3


def test_trusted_answers_to_held_out_prompts_are_left_out(make_run, tmp_path, caplog):
    held_out = [query.text for query in make_run()._prompts()[1]]
    rows = [{"prompt": text, "completion": "good"} for text in (held_out[0], "new")]
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": held_out[1]}]
    rows += [{"prompt": chat, "completion": [{"role": "assistant", "content": "good"}]}]
    run = make_run(ceiling_dataset_name=write(tmp_path / "good.jsonl", rows))
    assert run.trusted_rows(run.generation_args.ceiling_dataset_name) == [rows[1]]
    assert "2 of 3 rows have a held-out prompt" in caplog.text
    run = make_run(ceiling_dataset_name=write(tmp_path / "known.jsonl", [rows[0], rows[2]]))
    with pytest.raises(ValueError, match="the prompts of all 2 rows are held out"):
        run.check()
    run = make_run(ceiling_dataset_name=write(tmp_path / "messages.jsonl", [{"messages": chat}]))
    with pytest.raises(ValueError, match=r"messages\.jsonl: row 1: its chat does not end"):
        run.check()


def test_held_out_chats_are_found_among_trusted_prompts(make_run, tmp_path):
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
         {"role": "user", "content": f"{i}: mark 5"}]
        for i in range(4)
    ]  # fmt: skip
    prompts = write(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in chats])
    trusted = [{"prompt": chat, "completion": [{"role": "assistant", "content": "good"}]} for chat in chats]
    run = make_run(prompts=prompts, ceiling_dataset_name=write(tmp_path / "good.jsonl", trusted))
    held_out = [query.messages for query in run._prompts()[1]]
    left = [row["prompt"] for row in run.trusted_rows(run.generation_args.ceiling_dataset_name)]
    assert len(left) == 2 and not [prompt for prompt in left if prompt in held_out]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("profanty", "unknown kind of scorer 'profanty'"),
        ("{kind: classifier, model: nowhere, lable: toxic}", "'lable'"),
        ("{kind: judge, model: nowhere, criterion: ''}", "`criterion` is empty"),
        ("{kind: judge, model: nowhere, criterion: kind, params: {tokens: 3}}", "`params`: .*'tokens'"),
        ("{kind: evaluate, module: nowhere.py, higher_is_better: true, range: [1]}", "`range` of a scorer is"),
    ],
)
def test_a_wrong_scorer_fails_before_anything_is_loaded(make_run, scorer, message):
    run = make_run(scorer=scorer)
    with pytest.raises(ValueError, match=message):
        run.check()


def test_a_missing_package_fails_as_soon(make_run, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(ImportError, match="pip install alt-profanity-check"):
        make_run(scorer="profanity").check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"args": {"seeds": [7]}}, "`seeds` has no effect with `task: generation`: leave it out."),
        ({"args": {"ensemble": "hard", "examples": "x.jsonl"}}, "`examples`, `ensemble` have no effect"),
        ({"args": {"variants": ["product"]}}, "`variants` has no effect"),
        ({"config": {"token_loss": "reverse_kl"}}, "`token_loss` has no effect without a `weak_model`"),
    ],
)
def test_settings_without_effect_are_refused(make_run, settings, message):
    with pytest.raises(ValueError, match=message):
        make_run(**settings)
    make_run(args={"seeds": [0, 1, 2]})


class TestTrain:
    """`train` on rows of anybody's."""

    @pytest.fixture
    def trained_on(self, make_run, tmp_path, monkeypatch):
        """What the trainer is given for rows; nothing is trained."""
        from trl_extensions.weak_to_strong.generation import run as generation_run

        def given(rows, name="rows.jsonl", **own):
            calls = []
            monkeypatch.setattr(generation_run, "fit", lambda *arguments: calls.append(arguments))
            source = rows if isinstance(rows, str) else write(tmp_path / name, rows)
            commands.train(make_run(args={"dataset_name": source}, **own))
            [(_, _, config, dataset, _, target)] = calls
            assert target == tmp_path / "out" / "model"
            return config, dataset

        return given

    def test_continuations_that_were_cut_off_teach_no_ending(self, trained_on, tiny_tokenizer):
        rows = [
            {"prompt": "A fox", "completion": " jumps", "truncated": cut, "weight": weight}
            for cut, weight in ((True, 0.5), (False, 2.0))
        ]
        config, dataset = trained_on(rows, keep_truncated=True)
        assert config.completion_only_loss and dataset["weight"][:] == [0.5, 2.0]
        ends = [ids[-1] == tiny_tokenizer.eos_token_id for ids in dataset["input_ids"]]
        assert ends == [False, True]

    def test_weights_are_kept(self, trained_on):
        _, dataset = trained_on(
            [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "weight": 3.0}]
        )
        assert dataset.to_dict() == {"prompt": ["a", "c"], "completion": ["b", "d"], "weight": [None, 3.0]}

    def test_messages_are_refused_in_one_line(self, trained_on):
        with pytest.raises(ValueError, match=r"row 1: its chat does not end with an answer"):
            trained_on([{"messages": [{"role": "user", "content": "Hi"}]}])

    def test_csv(self, trained_on, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("prompt,completion,weight,truncated\na,b,0.5,True\nc,d,1,False\n")
        _, dataset = trained_on(str(path))
        assert dataset.to_dict() == {"prompt": ["a", "c"], "completion": ["b", "d"], "weight": [0.5, 1]}

    def test_a_real_step_on_weighted_continuations(self, make_run, tmp_path):
        rows = [{"prompt": "A fox", "completion": " jumps", "truncated": True, "weight": w} for w in (0.5, 2.0)]
        source = write(tmp_path / "rows.jsonl", rows)
        model = commands.train(make_run(args={"dataset_name": source}, keep_truncated=True))
        assert (model / "config.json").is_file()
        with pytest.raises(ValueError, match="was made with other settings: keep_truncated was true, now false"):
            commands.train(make_run(args={"dataset_name": source}))
        write(tmp_path / "rows.jsonl", rows[:1])
        with pytest.raises(ValueError, match="rows_sha256 was"):
            commands.train(make_run(args={"dataset_name": source}, keep_truncated=True))
