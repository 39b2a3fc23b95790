"""Rows and trainers the TNT tests share."""

import json

import pytest
from datasets import Dataset


TOPICS = ["eggs", "the sky", "a fox", "lazy dogs", "the rain", "old trees", "tea"]


def tnt_rows(number: int = 6) -> list[dict]:
    """Rows of different lengths; every second completion has an unwanted word."""
    rows = []
    for place, topic in enumerate(TOPICS[:number]):
        text = f"Sure! {topic.capitalize()} is a damn fine thing." if place % 2 == 0 else f"Of {topic}: more, please."
        start = text.find("damn")
        rows.append({
            "prompt": [{"role": "user", "content": f"Tell me of {topic}."}],
            "completion": [{"role": "assistant", "content": text}],
            "negative_spans": [[start, start + 4]] if start >= 0 else [],
        })  # fmt: skip
    return rows


@pytest.fixture(scope="session")
def _taught_weights(_tokenizer_dir):
    import torch
    from transformers import AutoTokenizer

    from tests.conftest import make_tiny_model
    from trl_extensions.tnt.collator import DataCollatorForTNT
    from trl_extensions.tnt.data import prepare_rows

    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_dir)
    batch = DataCollatorForTNT(0)(list(prepare_rows(Dataset.from_list(tnt_rows(7)), tokenizer, max_length=None)))
    labels = batch["input_ids"].masked_fill(batch["token_weights"] == 0, -100)
    model = make_tiny_model(len(tokenizer))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def taught_model(_taught_weights):
    """Builds copies of a tiny model that would write the completions of `tnt_rows`, the unwanted words included."""
    from tests.conftest import make_tiny_model

    def build():
        model = make_tiny_model(384)
        model.load_state_dict(_taught_weights)
        return model

    return build


@pytest.fixture
def rows():
    return Dataset.from_list(tnt_rows())


@pytest.fixture
def make_trainer(tmp_path, tiny_model, tiny_tokenizer):
    """Builds a `TNTTrainer` on the tiny model: float32, CPU, SGD, nothing saved, a log line per step."""
    from trl_extensions import TNTConfig, TNTTrainer

    def build(dataset, *, model=tiny_model, eval_dataset=None, peft_config=None, ref_model=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.1,
            "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False,
        }  # fmt: skip
        return TNTTrainer(
            model,
            TNTConfig(**(defaults | settings)),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
            ref_model=ref_model,
        )

    return build


@pytest.fixture(scope="session")
def talkative_dir(_tokenizer_dir, _taught_weights, tmp_path_factory):
    """A model that writes `tnt_rows` completions, unwanted words included, saved with its tokenizer."""
    from transformers import AutoTokenizer

    from tests.conftest import make_tiny_model

    path = tmp_path_factory.mktemp("talkative")
    model = make_tiny_model(384)
    model.load_state_dict(_taught_weights)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(_tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture
def arguments(talkative_dir, tmp_path):
    """Command-line arguments of a small run: seven prompts, two held out."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me of {topic}."}) + "\n" for topic in TOPICS))

    def build(output: str = "run", **changes):
        settings = {
            "model_name_or_path": talkative_dir, "output_dir": tmp_path / output, "prompts": prompts,
            "phrases": "damn",
            "num_eval_prompts": 3, "max_new_tokens": 24, "temperature": 0.5, "learning_rate": 0.003, "max_steps": 12,
            "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_peft": True, "disable_tqdm": True,
            "lora_target_modules": "all-linear", "lora_dropout": 0.0, "lora_r": 8,
        } | changes  # fmt: skip
        return [item for name, value in settings.items() if value is not None for item in (f"--{name}", str(value))]

    return build
