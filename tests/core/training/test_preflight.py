"""What is found out without weights: each trainer's settings and the model; folders, servers, launchers."""

import os
from dataclasses import replace

import pytest
from transformers import AutoModelForSequenceClassification
from trl import ModelConfig

import trl_extensions
from trl_extensions.cli.method import processes_of
from trl_extensions.core.generation import EngineArguments
from trl_extensions.core.training.preflight import Training, check_folder, check_servers, check_training


ROWS = {
    "SAMI": {"prompts": ["Be brief. Eggs?", "卵は？"], "completions": ["Boil.", "茹でる。"]},
    "TNT": {"prompt": "卵は？", "completion": "はい、茹でる。", "negative_spans": [[0, 2]]},
    "WeakToStrong": {"text": "卵", "soft_labels": [0.2, 0.8]},
    "WeakToStrongReward": {"chosen": "Boil them.", "rejected": "No.", "preference": 0.8},
    "WeakToStrongSFT": {"prompt": "Eggs?", "completion": "Boil."},
}


@pytest.fixture
def training(tiny_model_dir, tmp_path):
    def build(name, peft=None, **settings):
        trainer, config = (getattr(trl_extensions, name + end) for end in ("Trainer", "Config"))
        number = {"WeakToStrong": 2, "WeakToStrongReward": 1}.get(name)  # of labels
        more = {"model_class": AutoModelForSequenceClassification, "model_options": {"num_labels": number}}
        task = "SEQ_CLS" if number else "CAUSAL_LM"
        lora = {"use_peft": True, "lora_r": 4, "lora_task_type": task, "lora_target_modules": peft} if peft else {}
        args = config(str(tmp_path / "out"), bf16=False, **({"report_to": "none"} | settings))
        model_args = ModelConfig(str(tiny_model_dir), **lora)
        return Training(trainer, model_args, args, [ROWS[name]] * 2, **(more if number else {}))

    return build


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_sound_training_gives_a_model_without_weights(training, tmp_path, name):
    model = check_training(training(name, ["q_proj", "v_proj"]))
    # two layers; A is (4, 64), B (64, 4) of q and (32, 4) of v, which has two heads of 16
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    assert sum(p.numel() for p in adapters) == 2 * (2 * 4 * 64 + 64 * 4 + 32 * 4)
    assert all(p.is_meta for name, p in model.named_parameters() if "embed_tokens" in name)
    assert not (tmp_path / "out").exists()


def test_so_does_one_whose_reference_is_a_copy(training):
    assert all(p.requires_grad and p.is_meta for p in check_training(training("TNT")).parameters())


@pytest.mark.parametrize("settings, named", [
    ({"peft": ["no_such", "v_proj_"]}, "[Tt]arget"), ({"optim": "galore_adamw"}, "galore"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"bend": 1}}, "bend"),
    ({"push_to_hub": True, "hub_model_id": "a//b"}, "a//b"),
])  # fmt: skip
def test_what_does_not_go_together_is_said_in_one_line(training, settings, named):
    with pytest.raises(ValueError, match=named) as caught:
        check_training(training("WeakToStrongSFT", **settings))
    assert "\n" not in str(caught.value).strip()


def test_a_model_that_is_not_there(training, tmp_path):
    own = replace(training("SAMI"), model_args=ModelConfig(str(tmp_path / "nowhere")))
    with pytest.raises(OSError, match="nowhere"):
        check_training(own)


def test_folders(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "deep")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        check_folder(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="new"):
        check_folder(tmp_path / "new")


def test_every_server_is_asked_once(monkeypatch):
    asked = []

    class Engine:
        def generate(self, prompts, params):
            asked.append((len(prompts), params.max_new_tokens))
            yield 0, None

    monkeypatch.setattr("trl_extensions.core.training.preflight.create_engine", lambda _: Engine())
    server = EngineArguments(engine="endpoint", engine_base_url="http://localhost:1/v1", engine_model="m")
    check_servers([server, EngineArguments(), replace(server), replace(server, engine_model="n")])
    assert asked == [(1, 1), (1, 1)]


def test_the_launchers_own_number_of_processes(tmp_path):
    path = tmp_path / "four.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 4\n")
    assert processes_of(["--config_file", str(path)]) == 4
    assert processes_of(["--config_file", str(path), "--num_processes", "2"]) == 2
    path.write_text("no_such_key: 1\nnum_processes: 4\n")
    with pytest.raises(ValueError, match="accelerate_config"):
        processes_of(["--config_file", str(path)])
    with pytest.raises((ValueError, OSError), match="missing"):
        processes_of(["--config_file", str(tmp_path / "missing.yaml")])
