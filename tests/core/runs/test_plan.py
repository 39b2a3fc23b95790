"""Estimates: formulas by hand, and steps as `Trainer` counts them."""

import pytest
import torch

from tests.conftest import make_tiny_model
from trl_extensions import SAMIConfig
from trl_extensions.core.runs import plan


def config(**settings):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False, "report_to": "none"}
    return SAMIConfig("out", **(given | settings))


@pytest.mark.parametrize("rows, processes, settings, steps, seen", [
    (10, 1, {"num_train_epochs": 2}, 10, 20),
    (10, 1, {"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 4, 20),  # 5 batches: 4 and 1
    (10, 2, {"num_train_epochs": 1}, 3, 10),
    (10, 1, {"max_steps": 3}, 3, 6),
])  # fmt: skip
def test_steps(rows, processes, settings, steps, seen):
    assert plan.steps_of(config(**settings), rows, processes) == (steps, seen)


@pytest.mark.parametrize("frozen, checkpointing, per_token", [(0, 0, 6), (1, 0, 4), (0, 1, 8), (1, 1, 6)])
def test_flops_memory_and_sums(frozen, checkpointing, per_token, monkeypatch):
    monkeypatch.setattr(plan, "_flops_per_second", lambda device, dtype: 1e6)
    model = make_tiny_model(384)
    size = sum(p.numel() for p in model.parameters())
    model.requires_grad_(not frozen)
    learned = 0
    if frozen:
        model.model.norm.requires_grad_(True)
        learned = 64
    works = [
        plan.Work("sample", "m", 2, read=5, written=2.5), plan.Work("train", "m", 4, trained=10, steps=2),
        plan.Work("ask", "", 3, read=100, written=50, prices=(1000.0, 4000.0)),
    ]  # fmt: skip
    text, found = plan.estimate(works, {"m": model}, config(gradient_checkpointing=bool(checkpointing)))
    flops = [stage["flops"] for stage in found["stages"]]
    assert flops == [size * 2 * 15, size * per_token * 40, 0]
    assert found["total"]["hours"] == pytest.approx(sum(flops) / 0.4e6 / 3600)
    assert (found["total"]["calls"], found["total"]["money"], found["total"]["steps"]) == (3, 0.9, 2)
    # 10 tokens a row, 2 rows a batch, 2 layers of 64, float32
    batch = 2 * 10 * 2 * 64 * (2 if checkpointing else 34) * 2
    weights = 4 * size + 12 * learned if frozen else 8 * size + 12 * size
    assert found["memory_bytes"] == weights + batch + 2**28
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in ("train", "in all"))


def test_tokens_of_texts(tiny_tokenizer):
    texts = ["Boil an egg.", "卵を茹でる"]
    mean = sum(len(tiny_tokenizer(text)["input_ids"]) for text in texts) / 2
    assert plan.mean_tokens(tiny_tokenizer, texts, asked=False) == mean
    chat = [{"role": "user", "content": texts[0]}]
    whole = tiny_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert plan.mean_tokens(tiny_tokenizer, texts[:1]) == pytest.approx(len(whole), abs=2)


def test_the_speed_is_of_this_machine():
    assert 1e8 < plan._flops_per_second("cpu", torch.float32) < 1e16
