"""What nobody set follows from what is trained, and training that does not stay finite leaves nothing behind."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import ModelConfig, SFTConfig

from trl_extensions import (
    SAMIConfig,
    SAMITrainer,
    TNTConfig,
    TNTTrainer,
    WeakToStrongConfig,
    WeakToStrongRewardConfig,
    WeakToStrongRewardTrainer,
    WeakToStrongSFTConfig,
    WeakToStrongSFTTrainer,
    WeakToStrongTrainer,
)
from trl_extensions.codeclm.training import CodecLMTrainingConfig, _trainer
from trl_extensions.core.training import load


PAIR = {"prompt": "Why is the sky blue?", "completion": " Put the egg into boiling water."}
TRAINERS = {
    "sami": (SAMITrainer, SAMIConfig, {"prompts": ["Be brief.", "Be warm."], "completions": ["Sure!", "An egg."]}),
    "tnt": (TNTTrainer, TNTConfig, PAIR | {"negative_spans": [[1, 4]]}),
    "classification": (WeakToStrongTrainer, WeakToStrongConfig, {"text": "the sky", "soft_labels": [0.9, 0.1]}),
    "reward": (WeakToStrongRewardTrainer, WeakToStrongRewardConfig, {"chosen": "An egg.", "rejected": "A fox."}),
    "sft": (WeakToStrongSFTTrainer, WeakToStrongSFTConfig, PAIR),
    "codeclm": (partial(_trainer, None), CodecLMTrainingConfig, PAIR),
}  # fmt: skip


@pytest.fixture
def build(tiny_model_dir, tmp_path):
    def make(name, number=8, **settings):
        trainer, config, row = TRAINERS[name]
        own = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        adapter = settings.pop("adapter", False)
        config = config(str(tmp_path / "train"), **(own | settings))
        model = ModelConfig(
            str(tiny_model_dir),
            use_peft=adapter,
            lora_task_type="SEQ_CLS" if "text" in row or "chosen" in row else "CAUSAL_LM",
        )
        return trainer, model, config, Dataset.from_list([row] * number), None

    return make


@pytest.mark.parametrize("name", TRAINERS)
def test_training_that_does_not_stay_finite_leaves_nothing(name, build, tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ValueError, match=r"step [0-9].*learning_rate.*1e\+30"):
        load.fit(*build(name, learning_rate=1e30, max_steps=6), target)
    assert not target.exists() and not target.with_name("model.partial").exists()


def test_a_weight_that_is_not_finite(build):
    trainer = load.build_trainer(*build("tnt", max_steps=1, learning_rate=0.0))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.inf  # of a token that is in no row
    trainer.training_step = lambda *_: torch.tensor(1.0)
    with pytest.raises(ValueError, match="weight"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "settings", "rate", "epochs"),
    [
        ("sami", {}, 2e-6, 3.0),
        ("sami", {"adapter": True}, 2e-4, 3.0),
        ("tnt", {}, 5e-6, 16.0),  # 300 / 8 rows would be 37.5
        ("tnt", {"adapter": True, "num_train_epochs": 2}, 3e-4, 2.0),
        ("classification", {}, 2e-5, 8.0),
        ("classification", {"linear_probe": True}, 2e-3, 30.0),
        ("classification", {"linear_probe": True, "number": 500}, 2e-3, 12.0),  # 6000 / 500
        ("reward", {"adapter": True}, 2e-4, 8.0),
        ("sft", {"number": 2000}, 2e-5, 1.5),  # 3000 / 2000
        ("codeclm", {"adapter": True, "learning_rate": 1e-3}, 1e-3, 3.0),
    ],
)
def test_what_nobody_set(name, settings, rate, epochs, build):
    given = build(name, **settings)
    args = load.build_trainer(*given).args
    assert (args.learning_rate, args.num_train_epochs) == (rate, epochs)
    assert given[2].learning_rate == settings.get("learning_rate")  # another trainer may be built of them


def test_it_is_said_once_and_plain_arguments_stay_as_they_are(build, tiny_model, tiny_tokenizer, caplog, tmp_path):
    load.say_once.cache_clear()
    for _ in range(2):
        load.build_trainer(*build("sami"))
    assert sum("2e-06" in record.getMessage() for record in caplog.records) == 1
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([TRAINERS["tnt"][2]])
    trainer = TNTTrainer(
        tiny_model, args, train_dataset=rows, processing_class=tiny_tokenizer, peft_config=LoraConfig()
    )
    assert (trainer.args.learning_rate, trainer.args.num_train_epochs) == (args.learning_rate, args.num_train_epochs)
