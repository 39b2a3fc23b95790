"""Rows of one prompt in one sequence: the same numbers and updates as in sequences of their own."""

import logging
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import make_tiny_model
from tests.tnt.conftest import tnt_rows
from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.tnt.collator import DataCollatorForTNT, PromptSampler, prompt_length
from trl_extensions.tnt.fused_loss import Objective
from trl_extensions.tnt.scores import reference_states, score_tokens, sums_of_rows


PROMPTS = (0, 1, 0, 2, 0, 1)  # of six rows


@pytest.fixture
def repeated():
    rows = tnt_rows(6)
    prompts = [row["prompt"] for row in rows]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row["prompt"] = prompts[prompt]
    return Dataset.from_list(rows)


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_layout_by_hand():
    rows = [
        {"input_ids": [5, 6, 7, 8], "token_weights": [0, 0, 1, -1]},
        {"input_ids": [5, 9], "token_weights": [0, 1]},
        {"input_ids": [5, 6, 4, 8, 8], "token_weights": [0, 0, 1, 0, 1]},
    ]
    batch = DataCollatorForTNT(pad_token_id=3, share_prefix=True)(rows)
    assert next(iter(batch)) == "num_tokens" and batch["num_tokens"].tolist() == [4, 2, 5]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 4, 8, 8], [5, 9, 3, 3, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 0, 0, 0, 0, 0]]
    assert batch["token_weights"].tolist() == [[0, 0, 1, -1, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["row_ids"].tolist() == [[-1, -1, 0, 0, 2, 2, 2], [-1, 1, -1, -1, -1, -1, -1]]


def test_without_a_common_prompt_nothing_changes():
    rows = [{"input_ids": [5, 6], "token_weights": [0, 1]}, {"input_ids": [6, 6], "token_weights": [0, 1]}]
    shared, plain = (DataCollatorForTNT(pad_token_id=3, share_prefix=share)(rows) for share in (True, False))
    assert shared.keys() == plain.keys()
    assert all(torch.equal(shared[name], plain[name]) for name in plain)


def test_rows_that_share_too_little_stay_apart():
    # Apart 3 x 6 tokens; shared 2 x 9, for one sequence would hold both long completions
    rows = [{"input_ids": [5, *ids], "token_weights": [0] + [1] * len(ids)} for ids in ([6] * 4, [7] * 4)]
    rows.append({"input_ids": [8, 9], "token_weights": [0, 1]})
    assert "row_ids" not in DataCollatorForTNT(pad_token_id=3, share_prefix=True)(rows)
    batch = DataCollatorForTNT(pad_token_id=3, share_prefix=True)(rows[:2])
    assert batch["input_ids"].tolist() == [[5, 6, 6, 6, 6, 7, 7, 7, 7]]


def test_rows_as_tensors_share_too():
    rows = [{"input_ids": torch.tensor([5, 6, last]), "token_weights": torch.tensor([0, 0, 1])} for last in (7, 8)]
    assert DataCollatorForTNT(pad_token_id=3, share_prefix=True)(rows)["input_ids"].tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("weights", "length"), [([0, 0, 1, 0], 2), ([1, -1], 1), ([1], 1), ([0, 0], 2), ([1, 0, 0, -1], 3)]
)
def test_a_prompt_ends_before_what_is_scored(weights, length):
    assert prompt_length(weights) == length


def test_states_and_sums_are_those_of_rows_apart():
    """Whole batches, so that a mistake in a row's number or in a completion's first token shows."""
    model, original = make_tiny_model(64, seed=0), make_tiny_model(64, seed=1)
    rows = [
        {"input_ids": [5, 6, 7, 8], "token_weights": [0, 0, 1, -1]},
        {"input_ids": [5, 9, 9], "token_weights": [0, -1, 1]},
        {"input_ids": [5, 6, 4, 8, 8], "token_weights": [0, 0, 1, 0, 1]},
        {"input_ids": [5, 10], "token_weights": [0, 1]},
    ]
    sums = []
    for share in (False, True):
        batch = DataCollatorForTNT(pad_token_id=3, pad_to_multiple_of=8, share_prefix=share)(rows)
        with torch.no_grad():
            reference = reference_states(original, batch)
        scores = score_tokens(model, batch, reference, Objective("rr"))
        sums.append(sums_of_rows(scores, batch))
    assert sums[0].keys() == sums[1].keys()
    for name, apart in sums[0].items():
        assert [column.shape for column in apart] == [(4,), (4,)]
        torch.testing.assert_close(sums[1][name], apart, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["full", "adapter", "another original", "checkpointing"])
def test_training_is_the_same(repeated, make_trainer, kind):
    results = []
    for share in (False, True):
        options = {
            "adapter": {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)},
            "another original": {"ref_model": make_tiny_model(384, seed=5)},
            "checkpointing": {"gradient_checkpointing": True},
        }.get(kind, {})
        torch.manual_seed(3)  # of the adapter
        trainer = make_trainer(
            repeated, model=make_tiny_model(384), per_device_train_batch_size=6, max_steps=3, share_prefix=share,
            eval_dataset=repeated, per_device_eval_batch_size=4, seed=3, **options,
        )  # fmt: skip
        trainer.train()
        results.append((trainer, trainer.evaluate()))
    (apart, expected), (shared, found) = results
    assert (
        shared.data_collator.share_prefix and len(shared.data_collator(list(shared.train_dataset))["input_ids"]) == 3
    )
    for ours, theirs in zip(steps(shared), steps(apart), strict=True):
        for name in ("loss", "grad_norm", "prob/negative", "kl/negative", "kl/kept", "entropy", "tokens/negative"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), name
        assert ours["num_tokens"] < theirs["num_tokens"]
    for name in ("eval_loss", "eval_prob/negative", "eval_kl/kept"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)
    for (name, ours), theirs in zip(shared.model.named_parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)


def test_rows_of_a_prompt_are_drawn_together(repeated, make_trainer):
    trainer = make_trainer(repeated, share_prefix=True, per_device_train_batch_size=3)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, PromptSampler)
    prompts = [tuple(row["input_ids"][: prompt_length(row["token_weights"])]) for row in trainer.train_dataset]
    order = [prompts[row] for row in sampler]
    changes = sum(one != other for one, other in pairwise(order))
    assert sorted(sampler) == list(range(6)) and changes == 2  # three prompts


def test_the_users_order_wins(repeated, make_trainer):
    trainer = make_trainer(repeated, share_prefix=True, train_sampling_strategy="group_by_length")
    assert trainer.data_collator.share_prefix and not isinstance(trainer._get_train_sampler(), PromptSampler)


def test_prompts_of_their_own_are_drawn_as_ever(rows, make_trainer):
    trainer = make_trainer(rows, share_prefix=True)
    assert trainer.data_collator.share_prefix and not isinstance(trainer._get_train_sampler(), PromptSampler)


def test_an_epoch_has_an_order_of_its_own_in_any_process():
    sampler, twin = (PromptSampler("abcabcabdd" * 3, seed=7) for _ in range(2))
    first = list(sampler)
    assert first == list(twin) == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(30)) and len(sampler) == 30
    twin.set_epoch(1)
    assert list(twin) == list(sampler)


def test_resume_in_the_middle_of_an_epoch_sees_the_rows_that_are_left(repeated, make_trainer, tmp_path):
    settings = {"share_prefix": True, "per_device_train_batch_size": 1, "learning_rate": 0.05}
    whole = make_trainer(repeated, model=make_tiny_model(384), max_steps=9, **settings)
    whole.train()
    settings |= {"save_strategy": "steps", "save_steps": 8}
    first = make_trainer(repeated, model=make_tiny_model(384), max_steps=9, **settings)
    first.train()
    second = make_trainer(repeated, model=make_tiny_model(384), max_steps=9, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    for (name, ours), theirs in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("which", ["model", "original"])
def test_models_that_cannot_share_go_on_without(repeated, make_trainer, caplog, which):
    windowed = make_tiny_model(384, seed=1)
    windowed.config.sliding_window = 4
    model, original = (windowed, None) if which == "model" else (make_tiny_model(384), windowed)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(repeated, model=model, ref_model=original, share_prefix=True)
    assert not trainer.data_collator.share_prefix
    assert sum("sliding window of 4 tokens" in record.message for record in caplog.records) == 1


def test_a_collator_of_the_users_own_is_told(repeated, tiny_model, tiny_tokenizer, tmp_path, caplog):
    args = TNTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", share_prefix=True)
    own = DataCollatorForTNT(0)
    with caplog.at_level(logging.WARNING):
        TNTTrainer(tiny_model, args, own, train_dataset=repeated, processing_class=tiny_tokenizer)
    assert any("`share_prefix` has no effect" in record.message for record in caplog.records)


def test_off_unless_asked_for():
    assert not TNTConfig("out", bf16=False).share_prefix
