"""The outer loop on the tiny model: what it leaves, that it resumes anywhere, that it trains the original."""

import contextlib
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from trl_extensions.cli.sami import METHOD
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.sami.config import SAMIArguments, SAMIConfig


PRINCIPLES = """\
principles:
  - {name: brief, definition: Be brief., antithesis: Explain at length.}
  - {name: warm, definition: Be friendly and warm., antithesis: Be cold and plain.}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "principles.yaml").write_text(PRINCIPLES)
    words = ["eggs", "sky", "fox", "dogs", "rain", "trees", "tea", "bread", "boats", "stars", "snow", "mice"]
    words += [f"{word} and {word[::-1]}" for word in words]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"Tell me of {w}."}) + "\n" for w in words))
    return tmp_path


@pytest.fixture
def arguments(files, tiny_model_dir):
    """Command-line arguments of a run of two rounds, of 1 and 2 steps of two queries, with four held out."""

    def build(output: str = "run", **changes):
        settings = {
            "model_name_or_path": tiny_model_dir, "output_dir": files / output, "prompts": files / "queries.jsonl",
            "principles": files / "principles.yaml", "num_eval_prompts": 4, "max_new_tokens": 8,
            "keep_truncated": True, "rounds": 2, "effective_batch_size": 2, "steps_per_round": 1,
            "steps_per_round_increment": 1,
            "learning_rate": 0.01, "lr_scheduler_type": "constant", "per_device_train_batch_size": 1, "use_cpu": True,
            "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0,
            "disable_tqdm": True,
        } | changes  # fmt: skip
        return [item for name, value in settings.items() for item in (f"--{name}", str(value))]

    return build


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(folder: Path) -> dict:
    """What must not depend on interruptions: samples, scores and the numbers of the report."""
    found = {"report": json.loads((folder / "report.json").read_text())}
    for path in sorted(folder.glob("round_*/*samples.jsonl")):
        found[f"{path.parent.name}/{path.name}"] = sorted(read_jsonl(path), key=lambda row: row["index"])
    for entry in found["report"]["rounds"]:
        entry.pop("training_seconds", None)
        entry.pop("sampling", None)  # seconds, and how many rows an earlier start had made
    return found


class TestWholeRun:
    def test_two_rounds(self, arguments, files):
        run = METHOD.parse("run", arguments(preserve_weight=1.0))
        run.check()
        report = run.execute()
        folder = files / "run"
        data = json.loads((folder / "report.json").read_text())
        assert [entry["round"] for entry in data["rounds"]] == [0, 1, 2]
        counts = [(e["evaluation"]["num_queries"], e["evaluation"]["num_empty"]) for e in data["rounds"]]
        assert all(scored + empty == 4 for scored, empty in counts)
        # 1 step of 2 queries, then 2 steps of 2 queries
        assert [entry["sampling"]["kept"] for entry in data["rounds"][1:]] == [2, 4]
        assert [len(entry["steps"]) for entry in data["rounds"][1:]] == [1, 2]
        # every round trains the original again, so every first step sees no divergence from it
        for name in ("kl", "kl_plain"):
            assert [entry["steps"][0][name] for entry in data["rounds"][1:]] == pytest.approx([0.0, 0.0], abs=1e-6)
        text = report.read_text()
        assert "rounds.png" in text and (folder / "rounds.png").stat().st_size > 1000
        kept = [
            {row["id"] for row in read_jsonl(folder / f"round_{r}" / "eval_samples.jsonl") if row["kept"]}
            for r in (0, 2)
        ]
        assert text.count("| original | round 2 |") == len(kept[0] & kept[1])  # all held-out queries, fewer than six
        assert (folder / "round_2" / "model" / "adapter_model.safetensors").exists()
        assert "2404.14313" in (folder / "round_2" / "model" / "README.md").read_text()

    def test_queries_are_split_once(self, arguments):
        run = METHOD.parse("run", arguments())
        training, held_out = run.queries()
        first, second, third = (run.training_half(round_) for round_ in (1, 2, 3))
        assert len(held_out) == 4 and len(first) == len(second) == 10
        assert third == first
        assert {q.id for q in first} | {q.id for q in second} == {q.id for q in training}
        assert not {q.id for q in first} & {q.id for q in second}
        assert not {q.id for q in training} & {q.id for q in held_out}

    def test_second_round_samples_from_the_first_rounds_model(self, arguments, files):
        run = METHOD.parse("run", arguments(learning_rate=1.0))
        run.execute()
        settings = json.loads((files / "run" / "round_2" / "samples.settings.json").read_text())
        assert str(files / "run" / "round_1" / "model") in settings["engine"]

    def test_full_fine_tuning_keeps_a_separate_original(self, arguments, files):
        run = METHOD.parse("run", arguments(use_peft=False, rounds=1))
        run.execute()
        data = json.loads((files / "run" / "report.json").read_text())
        assert (files / "run" / "round_1" / "model" / "model.safetensors").exists()
        assert data["rounds"][1]["evaluation"]["kl"]["mean"] > 0


class TestHeldOut:
    def test_more_constitutions_and_unseen_principles(self, arguments, files):
        unseen = "{name: 丁寧, definition: 敬語で答える。, antithesis: ぞんざいに答える。, check: {regex: です}}"
        (files / "unseen.yaml").write_text(f"principles: [{unseen}]", encoding="utf-8")
        METHOD.parse("run", arguments(rounds=1, eval_principles=files / "unseen.yaml", pairs="desired")).execute()
        for folder in (files / "run" / "round_0", files / "run" / "round_1"):
            rows = read_jsonl(folder / "eval_samples.jsonl")
            # 4, which is all that two principles give; 2 of one
            assert {len(row["completions"]) for row in rows} == {4}
            others = read_jsonl(folder / "eval_principles_samples.jsonl")
            assert [list(choices) for choices in others[0]["choices"]] == [["丁寧"], ["丁寧"]]
            result = json.loads((folder / "evaluation.json").read_text())
            assert result["max_bound"] == pytest.approx(math.log(4))
            assert result["held_out_principles"]["max_bound"] == pytest.approx(math.log(2))
            assert {"mi_bound", "accuracy_columns"} <= set(result["same_order"])
            obeyed = result["obedience_held_out_principles"]["丁寧"]["definition"]
            assert obeyed["n"] == len([row for row in others if row["kept"]])
            assert ("original" in obeyed) == (folder.name == "round_1")
        training = read_jsonl(files / "run" / "round_1" / "samples.jsonl")
        assert all(len(row["choices"]) == 2 and all(row["choices"][0].values()) for row in training)

    def test_principles_that_are_trained_are_no_held_out_ones(self, arguments, files):
        with pytest.raises(ValueError, match=r"principles\.yaml: principle 'brief' is trained too"):
            METHOD.parse("run", arguments(eval_principles=files / "principles.yaml")).check()


class TestResuming:
    def test_done_stages_are_left_alone_and_a_run_can_grow(self, arguments, files):
        METHOD.parse("run", arguments(rounds=1)).execute()
        before = digests(files / "run")
        METHOD.parse("run", arguments(rounds=1)).execute()
        assert digests(files / "run") == before
        METHOD.parse("run", arguments(rounds=2)).execute()
        after = digests(files / "run")
        assert {name: after[name] for name in before if name.startswith("round_")} == {
            name: digest for name, digest in before.items() if name.startswith("round_")
        }

    def test_stopped_before_every_stage(self, arguments, files):
        METHOD.parse("run", arguments("whole")).execute()
        execute_in_pieces(lambda: METHOD.parse("run", arguments("pieces")))
        assert results(files / "pieces")["report"]["rise"] == results(files / "whole")["report"]["rise"]
        assert results(files / "pieces") == results(files / "whole")

    def test_stopped_inside_sampling_with_a_half_written_line(self, arguments, files):
        METHOD.parse("run", arguments("whole")).execute()
        _until(METHOD.parse("run", arguments("pieces")), "train", 1)
        path = files / "pieces" / "round_1" / "samples.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
        (files / "pieces" / "round_1" / "sampling.json").unlink()
        METHOD.parse("run", arguments("pieces")).execute()
        assert results(files / "pieces") == results(files / "whole")

    def test_other_settings_are_refused_by_name(self, arguments, files):
        _until(METHOD.parse("run", arguments()), "evaluate", 1)
        before = digests(files / "run")
        with pytest.raises(ValueError, match="max_new_tokens was 8, now 9"):
            METHOD.parse("run", arguments(max_new_tokens=9)).execute()
        assert digests(files / "run") == before

    def test_what_only_training_depends_on_keeps_what_the_original_answered(self, arguments, files, capsys):
        _until(METHOD.parse("run", arguments()), "evaluate", 1)
        samples = {path: path.read_bytes() for path in files.glob("run/round_[01]/*samples.jsonl")}
        METHOD.parse("run", arguments(learning_rate=0.02)).claim()
        assert "learning_rate was 0.01, now 0.02" in capsys.readouterr().out
        left = {path: text for path, text in samples.items() if path.match("round_0/*") or path.stem == "samples"}
        assert {path: path.read_bytes() for path in files.glob("run/round_[01]/*samples.jsonl")} == left
        assert not (files / "run" / "round_1" / "model").exists()
        assert (files / "run" / "earlier_1" / "round_1" / "model").is_dir()

    def test_training_may_change_until_a_round_is_trained(self, arguments, files):
        _until(METHOD.parse("run", arguments()), "train", 1)
        METHOD.parse("run", arguments(learning_rate=0.02, max_length=200)).execute()
        state = json.loads((files / "run" / "round_1" / "train" / "trainer_state.json").read_text())
        assert state["log_history"][0]["learning_rate"] == 0.02

    def test_a_checkpoint_cut_short_is_passed_over(self, arguments, files):
        settings = {
            "save_strategy": "steps",
            "save_steps": 1,
            "steps_per_round": 3,
            "rounds": 1,
            "effective_batch_size": 1,
        }
        METHOD.parse("run", arguments("whole", **settings)).execute()
        METHOD.parse("run", arguments("pieces", **settings)).execute()
        folder = files / "pieces" / "round_1"
        shutil.rmtree(folder / "model")
        (folder / "evaluation.json").unlink()
        (folder / "eval_sampling.json").unlink()
        (folder / "eval_samples.jsonl").unlink()
        (folder / "train" / "checkpoint-3" / "trainer_state.json").write_text('{"half')
        METHOD.parse("run", arguments("pieces", **settings)).execute()
        assert results(files / "pieces")["report"]["rise"] == results(files / "whole")["report"]["rise"]

    def test_a_folder_of_an_earlier_version_is_refused_in_one_line(self, arguments, files):
        _until(METHOD.parse("run", arguments()), "sample", 1)
        path = files / "run" / "settings.json"
        settings = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in settings.items() if k not in ("pairs", "num_eval_constitutions")})
        )
        with pytest.raises(ValueError, match=r"num_eval_constitutions.*pairs|pairs.*num_eval_constitutions") as error:
            METHOD.parse("run", arguments()).execute()
        assert "\n" not in str(error.value)

    def test_edited_principles_are_refused(self, arguments, files):
        _until(METHOD.parse("run", arguments()), "sample", 1)
        (files / "principles.yaml").write_text(PRINCIPLES.replace("Be brief.", "Be very brief."))
        with pytest.raises(ValueError, match="made with other settings: principles_in_file"):
            METHOD.parse("run", arguments()).execute()


def execute_in_pieces(start) -> None:
    """Carry a run out with one stage to each start of the command, interrupted before the next."""
    for _ in range(20):
        run, performed = start(), []

        def one_stage(name, round_, run=run, performed=performed):
            if performed:
                raise KeyboardInterrupt
            performed.append(name)
            run.perform(name, round_)

        with contextlib.suppress(KeyboardInterrupt):
            run.execute(one_stage)
            return


def _until(run, name: str, round_: int) -> None:
    """Carry out the stages before the named one."""

    def perform(stage, number):
        if (stage, number) == (name, round_):
            raise KeyboardInterrupt
        run.perform(stage, number)

    with pytest.raises(KeyboardInterrupt):
        run.execute(perform)


@pytest.mark.parametrize(("size", "asked", "micro", "accumulated"), [(3, 2, 1, 3), (4, 2, 2, 2), (6, 4, 2, 3)])
def test_micro_batches_fit_into_the_effective_batch(arguments, size, asked, micro, accumulated):
    given = arguments(effective_batch_size=size, per_device_train_batch_size=asked)
    config = METHOD.parse("run", given)._training_config()
    assert config.per_device_train_batch_size == micro and config.gradient_accumulation_steps == accumulated


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_eval_prompts": 21}, r"half of the training queries \(1\)"),
            ({"max_steps": 5}, "`max_steps` has no effect on `run`"),
            ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` has no effect on `run`"),
            ({"engine_model": "other"}, "`engine_model` would sample from another model"),
            (
                {"effective_batch_size": 4, "steps_per_round": 1, "max_response_tokens": 1},
                r"only 0 of \d+ sampled rows",
            ),
        ],
    )
    def test_one_line_before_anything_is_lost(self, arguments, changes, message):
        with pytest.raises(ValueError, match=message) as caught:
            METHOD.parse("run", arguments(**changes)).execute()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("missing", ["prompts", "principles", "model_name_or_path"])
    def test_missing_inputs_are_named(self, arguments, missing):
        given = arguments()
        at = given.index(f"--{missing}")
        with pytest.raises(ValueError, match=f"`{missing}` is missing"):
            METHOD.parse("run", given[:at] + given[at + 2 :]).execute()


OLD_NAMES = {
    "queries": "prompts", "query_column": "prompt_column", "query_pattern": "prompt_pattern",
    "query_split": "prompt_split", "num_queries": "num_prompts", "num_eval_queries": "num_eval_prompts",
    "queries_per_step": "effective_batch_size", "steps_first_round": "steps_per_round",
    "steps_growth": "steps_per_round_increment", "overflow": "overlong_policy",
}  # fmt: skip
OLD_VALUES = {
    "query_column": "text", "query_pattern": "(.*)", "query_split": "test", "num_queries": 20, "num_eval_queries": 5,
    "queries_per_step": 4, "steps_first_round": 3, "steps_growth": 4, "overflow": "drop",
}  # fmt: skip


class TestOldNames:
    @pytest.mark.parametrize("from_yaml", [False, True])
    def test_command_line_and_yaml(self, arguments, files, capsys, from_yaml):
        given, new = arguments(), {f"--{name}" for name in OLD_NAMES.values()}
        kept = [part for pair in zip(given[::2], given[1::2], strict=True) if pair[0] not in new for part in pair]
        values = OLD_VALUES | {"queries": str(files / "queries.jsonl")}
        (files / "old.yaml").write_text(json.dumps(values))
        line = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        run = METHOD.parse("run", [*kept, *(["--config", str(files / "old.yaml")] if from_yaml else line)])
        for old, name in OLD_NAMES.items():
            owner = run.config if old == "overflow" else run.args
            assert getattr(owner, name) == values[old], name
        told = [line for line in capsys.readouterr().err.splitlines() if "is now called" in line]
        assert len(told) == len(OLD_NAMES)

    def test_keyword(self, tmp_path):
        with pytest.warns(FutureWarning, match="`queries_per_step` is now called `effective_batch_size`"):
            arguments = SAMIArguments(queries="q.jsonl", queries_per_step=4)
        assert (arguments.prompts, arguments.effective_batch_size) == ("q.jsonl", 4)
        with pytest.warns(FutureWarning, match="`overflow`"):
            assert SAMIConfig(str(tmp_path), bf16=False, use_cpu=True, overflow="drop").overlong_policy == "drop"
