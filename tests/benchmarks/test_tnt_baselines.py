"""The rivals of targeted negative training in the trade-off, against numbers worked out by hand."""

import argparse
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from benchmarks.tnt_toxicity_curve import comments, lexicon, reduction
from benchmarks.tnt_tradeoff import BaselineTrainer, ftpo_losses, npo_losses
from trl_extensions import TNTConfig


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_npo_and_simnpo():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).repeat(2, 1), torch.tensor([[0.25, 0.25, 0.5]]).repeat(2, 1)
    how = {"token_ids": torch.tensor([0, 0]), "weights": torch.tensor([-1.0, 1.0]), "alpha": 3.0, "beta": 1.0}
    kl = 0.25 * math.log(0.25 / 0.5) + 0.25 * math.log(0.25 / 0.3) + 0.5 * math.log(0.5 / 0.2)
    found = npo_losses(p.log(), q.log() + 7.0, reference=True, **how)
    assert found.tolist() == pytest.approx([3 * 2 * math.log(1 + 0.5 / 0.25), kl], abs=1e-6)
    found = npo_losses(p.log() - 2.0, q.log(), reference=False, **how)
    assert found.tolist() == pytest.approx([3 * 2 * math.log(1 + 0.5), kl], abs=1e-6)


def test_npo_begins_as_gradient_ascent():
    """Where p = q, the gradient is that of alpha * log p, whatever beta; the kept token's is 0."""
    logits = torch.randn(2, 7, generator=torch.manual_seed(0)).requires_grad_()
    ids, weights = torch.tensor([4, 1]), torch.tensor([-1.0, 1.0])
    npo_losses(logits, logits.detach(), ids, weights, alpha=2.0, beta=0.1, reference=True).sum().backward()
    expected = -2.0 * logits.detach().softmax(-1)
    expected[0, 4] += 2.0
    expected[1] = 0.0
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=1e-5)


def test_ftpo():
    reference = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]]).repeat(2, 1)
    banned = torch.tensor([True, True, False, False, False])
    # Chosen are 2 and 3: 1 begins something unwanted too, 4 has less than a hundredth of the best one's probability.
    # In the first row they are behind token 0 by 0.5 and 3, in the second ahead of it by 3 and 4, beyond the margin.
    moves = torch.tensor([[0.0, 0.5, 1.5, 0.0, 0.2], [-2.0, 0.0, 3.0, 5.0, 0.0]])
    first = (softplus(2 + 0.5) + softplus(2 + 3)) / 2 + 0.25 * (0.5**2) / 3 + 0.4 * (0.5**2 + 0.2**2) / 2
    second = (softplus(2 - 3) + softplus(2 - 4)) / 2 + 0.25 * (1**2 + 2**2 + 4**2) / 3
    rejected = torch.tensor([0, 0])
    found = ftpo_losses(reference + moves, reference, rejected, banned, margin=2.0, most=4)
    assert found.tolist() == pytest.approx([first, second], abs=1e-5)
    # A token half way to the margin counts half: ahead by 1 and behind by 3
    moves = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0]])
    expected = (0.5 * softplus(2 - 1) + softplus(2 + 3)) / 1.5 + 0.25 * (2**2) / 3
    found = ftpo_losses(reference[:1] + moves, reference[:1], rejected[:1], banned, margin=2.0, most=4)
    assert found.tolist() == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize(("baseline", "strength"), [("npo", 5.0), ("simnpo", 500.0), ("ftpo", 2.0)])
def test_training_takes_the_marked_token_down(baseline, strength, tiny_model, tiny_tokenizer, tmp_path):
    marks = [[0, 0, 1, -1, -1, 1], [0, 0, 1, 1, -1, 1]]
    ids = [5, 6, 7]
    for _ in range(2):  # what the model would write: SimNPO leaves unlikely tokens alone
        with torch.no_grad():
            ids.append(int(tiny_model(torch.tensor([ids])).logits[0, -1].argmax()))
    rows = [{"input_ids": [*ids, 10], "token_weights": own} for own in marks]
    config = TNTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2, max_steps=15,
        learning_rate=0.02, save_strategy="no", gradient_checkpointing=False, share_prefix=False, logging_steps=1,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def marked():
        with torch.no_grad():
            return tiny_model(torch.tensor([rows[0]["input_ids"]])).logits.softmax(-1)[0, [2, 3], ids[3:]]

    before = marked()
    trainer = BaselineTrainer(
        tiny_model, config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer, peft_config=lora,
        baseline=baseline, strength=strength,
    )  # fmt: skip
    assert trainer.banned.nonzero()[:, 0].tolist() == sorted(ids[3:])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert trainer.count_items(batch) == (2 if baseline == "ftpo" else 8)  # a span's first token; all that is scored
    trainer.train()
    assert (marked() < 0.7 * before).all()


def test_marked_comments_become_rows(tmp_path):
    texts = [
        ("What a stupid idea, said he.", [[7, 13]]),
        ("idiot, you", [[0, 5]]),  # nothing before it, so nothing to predict it from
        ("All is well.", []),
        ("word " * 60 + "some fools and a moron say so " + "again " * 30, [[305, 310], [317, 322]]),
        ("なんて バカ だ。", [[4, 6]]),
    ]
    path = tmp_path / "comments.jsonl"
    path.write_text("".join(json.dumps({"text": text, "spans": spans}) + "\n" for text, spans in texts))
    rows = {row["index"]: row for row in comments(str(path))}
    assert sorted(rows) == [0, 3, 4]
    assert (rows[0]["prompt"], rows[0]["completion"]) == ("What", " a stupid idea, said he.")
    for number, row in rows.items():
        text, spans = texts[number]
        marked = [row["completion"][start:end] for start, end in row["negative_spans"]]
        assert marked == [text[start:end] for start, end in spans]
        assert row["prompt"].strip() and row["prompt"] + row["completion"] in text
    assert len(rows[3]["prompt"] + rows[3]["completion"]) < 300 < len(texts[3][0])


def test_the_words_that_people_mark_more_often_than_not(tmp_path):
    path = tmp_path / "comments.jsonl"
    rows = [{"text": "A Fool and a nice fool.", "spans": [[2, 6], [18, 22]]}] * 3 + [
        {"text": "nice", "spans": [[0, 4]]}
    ] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lexicon(argparse.Namespace(comments=str(path))) == ["fool"]  # marked 6 of 6 times, "nice" 2 of 5


def test_a_reduction_pairs_what_was_before_and_after():
    found = reduction([1.0, 0.0, 1.0, 0.0, 1.0] * 20, [2.0, 2.0, 1.0, 3.0, 0.0] * 20)  # the last one is new
    assert found["value"] == pytest.approx(0.625) and found["low"] < 0.625 < found["high"] < 1
