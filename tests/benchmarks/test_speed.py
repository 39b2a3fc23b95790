"""What the speed benchmarks compare computes the same thing, and what they count is what a hand would count."""

import json

import pytest
import torch
from torch import nn

from benchmarks.speed import paths_labels, paths_sami, paths_tnt, paths_w2s
from benchmarks.speed.__main__ import measure_case
from benchmarks.speed.bookkeeping import run_codec
from benchmarks.speed.cases import SamiCase, SamiGrowth, TntCase, all_cases, quick_cases
from benchmarks.speed.measure import counted_flops
from benchmarks.speed.models import (
    TINY,
    Size,
    backbone_parameters,
    clear_gradients,
    head_parameters,
    make_classifier,
    make_model,
)
from benchmarks.speed.report import Results, write_report
from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl


UNEVEN = paths_sami.Query(
    prompts=[[5, 6, 7], [8, 9, 10, 11, 12], [13]], responses=[[20, 21], [22, 23, 24, 25], [26, 27, 28]]
)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def both(model, *steps):
    """Losses and gradients of ways of doing one step on one model."""
    results = []
    for step in steps:
        clear_gradients(model)
        results.append((step(), gradients(model)))
    return results


def test_the_plain_path_and_ours_are_the_same_step():
    model = make_model(TINY)
    (plain, plain_grads), (ours, our_grads) = both(
        model, lambda: paths_sami.plain(model, UNEVEN), lambda: paths_sami.ours(model, UNEVEN)
    )
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, plain_grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_dense_tnt_and_ours_are_the_same_step(frozen):
    policy, original = make_model(TINY, 0, frozen_head=frozen), make_model(TINY, 1).eval()
    batch = paths_tnt.make_batch(2, 60, TINY.vocabulary)
    assert (batch.inputs()["token_weights"] < 0).sum() == 2  # token 50 of each row
    (dense, dense_grads), (ours, our_grads) = both(
        policy,
        lambda: paths_tnt.dense(policy, original, batch),
        lambda: paths_tnt.ours(policy, original, batch),
    )
    assert ("lm_head.weight" in our_grads or "model.embed_tokens.weight" in our_grads) is not frozen
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, dense_grads, atol=1e-5, rtol=1e-5)


def test_without_unwanted_tokens_the_distillation_loss_is_ours():
    policy, original = make_model(TINY, 0), make_model(TINY, 1).eval()
    batch = paths_tnt.make_batch(2, 40, TINY.vocabulary)
    (theirs, their_grads), (ours, our_grads) = both(
        policy,
        lambda: paths_tnt.distillation(policy, original, batch),
        lambda: paths_tnt.ours(policy, original, batch),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, their_grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_all_paths_of_weak_to_strong_are_the_same_step(frozen):
    strong, weak = make_model(TINY, 0, frozen_head=frozen), make_model(TINY, 1).eval()
    batch = paths_w2s.make_batch(2, 20, 30, TINY.vocabulary)
    paths = [lambda path=path: path(strong, weak, batch) for path in paths_w2s.PATHS.values()]
    (dense, dense_grads), *others = both(strong, *paths)
    assert ("model.embed_tokens.weight" in dense_grads) is not frozen
    for loss, grads in others:
        torch.testing.assert_close(loss, dense, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads, dense_grads, atol=1e-5, rtol=1e-5)


def test_samples_of_one_prompt_are_the_same_step_apart_and_shared():
    policy, original = make_model(TINY, 0), make_model(TINY, 1).eval()
    batch = paths_tnt.make_samples(3, 20, 60, TINY.vocabulary)
    assert (batch.tokens, batch.scored_tokens) == (240, 180)
    (apart, grads), (shared, shared_grads) = both(
        policy,
        lambda: paths_tnt.ours(policy, original, batch),
        lambda: paths_tnt.shared(policy, original, batch),
    )
    assert batch.inputs(share_prefix=True)["input_ids"].shape == (1, 200)
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_grads, grads, atol=1e-5, rtol=1e-5)


def test_both_ways_of_labelling_give_the_same_logits():
    model, texts = make_classifier(TINY), paths_labels.make_texts(20, TINY.vocabulary)
    assert min(map(len, texts)) < 60 < 150 < max(map(len, texts))
    torch.testing.assert_close(
        paths_labels.ours(model, texts), paths_labels.in_order(model, texts), atol=1e-5, rtol=1e-5
    )


def test_bookkeeping_makes_every_pair():
    # Lists of five; rubrics once for the one metadata; a rewrite, two answers and two scores each
    assert run_codec(30) == 30 // 5 + 1 + 5 * 30


def test_both_ways_of_sft_are_the_same_step():
    model = make_model(TINY)
    (all_positions, one), (at_labels, other) = both(
        model, lambda: paths_sami.sft(model, UNEVEN), lambda: paths_sami.sft_at_labels(model, UNEVEN)
    )
    torch.testing.assert_close(at_labels, all_positions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_tokens_of_a_query_by_hand():
    # prompts 3 + 5 + 1, responses 2 + 4 + 3 under each of 3 prompts; plain: 9 sequences as long as 5 + 4
    assert (UNEVEN.layout_tokens, UNEVEN.scored_tokens, UNEVEN.repeated_tokens) == (9 + 27, 27, 81)


def test_flops_of_a_linear_layer_by_hand():
    layer = nn.Linear(5, 7, bias=False)
    states = torch.randn(3, 5, requires_grad=True)
    # forward, gradient in the states, gradient in the weight: 2 x 3 x 5 x 7 each
    assert counted_flops(lambda: layer(states).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_flops_of_in_place_products_and_attention_by_hand():
    into, left, right = torch.zeros(3, 7), torch.randn(3, 5), torch.randn(5, 7)
    assert counted_flops(lambda: into.addmm_(left, right)) == 2 * 3 * 5 * 7
    query, key, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    attention = nn.functional.scaled_dot_product_attention
    product = 2 * 2 * 8 * 8 * 4  # two heads, 8 x 8 x 4
    assert counted_flops(lambda: attention(query, key, value, is_causal=True)) == 2 * product
    # backward: the scores again, and the gradients in value, scores, query and key
    assert counted_flops(lambda: attention(query, key, value, is_causal=True).sum().backward()) == (2 + 5) * product


def test_weights_by_hand():
    model = make_model(TINY)
    # a layer: four 32 x 32 products of attention, three 32 x 64 of the MLP; the head: 128 x 32
    assert backbone_parameters(model) == 4 * 32 * 32 + 3 * 32 * 64
    assert head_parameters(model) == 128 * 32


def test_flops_of_a_step_by_hand():
    size = Size(hidden=32, intermediate=64, layers=2, heads=2, vocabulary=512)
    model = make_model(size)
    query = paths_sami.make_query(2, 20, 6, size.vocabulary)
    backbone, head = backbone_parameters(model), head_parameters(model)
    attention = 14 * size.hidden * size.layers  # seven products of tokens x tokens x hidden, two operations each
    plain = counted_flops(lambda: paths_sami.plain(model, query))
    by_hand = 6 * query.repeated_tokens * (backbone + head) + 4 * 26**2 * attention
    assert plain == pytest.approx(by_hand, rel=1e-3)  # the angles of rotary positions are a product too
    ours = counted_flops(lambda: paths_sami.ours(model, query))
    by_hand = 6 * (query.layout_tokens * backbone + query.scored_tokens * head) + 2 * 32**2 * attention
    assert ours == pytest.approx(by_hand, rel=1e-3)


def test_a_run_is_resumed_and_reported(tmp_path, monkeypatch):
    case = SamiCase(2, 8)
    monkeypatch.setattr("benchmarks.speed.cases.Size", lambda: TINY)
    results = tmp_path / "results.jsonl"
    made = []
    alone = {"mb": 2.0, "flops": 10**12}
    monkeypatch.setattr("benchmarks.speed.__main__.measure_alone", lambda own, path: made.append(path) or alone)
    for rounds in (1, 3):
        done = read_jsonl(results) if results.exists() else []
        with JsonlWriter(results) as writer:
            assert measure_case(case, rounds, done, writer, float("inf"))
    assert made == ["plain", "ours"]  # each once
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(row["round"] for row in rows if row["what"] == "time" and row["path"] == "ours") == [0, 1, 2]
    write_report(rows, [case], tmp_path)
    assert "| 2 | 8 |" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_nothing_is_measured_after_the_deadline(tmp_path):
    with JsonlWriter(tmp_path / "results.jsonl") as writer:
        assert not measure_case(SamiCase(2, 8), 1, [], writer, float("-inf"))
    assert not (tmp_path / "results.jsonl").read_text()


def test_ratios_are_taken_within_a_round():
    case = SamiCase(2, 8)
    rows = [
        {"case": case.name, "what": "time", "path": path, "round": number, "cpu": seconds, "wall": seconds}
        for number, (plain, ours) in enumerate([(4.0, 2.0), (9.0, 3.0)])
        for path, seconds in (("plain", plain), ("ours", ours))
    ] + [{"case": case.name, "what": "alone", "path": path, "mb": mb} for path, mb in (("plain", 8), ("ours", 2))]
    results = Results(rows, [case, SamiGrowth()])
    assert results.cases == [case]
    assert results.ratios(case, "plain", "ours") == [2.0, 3.0]
    assert results.memory_ratio(case, "ours", "plain") == 0.25


def test_names_are_distinct_and_floors_by_hand():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert {case.name for case in quick_cases()} <= set(names)
    backbone, head = 8 * (4 * 512**2 + 3 * 512 * 2048), 49152 * 512
    assert SamiCase(2, 200).floor() == 6 * (2 * (200 + 120) * backbone + 240 * head)
    assert TntCase(False).floor() == 8 * (1024 * backbone + 1020 * head)
    assert TntCase(True).floor() == 8 * 1024 * backbone + 6 * 1020 * head
