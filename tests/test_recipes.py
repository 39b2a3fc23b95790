"""Every recipe parses strictly and constructs its trainer on a tiny model; its data and templates are sound."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer

from tests.codeclm.exported import exported_rows
from tests.codeclm.handmade import write_rows
from tests.conftest import make_tiny_model
from tests.sami.conftest import sami_rows
from tests.tnt.conftest import tnt_rows
from trl_extensions import (
    SAMITrainer,
    TNTTrainer,
    WeakToStrongRewardTrainer,
    WeakToStrongSFTTrainer,
    WeakToStrongTrainer,
)
from trl_extensions.cli import codeclm, sami, tnt, w2s
from trl_extensions.cli.parser import peek
from trl_extensions.codeclm.pipeline.metadata import load_metadata
from trl_extensions.codeclm.pipeline.seeds import seeds_of
from trl_extensions.codeclm.pipeline.steps import PROMPTS, PromptTemplate
from trl_extensions.codeclm.run import CodecLMRun
from trl_extensions.core.training.load import build_trainer
from trl_extensions.sami.principles import load_principles, sample_constitutions
from trl_extensions.sami.run import SAMIRun
from trl_extensions.tnt.run import TNTRun
from trl_extensions.weak_to_strong.arguments import split_layers
from trl_extensions.weak_to_strong.run import WeakToStrongRun


ROOT = Path(__file__).resolve().parents[1]
# YAML files that recipes name are no recipes
INPUTS = ("principles", "metadata")
RECIPES = sorted(
    path
    for folder in ("recipes", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.yaml")
    if not any(name in path.name for name in INPUTS)
)


def of_method(method: str) -> list[Path]:
    """Recipes in the method's folder, or with its name in front."""
    return [path for path in RECIPES if path.parent.name == method or path.name.startswith(f"{method}_")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def kind_of(path: Path) -> tuple:
    """What of a recipe decides how its trainer is built: of each kind one is constructed, all are parsed."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = ("task", "train", "use_peft", "load_in_4bit", "dtype", "optim", "guard_steps", "linear_probe", "weight_by")
    return path.parts[-2], str(own.get("lora_target_modules")), *(own.get(name) for name in names)


def is_first_of_kind(path: Path) -> bool:
    return path == next(other for other in RECIPES if kind_of(other) == kind_of(path))


def test_every_recipe_is_of_a_method_and_each_method_has_all_weights_and_qlora_ones():
    found = {method: of_method(method) for method in ("sami", "tnt", "w2s", "codeclm")}
    assert sorted(path for paths in found.values() for path in paths) == RECIPES
    for method, paths in found.items():
        files = {path.stem.split("_")[1] for path in paths if path.parent.name == method}
        assert {"full", "qlora"} <= files, method


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_what_recipes_have_in_common(path):
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    trained = "all weights" if not own.get("use_peft") and own.get("dtype") else "adapter"
    if own.get("dtype") == "bfloat16":  # in which small steps on all weights would be rounded off
        assert trained == "adapter"
    model = str(own.get("model_name_or_path"))
    if ("Qwen3" in model and "Base" not in model) or "SmolLM3" in model:
        assert "/no_think" in path.read_text(encoding="utf-8")
    if not name_of(path).startswith(("benchmarks", "recipes/smollm2-135m", "recipes/mistral-7b/", "recipes/gpt2")):
        low, high = (1e-4, 2e-4) if trained == "adapter" else (2e-6, 2e-5)
        assert low <= float(own["learning_rate"]) <= high
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) < 130


# Recipe -> (where the values are published, what they are). Learning rates of adapters are ours, and not here
SAMI = "github.com/janphilippfranken/sami: experiments/tldr/conf/train_sami.yaml, generate.yaml; sami_trainer.py"
WTS = "github.com/yeruimeng/WTS (arXiv 2410.12621): safety/train.py, legal/train.py"
SAMI_FULL = {
    "model_name_or_path": "mistralai/Mistral-7B-v0.1", "optim": "rmsprop", "learning_rate": 5e-7, "beta": 0.0,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logp_reduction": "mean", "score_end": False,
    "num_constitutions": 2, "pairs": "desired", "max_new_tokens": 350, "temperature": 0.0,
    # 16 accumulated on each of 8 GPUs; checkpoints after 0.12, 0.25 and 0.38 of 2,000 rows
    "effective_batch_size": 128, "rounds": 3, "steps_per_round": 2, "steps_per_round_increment": 2,
}  # fmt: skip
SAMI_QLORA = {
    name: value
    for name, value in SAMI_FULL.items()
    if name not in ("optim", "learning_rate", "max_grad_norm", "lr_scheduler_type")
}
W2S = {
    "model_name_or_path": "openai-community/gpt2-medium", "weak_models": ["openai-community/gpt2"],
    "learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 16, "max_length": 512,
    # github.com/openai/weak-to-strong (arXiv 2312.09390): weak_to_strong/loss.py
    "confidence_coef": 0.5, "loss_warmup_ratio": 0.1,
}  # fmt: skip
PUBLISHED = {
    "recipes/mistral-7b/sami/config_full.yaml": (SAMI, SAMI_FULL),
    "recipes/mistral-7b/sami/config_full_tldr.yaml": (SAMI, SAMI_FULL),
    "recipes/mistral-7b/sami/config_qlora.yaml": (SAMI, SAMI_QLORA),
    "recipes/mistral-7b/sami/config_qlora_tldr.yaml": (SAMI, SAMI_QLORA),
    "recipes/gpt2-medium/w2s/config_safety.yaml": (WTS, W2S | {"weight_decay": 0.1, "warmup_steps": 100}),
    "recipes/gpt2-medium/w2s/config_legal.yaml": (WTS, W2S | {"weight_decay": 0.01}),
    "recipes/gpt2-medium/w2s/config_toxicity.yaml": (
        "github.com/yeruimeng/WTS (arXiv 2410.12621): toxicity/train.py, generation.py, generation_circle.py",
        {
            "weak_models": ["openai-community/openai-gpt"],
            "learning_rate": 5e-5,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 16,
            "weight_decay": 0.01,
            "warmup_steps": 0.1,
            "max_length": 512,
            "lr_scheduler_type": "linear",
            "temperature": 0.7,
            "top_p": 0.95,
            "num_eval_samples": 25,
            "greedy": True,
        },
    ),
    "recipes/llama-3.1-8b/codeclm/config_lora.yaml": (
        "arXiv 2404.05875, section on experiments (no code is released)",
        {"rewrite": "rubrics", "selection": "gap", "gap_threshold": 3.0},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_those_published(name):
    where, values = PUBLISHED[name]
    recipe = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert {field: recipe.get(field) for field in values} == values, where


def test_principle_sets_beside_the_published_recipe_are_sound():
    sets = {path.stem: load_principles(path) for path in ROOT.glob("recipes/mistral-7b/sami/principles_*.yaml")}
    assert len(sets) == 6
    unseen = {own.name for own in sets.pop("principles_tldr_unseen")}
    assert not unseen & {own.name for others in sets.values() for own in others}


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
    run = SAMIRun(*sami.METHOD.parser("run", []).parse_args_and_config(["--config", str(path), *on_cpu]))
    run.model_args.model_name_or_path = str(tiny_model_dir)
    assert len(sample_constitutions(run.principles(), run.args.num_constitutions, seed=0, key="x")) == 2
    assert run.args.effective_batch_size % run.config.per_device_train_batch_size == 0
    rows = Dataset.from_list([row | {"plain_prompt": "Hello."} for row in sami_rows(2)])
    if not is_first_of_kind(path):
        return
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
    run = TNTRun(*tnt.METHOD.parser("run", []).parse_args_and_config(["--config", str(path), *on_cpu]))
    run.model_args.model_name_or_path = str(deep_model_dir)
    assert run.annotators
    if run.args.prompts and Path(run.args.prompts).is_file():
        assert len(run.prompts()[1]) == run.args.num_eval_prompts
    if not is_first_of_kind(path):
        return
    trainer = build_trainer(TNTTrainer, run.model_args, run.config, Dataset.from_list(tnt_rows(2)), None)
    assert type(trainer) is TNTTrainer
    check_trainer(trainer, run.model_args)


W2S_ROWS = {
    "classification": [{"text": "Boil an egg.", "label": 0}, {"text": "Steal an egg.", "label": 1}],
    "reward": [{"chosen": "Boil it.", "rejected": "Eat it raw.", "preference": 0.8}] * 2,
    "generation": [{"prompt": "The quick", "completion": " brown fox"}] * 2,
}


@pytest.mark.parametrize("path", of_method("w2s"), ids=name_of)
def test_w2s_recipe(path, tiny_model_dir, on_cpu):
    argv = ["--config", str(path), *on_cpu]
    parsed = w2s.METHOD.parser("run", argv).parse_args_and_config(argv)
    args, config, model_args = parsed[0], parsed[-2], parsed[-1]
    task = args.task
    assert all(split_layers(name) for name in [model_args.model_name_or_path, *args.weak_models])
    if args.examples and Path(args.examples).is_file():
        run = WeakToStrongRun(*parsed)
        run.check()
        assert {row.label for row in run.test_examples()} == {0, 1}
    trainer_class = {
        "classification": WeakToStrongTrainer,
        "reward": WeakToStrongRewardTrainer,
        "generation": WeakToStrongSFTTrainer,
    }[task]
    if not is_first_of_kind(path):
        return
    model_args.model_name_or_path, model_args.lora_task_type = str(tiny_model_dir), "SEQ_CLS"
    trainer = build_trainer(trainer_class, model_args, config, Dataset.from_list(W2S_ROWS[task]), None)
    assert type(trainer) is trainer_class
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    if model_args.use_peft:
        assert all("lora_" in name or "score" in name for name in trainable)
    if task != "generation":
        assert any("score" in name for name in trainable)
    assert bool(model_args.load_in_4bit) == getattr(trainer.model, "is_loaded_in_4bit", False)


@pytest.mark.parametrize("path", of_method("codeclm"), ids=name_of)
def test_codeclm_recipe(path, tiny_model_dir, on_cpu, tmp_path, monkeypatch):
    # The embedded model is not needed to check a recipe; fetching it would need a network
    monkeypatch.setattr("trl_extensions.embedded.resolve_model_name", lambda name: name)
    argv = ["--config", str(path)]
    trains = peek(argv, "train") == ["True"]
    argv += on_cpu if trains else ["--output_dir", str(tmp_path)]
    for role in ("strong", "target"):  # the benchmark's script names its servers itself
        argv += [] if peek(argv, role) else [f"--{role}", "{model: any, base_url: 'http://localhost:1'}"]
    if not peek(argv, "prompts", "seeds") and not peek(argv, "metadata"):  # the user's own
        write_rows(tmp_path / "seeds.jsonl", [{"instruction": "Write a line that greets a new neighbour."}])
        argv += ["--prompts", str(tmp_path / "seeds.jsonl")]
    run = CodecLMRun(*codeclm.METHOD.parser("run", argv).parse_args_and_config(argv))
    run.check()
    assert {"strong", "target", "scorer", "judge"} <= set(run.engines().specs)
    if run.config.metadata:
        assert load_metadata(run.config.metadata, run.config.max_skills)
    if run.config.prompts:
        assert seeds_of(run.config)
    for prompt in PROMPTS.glob("*.jinja"):
        PromptTemplate(prompt.stem, run.config.prompt_folder)
    assert run.args.train == trains
    if not trains or not is_first_of_kind(path):
        return
    built = []
    monkeypatch.setattr("trl_extensions.codeclm.training.fit", lambda *given: built.append(build_trainer(*given[:5])))
    run.model_args.model_name_or_path = str(tiny_model_dir)
    write_rows(run.folder / "data.jsonl", exported_rows(4))
    run.train()
    [trainer] = built
    assert isinstance(trainer, SFTTrainer)
    check_trainer(trainer, run.model_args)
