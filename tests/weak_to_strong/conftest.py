"""Rows, tiny classifiers and trainers the weak-to-strong tests share."""

import pytest
from datasets import Dataset


TEXTS = [
    "Boil an egg.", "The sky is blue, with every detail you know.", "A fox", "Lazy dogs sleep for seven minutes.",
    "Be friendly and warm, please.", "0123456789", "Explain at length why.", "Answer in few words.",
]  # fmt: skip


def w2s_rows(number: int = 8, classes: int = 2) -> list[dict]:
    """Rows of different lengths with unlike soft labels; the true label is now and then another than the weak one."""
    rows = []
    for place in range(number):
        scores = [1.0 + (3 * place + 5 * k) % 7 for k in range(classes)]
        rows.append({
            "text": TEXTS[place % len(TEXTS)] + " " * (place // len(TEXTS)) + ("!" if place >= len(TEXTS) else ""),
            "soft_labels": [score / sum(scores) for score in scores],
            "label": place % classes,
        })  # fmt: skip
    return rows


def make_classifier(kind: str = "llama", classes: int = 2, seed: int = 0, vocab_size: int = 384):
    """A random classifier of two layers in float32, whose logits are not all alike."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "num_labels": classes, "pad_token_id": 0, "initializer_range": 0.2}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, **common)
        return GPT2ForSequenceClassification(config).eval()
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }  # fmt: skip
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**sizes, **common)).eval()
    return LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, **sizes, **common)).eval()


@pytest.fixture
def rows():
    return Dataset.from_list(w2s_rows())


@pytest.fixture(scope="session")
def tiny_classifier_dir(_tokenizer_dir, tmp_path_factory):
    """A tiny Llama without a classification head and its tokenizer, for code that loads by path."""
    from transformers import AutoTokenizer

    from tests.conftest import make_tiny_model

    path = tmp_path_factory.mktemp("tiny-classifier")
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_dir)
    make_tiny_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make_trainer(tmp_path, tiny_tokenizer):
    """Builds a `WeakToStrongTrainer`: float32, CPU, SGD, nothing saved, a log line per step."""
    from trl_extensions import WeakToStrongConfig, WeakToStrongTrainer

    def build(dataset, *, model=None, eval_dataset=None, peft_config=None, compute_metrics=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.1,
            "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False,
        }  # fmt: skip
        return WeakToStrongTrainer(
            make_classifier() if model is None else model,
            WeakToStrongConfig(**(defaults | settings)),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            compute_metrics=compute_metrics,
            peft_config=peft_config,
        )

    return build
