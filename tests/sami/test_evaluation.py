"""Evaluation against the plain loop, and its summaries by hand."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import make_tiny_model
from tests.sami.conftest import sami_rows
from tests.sami.test_scores import plain_logps
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.runs.report import mean_and_error
from trl_extensions.sami.data import prepare_rows, to_dataset
from trl_extensions.sami.evaluation import (
    evaluate_rows,
    load_multiple_choice,
    load_references,
    score_completions,
    score_rows,
    side_effects,
    summarise,
)
from trl_extensions.sami.loss import mutual_information_bound
from trl_extensions.sami.report import axes_in_words


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
    result = evaluate_rows(tiny_model, tiny_tokenizer, rows, tmp_path / "e.json", fixed_rows=rows)
    assert (result["num_queries"], result["num_empty"]) == (2, 1)
    assert result["fixed_responses"]["num_queries"] == 2
    with pytest.raises(ValueError, match="every one of 1 held-out queries got an empty response"):
        evaluate_rows(tiny_model, tiny_tokenizer, rows[1:2], tmp_path / "e.json")


def test_broken_weights_are_said_to_be(tiny_model, tiny_tokenizer, tmp_path):
    with torch.no_grad():
        tiny_model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN") as caught:
        evaluate_rows(tiny_model, tiny_tokenizer, sampled_rows(2), tmp_path / "e.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "e.json").exists()


class TestSecondAxis:
    def adapted(self):
        return get_peft_model(make_tiny_model(384), LoraConfig(target_modules="all-linear", init_lora_weights=False))

    def test_completions_equal_the_plain_loop(self, tiny_tokenizer):
        from trl_extensions.core.training.encoding import encode_completion, encode_prompt, end_token_id

        model, end = self.adapted().eval(), end_token_id(tiny_tokenizer, True)
        rows = [
            {"prompt": [{"role": "user", "content": "Eggs?"}], "completion": "Boil them."},
            {"prompt": [{"role": "user", "content": "卵は？"}], "completion": "十分間ゆでます。", "truncated": True},
        ]
        base = make_tiny_model(384)
        for tokens in (1, 1000):
            scores = score_completions(model, tiny_tokenizer, rows, batch_tokens=tokens)
            for row, score in zip(rows, scores, strict=True):
                prompt = encode_prompt(tiny_tokenizer, row["prompt"], "prompt")
                ids = encode_completion(tiny_tokenizer, row["completion"], end, truncated=row.get("truncated", False))
                assert score["tokens"] == len(ids)
                assert score["logp"] == pytest.approx(plain_logps(model, prompt, ids).sum().item(), abs=1e-3)
                assert score["logp_original"] == pytest.approx(plain_logps(base, prompt, ids).sum().item(), abs=1e-3)
                assert score["kl"] > 0

    def test_what_moved(self, tiny_tokenizer, tmp_path):
        (tmp_path / "people.jsonl").write_text('{"prompt": "Eggs?", "completion": "Boil."}\n' * 3)
        choice = {"question": "2 + 2?", "choices": ["four", "a much longer wrong one"], "answer": "four"}
        other = {"question": "卵は？", "choices": ["鳥", "魚"], "answer": 0}
        (tmp_path / "choices.jsonl").write_text("".join(json.dumps(own) + "\n" for own in (choice, other)))
        queries, model = [Query.from_text("Eggs?"), Query.from_text("卵は？")], self.adapted()
        settings = {
            "params": GenerationParams(6), "conversational": True, "references": str(tmp_path / "people.jsonl"),
            "multiple_choice": str(tmp_path / "choices.jsonl"),
        }  # fmt: skip
        original = TransformersEngine(make_tiny_model(384), tiny_tokenizer)
        first = side_effects(original, queries, tmp_path / "first.jsonl", **settings)
        assert "unchanged" not in first["plain_answers"] and "original" not in first["multiple_choice"]
        again = TransformersEngine(model, tiny_tokenizer)
        moved = side_effects(again, queries, tmp_path / "second.jsonl", originals=tmp_path / "first.jsonl", **settings)
        assert (
            moved["plain_answers"]["unchanged"]["value"] in (0, 0.5, 1) and moved["plain_answers"]["kl"]["value"] > 0
        )
        people = moved["references"]
        assert people["original"]["value"] == pytest.approx(first["references"]["nats_per_token"]["value"], rel=1e-4)
        change = people["nats_per_token"]["value"] / people["original"]["value"] - 1
        assert people["relative_change"]["value"] == pytest.approx(change)
        right = []
        for own, truth in ((choice, 0), (other, 0)):
            prompt = [{"role": "user", "content": own["question"]}]
            rows = [{"prompt": prompt, "completion": text, "truncated": True} for text in own["choices"]]
            scores = score_completions(model, tiny_tokenizer, rows)
            each = [score["logp"] / score["tokens"] for score in scores]
            right.append(each.index(max(each)) == truth)
        assert moved["multiple_choice"]["accuracy"]["value"] == sum(right) / 2
        assert moved["multiple_choice"]["original"] == first["multiple_choice"]["accuracy"]

    @pytest.mark.parametrize(
        ("load", "row", "named"),
        [
            (load_references, {"prompt": "a"}, "row 2 has no `completion`"),
            (load_multiple_choice, {"question": "a", "choices": ["b"]}, "`choices`"),
            (load_multiple_choice, {"question": "a", "choices": [2, 3], "answer": 1}, "2 texts"),
            (load_multiple_choice, {"question": "a", "choices": ["b", " "], "answer": 0}, "2 texts"),
            (load_multiple_choice, {"question": "a", "choices": ["b", "c"], "answer": "d"}, "`answer` 'd'"),
        ],
    )
    def test_bad_rows_are_named(self, load, row, named, tmp_path):
        good = {"prompt": "a", "completion": "b", "question": "a", "choices": ["b", "c"], "answer": 1}
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(own) + "\n" for own in (good, row)))
        with pytest.raises(ValueError, match="row 2") as error:
            load(str(tmp_path / "rows.jsonl"), True)
        assert named in str(error.value)


def test_both_axes_in_words():
    def change(value):
        return {"all": {"original": {"value": 0.5}, "obeyed": {"value": 0.5 + value},
                        "difference": {"value": value, "se": 0.1}}}  # fmt: skip

    words = axes_in_words({
        "obedience": {"rose": change(0.3), "fell": change(-0.3), "stayed": change(0.1)},
        "side_effects": {"plain_answers": {"unchanged": {"value": 0.7}},
                         "references": {"relative_change": {"value": 0.015}}},
    })  # fmt: skip
    assert "rose 50% → 80%, fell 50% → 20%, stayed 50% → 60%" in words[0]
    assert "70%" in words[1] and "less likely" in words[2] and "1.5%" in words[2]
    assert axes_in_words({}) == []
