"""Rows and trainers the SAMI tests share."""

import pytest
from datasets import Dataset


TOPICS = ["eggs", "the sky", "a fox", "lazy dogs", "the rain", "old trees", "tea"]


def sami_rows(number: int = 6) -> list[dict]:
    return [
        {
            "prompts": [
                [{"role": "user", "content": f"Be brief. Tell me of {topic}."}],
                [{"role": "user", "content": f"Explain with every detail. Tell me of {topic}."}],
            ],
            "completions": [f"{topic}: yes.", f"Well, {topic} can be described in many ways, and at length."],
        }
        for topic in TOPICS[:number]
    ]


@pytest.fixture
def rows():
    return Dataset.from_list(sami_rows())


@pytest.fixture
def make_trainer(tmp_path, tiny_model, tiny_tokenizer):
    """Builds a `SAMITrainer` on the tiny model: float32, CPU, SGD, nothing saved, a log line per step."""
    from trl_extensions import SAMIConfig, SAMITrainer

    def build(dataset, *, model=tiny_model, eval_dataset=None, peft_config=None, ref_model=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.1,
            "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False,
        }  # fmt: skip
        return SAMITrainer(
            model,
            SAMIConfig(**(defaults | settings)),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
            ref_model=ref_model,
        )

    return build
