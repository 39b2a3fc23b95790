"""Nats per token behind a prompt, against full logits, and perplexities by hand."""

import math

import pytest
import torch

from trl_extensions.core.generation import TransformersEngine
from trl_extensions.weak_to_strong.generation.fluency import FluencyScorer, compare_fluency


def test_nats_are_those_of_full_logits(tiny_model, tiny_tokenizer):
    pairs = [("The quick", " brown fox jumps"), ("A", "!"), ("猫が", "眠る、いつも。"), ("x y z", "")]
    scorer = FluencyScorer(TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=48))
    found = scorer.score(*zip(*pairs, strict=True))
    assert found[-1] is None
    for (prompt, text), value in zip(pairs[:-1], found, strict=False):
        head, tail = (tiny_tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        with torch.no_grad():
            logps = tiny_model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        own = [logps[len(head) - 1 + place, token].item() for place, token in enumerate(tail)]
        assert value == pytest.approx(-sum(own) / len(own), rel=1e-4)


def test_perplexities_by_hand():
    two, four = math.log(2), math.log(4)
    found = compare_fluency({"before": [[two, two], [four, four]], "after": [[four, None], [8 * two, None]]}, "before")
    # Mean nats: (2 + 4) log 2 / 4, and (2 + 8) log 2 / 2
    assert found["before"]["value"] == pytest.approx(2**1.5) and found["before"]["empty"] == 0
    assert found["after"]["value"] == pytest.approx(2**5) and found["after"]["empty"] == 0.5
    assert found["after"]["ratio"]["value"] == pytest.approx(2**3.5) and "ratio" not in found["before"]
    # Of two prompts a resample has either alone or both: the ratios are 2^(2 - 1), 2^(8 - 2)
    assert (found["after"]["ratio"]["low"], found["after"]["ratio"]["high"]) == pytest.approx((2, 64))


def test_ratio_is_paired_by_prompt():
    nats = [[0.1 * i] for i in range(30)]
    found = compare_fluency({"a": nats, "b": [[value + 0.5] for [value] in nats]}, "a")
    assert found["b"]["ratio"] == pytest.approx({name: math.exp(0.5) for name in ("value", "low", "high")})
    assert found["b"]["high"] - found["b"]["low"] > 1


def test_silence_has_no_perplexity():
    found = compare_fluency({"a": [[None], [None]]}, None)
    assert found == {"a": {"value": None, "low": None, "high": None, "empty": 1.0}}
