"""Features of a linear probe are what the head reads, and training on them is training with a frozen backbone."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.weak_to_strong.conftest import make_classifier, w2s_rows
from trl_extensions import WeakToStrongConfig
from trl_extensions.weak_to_strong.trainers.features import features


TOKENS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 0, 16], [17, 18, 0], [19, 20]]  # 0 is the padding token


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 7, 1000])
def test_the_head_makes_the_models_logits_of_them(kind, batch_tokens):
    model = make_classifier(kind, 3)
    model.train()
    states = features(model, TOKENS, batch_tokens=batch_tokens, progress=False)
    assert states.shape == (6, 32) and states.dtype == "float32" and model.training
    model.eval()
    for ids, state in zip(TOKENS, states, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(model.score(torch.from_numpy(state)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", ["soft_ce", "confidence"])
def test_a_probe_is_training_with_a_frozen_backbone(rows, make_trainer, kind, loss):
    settings = {"loss_type": loss, "loss_warmup_ratio": 0.0, "max_steps": 6, "per_device_train_batch_size": 4}
    frozen = make_classifier(kind)
    frozen.requires_grad_(False)
    frozen.score.requires_grad_(True)
    plain = make_trainer(rows, model=frozen, **settings)
    probe = make_trainer(rows, model=make_classifier(kind), eval_dataset=rows, linear_probe=True, **settings)
    before = probe.model.state_dict()["score.weight"].clone()
    for trainer in (plain, probe):
        trainer.train()
    after, expected = probe.model.state_dict(), plain.model.state_dict()
    assert not torch.allclose(after["score.weight"], before, atol=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert probe.evaluate()["eval_loss"] == pytest.approx(plain.evaluate(rows)["eval_loss"], rel=1e-5)
    logits = torch.from_numpy(probe.predict(rows).predictions)
    torch.testing.assert_close(logits, torch.from_numpy(plain.predict(rows).predictions), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ({}, "no"),
        ({"save_steps": 100}, "steps"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "steps"),
    ],
)
def test_a_probe_keeps_no_checkpoints_unless_they_are_wanted(settings, strategy):
    given = {"eval_steps": 500, "use_cpu": True, "bf16": False} | settings
    assert WeakToStrongConfig("out", linear_probe=True, **given).save_strategy == strategy


def test_the_backbone_runs_once_a_text(rows, make_trainer):
    model, seen = make_classifier(), []
    model.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.last_hidden_state)))
    make_trainer(rows, model=model, linear_probe=True, max_steps=6).train()
    assert sum(seen) == len(rows)


def test_given_features_are_used(make_trainer):
    rows = [{"features": [float(k == place) for k in range(32)], **row} for place, row in enumerate(w2s_rows())]
    for row in rows:
        del row["text"]
    trainer = make_trainer(Dataset.from_list(rows), linear_probe=True, max_steps=1)
    # Row i has the features e_i, so its logits are column i of the head
    torch.testing.assert_close(
        torch.from_numpy(trainer.predict(Dataset.from_list(rows)).predictions),
        trainer.model.score.weight.detach().T[:8],
    )
    with pytest.raises(ValueError, match="has `features`, which only `linear_probe` reads"):
        make_trainer(Dataset.from_list(rows))


def test_what_cannot_be_probed(rows, make_trainer):
    with pytest.raises(ValueError, match="`linear_probe` needs a model whose head is a linear layer `score`"):
        make_trainer(rows, model=make_classifier("bert"), linear_probe=True)
    with pytest.raises(ValueError, match="`linear_probe` trains the head alone"):
        make_trainer(rows, linear_probe=True, peft_config=LoraConfig(r=4, target_modules="all-linear"))
