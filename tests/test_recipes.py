"""Every recipe parses strictly and constructs its trainer on a tiny model; its data and templates are sound."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.conftest import make_tiny_model
from tests.sami.conftest import sami_rows
from tests.tnt.conftest import tnt_rows
from trl_extensions import SAMITrainer, TNTTrainer
from trl_extensions.cli.sami import _parser as sami_parser
from trl_extensions.cli.tnt import _parser as tnt_parser
from trl_extensions.core.training import build_trainer
from trl_extensions.sami.principles import sample_constitutions
from trl_extensions.sami.run import SAMIRun
from trl_extensions.tnt.run import TNTRun


ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml")])


def of_method(method: str) -> list[Path]:
    """Recipes in the method's folder, or with its name in front."""
    own = [path for path in RECIPES if path.parent.name == method or path.name.startswith(f"{method}_")]
    return [path for path in own if "principles" not in path.name]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_recipes_are_found():
    names = {name_of(path) for method in ("sami", "tnt") for path in of_method(method)}
    assert {
        "recipes/smollm2-135m/sami/config_lora.yaml",
        "recipes/mistral-7b/sami/config_full.yaml",
        "recipes/mistral-7b/sami/config_qlora.yaml",
        "recipes/smollm2-135m/tnt/config_lora.yaml",
        "recipes/llama-3.1-8b/tnt/config_full.yaml",
        "recipes/llama-3.1-8b/tnt/config_qlora.yaml",
    } <= names
    assert names == {name_of(path) for path in RECIPES if "principles" not in path.name}


def check_trainer(trainer, model_args):
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert bool(model_args.use_peft) == all("lora_" in name for name in trainable)
    assert bool(model_args.load_in_4bit) == getattr(trainer.model, "is_loaded_in_4bit", False)


@pytest.fixture
def on_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return ["--use_cpu", "true", "--output_dir", str(tmp_path), "--attn_implementation", "sdpa"]


@pytest.mark.parametrize("path", of_method("sami"), ids=name_of)
def test_sami_recipe(path, tiny_model_dir, on_cpu):
    run = SAMIRun(*sami_parser("run").parse_args_and_config(["--config", str(path), *on_cpu]))
    run.model_args.model_name_or_path = str(tiny_model_dir)
    assert len(sample_constitutions(run.principles(), run.args.num_constitutions, seed=0, key="x")) == 2
    assert run.args.queries_per_step % run.config.per_device_train_batch_size == 0
    rows = Dataset.from_list(sami_rows(2))
    trainer = build_trainer(SAMITrainer, run.model_args, run.config, rows, rows if run.config.guard_steps else None)
    assert type(trainer) is SAMITrainer
    check_trainer(trainer, run.model_args)


@pytest.fixture(scope="module")
def deep_model_dir(tiny_model_dir, tmp_path_factory):
    """As many layers as SmolLM2-135M has, for recipes that train the last ones."""
    path = tmp_path_factory.mktemp("deep")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    make_tiny_model(len(tokenizer), num_hidden_layers=30).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("path", of_method("tnt"), ids=name_of)
def test_tnt_recipe(path, deep_model_dir, on_cpu):
    run = TNTRun(*tnt_parser("run").parse_args_and_config(["--config", str(path), *on_cpu]))
    run.model_args.model_name_or_path = str(deep_model_dir)
    assert run.annotators()
    if run.args.prompts and run.args.prompts.startswith("recipes/"):
        assert len(run.prompts()[1]) == run.args.num_eval_prompts
    trainer = build_trainer(TNTTrainer, run.model_args, run.config, Dataset.from_list(tnt_rows(2)), None)
    assert type(trainer) is TNTTrainer
    check_trainer(trainer, run.model_args)
