"""Rows and trainers the TNT tests share."""

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
