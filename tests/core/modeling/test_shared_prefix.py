"""Which models may share a prompt, and that the mask says what it should."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conftest import make_tiny_model
from trl_extensions.core.modeling.head import last_hidden_states
from trl_extensions.core.modeling.shared_prefix import attention_mask, why_not_exact


def tiny(model_type: str, **overrides):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    } | overrides  # fmt: skip
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "gpt_neox", "phi", "granite"])
def test_rotary_models_with_full_attention_qualify(model_type):
    assert why_not_exact(tiny(model_type)) is None


def test_learned_positions_qualify_where_positions_can_be_given():
    assert why_not_exact(tiny("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)) is None


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("mistral", {"sliding_window": 4}, "sliding window of 4 tokens"),
        ("gemma2", {"sliding_window": 4}, "sliding window of 4 tokens"),
        ("bloom", {"n_layer": 2, "n_head": 4}, ""),  # positions come from the attention mask (ALiBi)
        ("mamba", {"state_size": 4, "num_hidden_layers": 2}, ""),  # no attention at all
    ],
)
def test_other_models_are_found_out(model_type, overrides, reason):
    found = why_not_exact(tiny(model_type, **overrides))
    assert found is not None and reason in found


def test_a_window_longer_than_every_row_hides_nothing():
    model = tiny("mistral", sliding_window=32)
    assert why_not_exact(model, longest=32) is None
    assert "may be shorter" in why_not_exact(model, longest=33)
    assert "may be shorter" in why_not_exact(model)


def test_attention_without_masks_is_refused():
    model = make_tiny_model(64)
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 attention takes no mask" in why_not_exact(model)


def test_the_model_is_left_as_it_was():
    model = make_tiny_model(64).train()
    why_not_exact(model)
    assert all(module.training for module in model.modules())


def test_mask_by_hand():
    # prompt p q, continuation a, continuation b c, padding
    groups = torch.tensor([[-1, -1, 0, 1, 1, -1]])
    real = torch.tensor([[1, 1, 1, 1, 1, 0]])
    model = make_tiny_model(64)
    visible = attention_mask(groups, real, model)
    assert visible[0, 0, :5].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
    ]
    assert visible[0, 0, 5].any()  # a padded query sees something, or softmax would give nan
    model.config._attn_implementation = "eager"
    assert torch.equal(attention_mask(groups, real, model) == 0, visible)
    model.config._attn_implementation = "flex_attention"
    block_mask = attention_mask(groups, real, model)
    assert torch.equal(create_mask(block_mask.mask_mod, 1, None, 6, 6, "cpu"), visible)


def test_flex_attention_skips_what_another_continuation_hides():
    # a prompt of 128 tokens and three continuations of as many: blocks of 128 x 128
    groups = torch.arange(-1, 3).repeat_interleave(128)[None]
    model = make_tiny_model(64)
    model.config._attn_implementation = "flex_attention"
    block_mask = attention_mask(groups, torch.ones_like(groups), model)
    assert block_mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def test_flex_attention_scores_as_sdpa_does():
    model = make_tiny_model(64, num_key_value_heads=4)
    tokens = torch.arange(11)[None] + 3
    groups = torch.tensor([[-1] * 4 + [0] * 3 + [1] * 4])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]])
    states = {}
    # not compiled, which takes a minute; flex attention has no backward on a CPU
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        for kind in ("sdpa", "flex_attention"):
            model.set_attn_implementation(kind)
            assert why_not_exact(model) is None
            mask = attention_mask(groups, torch.ones_like(groups), model)
            states[kind] = last_hidden_states(model, input_ids=tokens, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(states["flex_attention"], states["sdpa"], atol=1e-5, rtol=1e-5)
