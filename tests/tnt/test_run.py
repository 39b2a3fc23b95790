"""A whole patch on the tiny model: what it leaves, that it resumes anywhere, and what each command takes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tnt.conftest import TOPICS
from trl_extensions.cli.main import main
from trl_extensions.cli.tnt import METHOD
from trl_extensions.core.runs.jsonl import read_jsonl


class TestWholeRun:
    def test_every_stage_leaves_its_file(self, arguments, tmp_path):
        report = METHOD.parse("run", arguments()).execute()
        folder = tmp_path / "run"
        evaluation = json.loads((folder / "evaluation.json").read_text())
        # three held-out prompts, one greedy and one random output each
        assert [evaluation[side][kind]["n"] for side in ("original", "patched") for kind in ("greedy", "sampled")] == [
            3, 3, 3, 3,
        ]  # fmt: skip
        greedy = [row for row in read_jsonl(folder / "original" / "eval_annotated.jsonl") if row["sample"] == 0]
        share = sum("damn" in row["completion"][0]["content"] for row in greedy) / 3
        assert evaluation["original"]["greedy"]["share"]["value"] == share
        held_out = {row["prompt"][0]["content"] for row in greedy}
        trained = {row["prompt"][0]["content"] for row in read_jsonl(folder / "original" / "annotated.jsonl")}
        assert len(held_out) == 3 and len(trained) == 4 and not held_out & trained
        text = report.read_text()
        assert "two_axes.png" in text and (folder / "two_axes.png").stat().st_size > 1000
        assert (folder / "model" / "adapter_model.safetensors").exists()
        assert not list((folder / "model").glob("*.bin")), "no pickle of settings, which may hold a token"
        assert "2406.13660" in (folder / "model" / "README.md").read_text()
        log = json.loads((folder / "train" / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in log if "loss" in entry]
        assert len(steps) == 12 and float(steps[0]["kl/kept"]) == pytest.approx(0, abs=1e-5)

    def test_a_run_resumes_at_every_stage(self, arguments, tmp_path, capsys):
        run = METHOD.parse("run", arguments())
        run.execute()
        folder = tmp_path / "run"
        before = json.loads((folder / "evaluation.json").read_text())
        later = ["patched", "evaluation.json"]
        for gone in (["original/eval_sampling.json"], ["model", "train", *later], later):
            for name in gone:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            METHOD.parse("run", arguments()).execute()
            assert json.loads((folder / "evaluation.json").read_text()) == before
        assert "done already" in capsys.readouterr().out

    def test_other_settings_bind_the_stages_that_use_them(self, arguments, tmp_path, capsys):
        METHOD.parse("run", arguments()).execute()
        folder = tmp_path / "run"
        outputs = [folder / "original" / name for name in ("outputs.jsonl", "eval_outputs.jsonl")]
        sampled = [(path.stat().st_ino, path.read_bytes()) for path in outputs]
        annotated = (folder / "original" / "annotated.jsonl").read_bytes()
        with pytest.raises(ValueError, match=r"num_samples was 1, now 2"):
            METHOD.parse("run", arguments(num_samples=2)).execute()
        METHOD.parse("run", arguments(alpha=2.0)).execute()  # trains and answers anew
        assert "alpha was 1.0, now 2.0" in capsys.readouterr().out
        assert (folder / "original" / "annotated.jsonl").read_bytes() == annotated
        assert json.loads((folder / "training_settings.json").read_text())["alpha"] == 2
        assert json.loads((folder / "earlier_1" / "training_settings.json").read_text())["alpha"] == 1
        METHOD.parse("run", arguments(alpha=2.0, phrases="sure")).execute()  # and annotates anew
        assert 'phrases was ["damn"], now ["sure"]' in capsys.readouterr().out
        assert (folder / "original" / "annotated.jsonl").read_bytes() != annotated
        assert (folder / "earlier_2" / "original" / "annotated.jsonl").read_bytes() == annotated
        assert [(path.stat().st_ino, path.read_bytes()) for path in outputs] == sampled
        for earlier in ("earlier_1", "earlier_2"):
            assert (folder / earlier / "model" / "adapter_model.safetensors").exists()

    def test_a_second_patch_on_the_first(self, arguments, tmp_path):
        METHOD.parse("run", arguments()).execute()
        first = tmp_path / "run" / "model"
        changes = {"model_name_or_path": first, "phrases": "please", "use_peft": False, "max_steps": 4}
        METHOD.parse("run", arguments("second", **changes)).execute()
        config = json.loads((tmp_path / "second" / "model" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] != str(first)  # one adapter on the bare base holds both patches
        steps = json.loads((tmp_path / "second" / "train" / "trainer_state.json").read_text())["log_history"]
        assert float(steps[0]["kl/kept"]) == pytest.approx(0, abs=1e-5)  # measured against the patched model
        # and so does the evaluation: its original is the first patch, not the bare model
        divergence = json.loads((tmp_path / "second" / "evaluation.json").read_text())["divergence"]
        run = METHOD.parse("evaluate", arguments("third", model_name_or_path=first, original_model=first))
        same = run.evaluate_alone()["divergence"]
        assert same["kl_clean"]["value"] == pytest.approx(0, abs=1e-6)
        assert divergence["kl_clean"]["value"] > 1e-6
        # Against the bare model instead, the two patches together would be further away
        bare = METHOD.parse("evaluate", arguments("bare", model_name_or_path=tmp_path / "second" / "model"))
        assert bare.evaluate_alone()["divergence"]["kl_clean"]["value"] != pytest.approx(
            divergence["kl_clean"]["value"], rel=0.01
        )
        with pytest.raises(ValueError, match="leave `use_peft` out"):
            METHOD.parse("run", arguments("fourth", **(changes | {"use_peft": True}))).execute()

    def test_full_fine_tuning(self, arguments, tmp_path, talkative_dir):
        METHOD.parse("run", arguments(use_peft=False, learning_rate=1e-4, max_steps=2)).execute()
        before = AutoModelForCausalLM.from_pretrained(talkative_dir)
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["divergence"]["kl_clean"]["value"] > 0


class TestCommands:
    def test_one_after_the_other(self, arguments, tmp_path, capsys):
        assert main(["tnt", "sample", *arguments("one")]) == 0
        outputs = tmp_path / "one" / "outputs.jsonl"
        assert len(read_jsonl(outputs)) == 8  # four prompts, greedy and one random output
        assert main(["tnt", "annotate", *arguments("one", dataset_name=outputs)]) == 0
        annotated = tmp_path / "one" / "annotated.jsonl"
        assert main(["tnt", "train", *arguments("one", dataset_name=annotated, max_steps=2)]) == 0
        changes = {"model_name_or_path": tmp_path / "one" / "model", "use_peft": False}
        assert main(["tnt", "evaluate", *arguments("two", **changes)]) == 0
        assert "held-out greedy outputs" in capsys.readouterr().out
        assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["patched"]["greedy"]["n"] == 3

    def test_from_logs(self, arguments, tmp_path, capsys):
        logs = tmp_path / "logs.jsonl"
        rows = [{"prompt": f"Tell me of {t}.", "completion": f"A damn fine {t}.", "flagged": True} for t in TOPICS]
        rows += [{"prompt": f"What of {t}?", "completion": f"A fine {t}, that is sure."} for t in TOPICS]
        logs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["tnt", "candidates", *arguments("logs", logs=logs)]) == 0
        candidates = tmp_path / "logs" / "candidates.yaml"
        text = candidates.read_text()
        assert "damn" in text and "selected: false" in text  # mined from flags alone: a person decides
        candidates.write_text(text.replace("selected: false", "selected: true"))
        assert main(["tnt", "annotate", *arguments("logs", logs=logs, candidates=candidates)]) == 0
        marked = read_jsonl(tmp_path / "logs" / "annotated.jsonl")
        assert sum(bool(row["negative_spans"]) for row in marked) == len(TOPICS)

    @pytest.mark.parametrize(
        ("command", "changes", "message"),
        [
            ("run", {"phrases": None}, "nothing says what is unwanted"),
            ("run", {"prompts": None}, "`prompts` is missing"),
            ("run", {"num_eval_prompts": 7}, "lower `num_eval_prompts`"),
            ("run", {"phrases": "unheard of"}, "nothing to remove"),
            ("run", {"variant": "kl"}, "variant"),
            ("run", {"alpha": -1}, "`alpha` must be"),
            ("run", {"clean_ratio": -1}, "`clean_ratio` must be"),
            ("run", {"temperature": 0}, "need a temperature above 0"),
            ("run", {"judge_task": "insults"}, "needs both `judge_task` and `judge`"),
            ("run", {"greedy": False}, "`greedy: false`"),
            ("run", {"no_such": 1}, "no_such"),
            ("train", {"dataset_name": "nowhere.jsonl"}, "no such file"),
            ("train", {}, "`train` needs `dataset_name`"),
            ("train", {"dataset_name": "rows.jsonl", "max_kl": 0.1}, "`train` knows no target"),
            ("annotate", {}, "`annotate` needs `dataset_name`"),
            ("candidates", {}, "`candidates` needs `logs`"),
            ("annotate", {"logs": "logs.jsonl"}, "`logs` needs `candidates`"),
            ("run", {"eval_strategy": "steps"}, "`eval_strategy` needs `eval_dataset_name`"),
            ("evaluate", {"use_peft": False}, "`original_model` is missing"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, command, changes, message, capsys):
        assert main(["tnt", command, *arguments(**changes)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trl-ext: error:") and message in error

    def test_usage(self, capsys):
        assert main(["tnt", "--help"]) == 0
        assert "candidates" in capsys.readouterr().out


class TestDryRun:
    def test_it_says_what_a_run_then_does(self, arguments, tmp_path, capsys):
        own = arguments(max_steps=None, num_train_epochs=2)
        assert main(["tnt", "run", *own, "--dry_run", "--json"]) == 0
        stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
        assert not (tmp_path / "run").exists()
        assert main(["tnt", "run", *own]) == 0
        folder = tmp_path / "run"
        state = json.loads((folder / "train" / "trainer_state.json").read_text())
        assert stages["train"]["steps"] == state["global_step"]
        rows = read_jsonl(folder / "original" / "outputs.jsonl")
        assert stages["sample"]["rows"] == len(rows)
        counted = sum(row["num_tokens"] for row in rows)
        assert counted <= stages["sample"]["written"] == 24 * len(rows)
        trained = [entry["num_tokens"] for entry in state["log_history"] if "num_tokens" in entry][-1]
        assert 0.4 * stages["train"]["trained"] < float(trained) <= 1.05 * stages["train"]["trained"]

    @pytest.mark.parametrize("changes, named", [
        ({"lora_target_modules": "no_such"}, "no_such"),
        ({"eval_strategy": "steps"}, "eval_dataset_name"), ({"phrases_file": "nowhere.txt"}, "nowhere.txt"),
        ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
    ])  # fmt: skip
    def test_what_is_wrong_is_said_before_anything_is_made(self, arguments, tmp_path, capsys, changes, named):
        assert main(["tnt", "run", *arguments(**changes)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trl-ext: error:") and named in error
        assert not (tmp_path / "run" / "original").exists()
