"""Evaluation against the plain loop, and its summaries by hand."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import make_tiny_model
from tests.sami.conftest import sami_rows
from tests.sami.test_scores import plain_logps
from trl_extensions.core.runs.report import mean_and_error
from trl_extensions.sami.data import prepare_rows, to_dataset
from trl_extensions.sami.evaluation import evaluate_rows, score_rows, summarise
from trl_extensions.sami.loss import mutual_information_bound


def sampled_rows(number=5):
    return [
        row | {
            "id": str(i), "kept": True, "truncated": [False, True], "num_tokens": [3, 5 + i], "query": "q",
            "choices": [{"brief": True}, {"brief": False}],
        }
        for i, row in enumerate(sami_rows(number))
    ]  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [1, 600, 100_000])
def test_scores_equal_the_plain_loop_in_order(tiny_model, tiny_tokenizer, batch_tokens):
    rows = sampled_rows()
    scores = score_rows(tiny_model, tiny_tokenizer, rows, batch_tokens=batch_tokens)
    prepared = prepare_rows(to_dataset(rows), tiny_tokenizer, max_length=None, overlong_policy="error")
    for row, score in zip(prepared, scores, strict=True):
        tokens = [
            [plain_logps(tiny_model, p, c) for c in row["completion_input_ids"]] for p in row["prompt_input_ids"]
        ]
        sums = torch.tensor([[t.sum() for t in line] for line in tokens])
        means = torch.tensor([[t.mean() for t in line] for line in tokens])
        assert score["mi_bound"] == pytest.approx(mutual_information_bound(sums).item(), abs=1e-4)
        assert score["contrast_per_token"] == pytest.approx(mutual_information_bound(means).item(), abs=1e-5)
        assert score["accuracy_columns"] == (means.argmax(0) == torch.arange(2)).float().mean()
        assert "kl" not in score  # there is nothing to compare the model with


def test_kl_of_an_adapter_equals_kl_to_a_separate_original(tiny_tokenizer):
    rows = sampled_rows()
    adapted = get_peft_model(
        make_tiny_model(384), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()
    by_adapter = [score["kl"] for score in score_rows(adapted, tiny_tokenizer, rows)]
    merged = adapted.merge_and_unload()
    by_copy = [score["kl"] for score in score_rows(merged, tiny_tokenizer, rows, ref_model=make_tiny_model(384))]
    assert by_adapter == pytest.approx(by_copy, rel=1e-3)
    assert min(by_adapter) > 0


def test_the_model_is_left_as_it_was(tiny_model, tiny_tokenizer):
    tiny_model.train()
    score_rows(tiny_model, tiny_tokenizer, sampled_rows(2))
    assert all(module.training for module in tiny_model.modules())


def test_summary_by_hand():
    rows = sampled_rows(2)
    scores = [{"mi_bound": 0.1, "kl": 0.0}, {"mi_bound": 0.3, "kl": 0.2}]
    summary = summarise(rows, scores)
    # 0.1 and 0.3: mean 0.2, sample variance 0.02, over n = 2 -> 0.01
    assert summary["mi_bound"] == {"mean": pytest.approx(0.2), "se": pytest.approx(0.1)}
    assert summary["max_bound"] == pytest.approx(math.log(2))
    assert summary["length"] == pytest.approx((3 + 5 + 3 + 6) / 4)
    assert summary["length_by_constitution"] == {
        "+brief": {"mean": 3.0, "responses": 2}, "−brief": {"mean": 5.5, "responses": 2},
    }  # fmt: skip
    assert summary["truncated"] == 0.5


def test_fixed_responses_are_scored_by_the_same_model(tiny_model, tiny_tokenizer, tmp_path):
    mine, fixed = sampled_rows(3), sampled_rows(5)[3:]
    result = evaluate_rows(tiny_model, tiny_tokenizer, mine, tmp_path / "e.json", fixed_rows=fixed)
    assert json.loads((tmp_path / "e.json").read_text()) == result
    bounds = [score["mi_bound"] for score in score_rows(tiny_model, tiny_tokenizer, fixed)]
    mean, error = mean_and_error(bounds)
    assert result["fixed_responses"]["mi_bound"] == {"mean": pytest.approx(mean), "se": pytest.approx(error)}
    assert result["num_queries"] == 3 and "kl" not in result["fixed_responses"]


def test_the_original_has_no_divergence_from_itself(tiny_model, tiny_tokenizer, tmp_path):
    result = evaluate_rows(tiny_model, tiny_tokenizer, sampled_rows(2), tmp_path / "e.json", is_original=True)
    assert result["kl"] == {"mean": 0.0, "se": 0.0}


def test_empty_responses_are_counted_and_a_collapsed_model_is_said_to_be(tiny_model, tiny_tokenizer, tmp_path):
    rows = sampled_rows(3)
    rows[1] |= {"kept": False}
    result = evaluate_rows(tiny_model, tiny_tokenizer, rows, tmp_path / "e.json")
    assert (result["num_queries"], result["num_empty"]) == (2, 1)
    with pytest.raises(ValueError, match="every one of 1 held-out queries got an empty response"):
        evaluate_rows(tiny_model, tiny_tokenizer, rows[1:2], tmp_path / "e.json")
