"""What the benchmark of SAMI adapts, on the tiny model."""

import pytest
from peft import LoraConfig, get_peft_model

from tests.conftest import make_tiny_model


@pytest.mark.parametrize("layers", ["all", "third"])
def test_linear_layers_of_the_last_third_or_of_all(layers):
    sweep = pytest.importorskip("benchmarks.sami_sweep")
    plain = make_tiny_model(384)
    number = plain.config.num_hidden_layers
    model = get_peft_model(plain, LoraConfig(**sweep.lora_targets(plain, layers)))
    adapted = {
        name.split("layers.")[1].split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    }
    kinds = {"all": range(number), "third": range(number - max(1, number // 3), number)}
    assert {int(name.partition(".")[0]) for name in adapted} == set(kinds[layers])
    assert {name.partition(".")[2] for name in adapted} == {
        *(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }  # fmt: skip
