"""Every recipe parses strictly and constructs its trainer on a tiny model; its principles and templates are sound."""

from pathlib import Path

import pytest
from datasets import Dataset

from tests.sami.conftest import sami_rows
from trl_extensions import SAMITrainer
from trl_extensions.cli.sami import _parser
from trl_extensions.sami.principles import sample_constitutions
from trl_extensions.sami.run import SAMIRun
from trl_extensions.core.training import build_trainer


ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml")])
SAMI = [path for path in RECIPES if "principles" not in path.name]


def test_recipes_are_found():
    names = {str(path.relative_to(ROOT)) for path in SAMI}
    assert {
        "recipes/smollm2-135m/sami/config_lora.yaml",
        "recipes/mistral-7b/sami/config_full.yaml",
        "recipes/mistral-7b/sami/config_qlora.yaml",
    } <= names


@pytest.mark.parametrize("path", SAMI, ids=lambda path: str(path.relative_to(ROOT)))
def test_sami_recipe(path, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cpu = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--attn_implementation", "sdpa"]
    run = SAMIRun(*_parser("run").parse_args_and_config(["--config", str(path), *cpu]))
    run.model_args.model_name_or_path = str(tiny_model_dir)
    assert len(sample_constitutions(run.principles(), run.args.num_constitutions, seed=0, key="x")) == 2
    assert run.args.queries_per_step % run.config.per_device_train_batch_size == 0
    rows = Dataset.from_list(sami_rows(2))
    trainer = build_trainer(SAMITrainer, run.model_args, run.config, rows, rows if run.config.guard_steps else None)
    assert type(trainer) is SAMITrainer
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert bool(run.model_args.use_peft) == all("lora_" in name for name in trainable)
    assert bool(run.model_args.load_in_4bit) == getattr(trainer.model, "is_loaded_in_4bit", False)
