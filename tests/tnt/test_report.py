"""The report of a run: written from its folder alone, every number where it belongs."""

import json

import numpy as np
import pytest

from trl_extensions.core.runs.jsonl import JsonlWriter
from trl_extensions.tnt.report import draw_two_axes, in_numbers, verdict, write_report


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


@pytest.fixture
def evaluation():
    described = {"length": 12.0, "truncated": 0.5, "seq_rep_4": 0.0, "distinct_2": 1.0}
    return {
        "original": {
            "greedy": {"n": 50, "share": estimate(0.24, 0.14, 0.37), "spans_per_1000_tokens": estimate(9.0)},
            "sampled": {"n": 200, "share": estimate(0.3, 0.19, 0.44), "spans_per_1000_tokens": estimate(8.0)},
        },
        "patched": {
            "greedy": {"n": 50, "share": estimate(0.02, 0.0, 0.1), "spans_per_1000_tokens": estimate(0.5)},
            "sampled": {"n": 199, "share": estimate(0.0, 0.0, 0.07), "spans_per_1000_tokens": estimate(0.0)},
        },
        "preservation": {
            "clean": {
                "n": 38, "exact_match": estimate(0.5, 0.35, 0.65), "bleu": 80.0, "rouge_l": 0.9,
                "first_difference": 0.7,
            },
            "original": described, "patched": described,
        },
        "divergence": {
            "kl_target": estimate(0.5, 0.4, 0.6), "kl_clean": estimate(0.0123, 0.01, 0.02), "prob_negative": 0.01,
            "prob_negative_original": 0.9,
        },
        "perplexity": {"original": 2.0, "patched": 3.0},
    }  # fmt: skip


class TestTwoAxes:
    def test_both_panels_in_percent(self, tmp_path, evaluation):
        left, right = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        assert (tmp_path / "two_axes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert [bar.get_height() for bar in left.patches] == pytest.approx([24, 30, 2, 0])
        assert {label for axes in (left, right) for label in axes.get_legend_handles_labels()[1]} >= {
            "original", "patched",
        }  # fmt: skip
        assert [bar.get_height() for bar in right.patches] == pytest.approx([50, 80, 90, 70])
        assert "38" in right.get_xlabel()

    def test_intervals_end_where_they_should(self, tmp_path, evaluation):
        axes = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        bars = [bar for one in axes for bars in one.collections for bar in bars.get_segments()]
        ends = [sorted(y for _, y in bar) for bar in bars if len(bar) and np.isfinite(bar).all()]
        np.testing.assert_allclose(ends, [[14, 37], [19, 44], [0, 10], [0, 7], [35, 65]], atol=1e-9)

    def test_one_kind_of_sampling(self, tmp_path, evaluation):
        del evaluation["original"]["sampled"], evaluation["patched"]["sampled"]
        left, _ = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        assert [bar.get_height() for bar in left.patches] == pytest.approx([24, 2])

    def test_nothing_clean_is_written_not_drawn_as_zero(self, tmp_path, evaluation):
        evaluation["preservation"]["clean"] = {
            "n": 0, "exact_match": estimate(None), "bleu": None, "rouge_l": None, "first_difference": None
        }  # fmt: skip
        _, right = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        assert [text.get_text() for text in right.texts] == ["n/a"] * 4


@pytest.mark.parametrize(
    ("before", "after", "prob", "kept", "losses", "kind"),
    [
        ((0.24, 0.14, 0.37), (0.02, 0.00, 0.10), 0.1, 0.9, [3, 2, 1], "removed"),
        ((0.24, 0.14, 0.37), (0.02, 0.00, 0.10), 0.1, 0.3, [3, 2, 1], "at_a_price"),
        ((0.24, 0.14, 0.37), (0.02, 0.00, 0.10), 0.1, None, [1, 2, 3], "removed"),  # what counts is what came of it
        ((0.0, 0.0, 0.07), (0.0, 0.0, 0.07), None, 0.9, [3, 2, 1], "nothing_unwanted"),
        ((0.02, 0.00, 0.10), (0.24, 0.14, 0.37), 0.9, 0.9, [3, 2, 1], "more"),
        ((0.24, 0.14, 0.37), (0.24, 0.14, 0.37), 0.9, 0.9, [1, 1, 2], "loss"),
        ((0.24, 0.14, 0.37), (0.24, 0.14, 0.37), 0.9, 0.9, [3, 2, 1], "hardly_moved"),  # 0.9 > 0.8 of 1
        ((0.24, 0.14, 0.37), (0.16, 0.08, 0.28), 0.4, 0.9, [3, 2, 1], "too_few"),
        ((0.24, 0.14, 0.37), (0.16, 0.08, 0.28), 0.4, 0.9, [3], "too_few"),
    ],
)
def test_what_came_of_it(evaluation, before, after, prob, kept, losses, kind):
    for side, share in (("original", before), ("patched", after)):
        evaluation[side] = {"greedy": {"n": 50, "share": dict(zip(("value", "low", "high"), share, strict=True))}}
    evaluation["preservation"]["clean"]["exact_match"] = {"value": kept}
    was = None if prob is None else 1.0
    evaluation["divergence"] = {"prob_negative_original": was, "prob_negative": prob}
    assert verdict(evaluation, [{"loss": loss} for loss in losses])[0] == kind


def test_random_samples_tell_where_greedy_answers_have_nothing(evaluation):
    for side in ("original", "patched"):
        evaluation[side]["greedy"]["share"] = estimate(0.0, 0.0, 0.07)
    evaluation["original"]["sampled"]["share"] = estimate(0.3, 0.2, 0.4)
    evaluation["patched"]["sampled"]["share"] = estimate(0.0, 0.0, 0.07)
    assert verdict(evaluation)[0] == "removed"


def test_the_numbers_have_both_axes(evaluation):
    text = in_numbers(evaluation)
    for part in ("50", "24.0% (14 to 37)", "2.0% (0 to 10)", "92%", "30.0%", "38", "50.0% (35 to 65)", "0.0123"):
        assert part in text


def test_a_report_needs_nothing_but_the_folder(tmp_path, evaluation):
    files = {
        "evaluation.json": evaluation,
        "settings.json": {"model_name_or_path": "some/model"},
        "training_settings.json": {"variant": "rr", "alpha": 2.5, "learning_rate": 1e-4, "dataset_name": None},
        "original/annotation.json": {"rows": 7, "with_span": 3, "spans": 4},
        "train/trainer_state.json": {
            "global_step": 12,
            "log_history": [
                {"step": 1, "loss": 0.5, "kl/kept": 0.25},
                {"step": 12, "loss": 0.125},
                {"train_runtime": 9},
            ],
        },
    }
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    row = {"id": "a", "sample": 0, "prompt": [{"role": "user", "content": "Why | how?"}], "completion": "damn it"}
    for side, spans in (("original", [[0, 4]]), ("patched", [])):
        (tmp_path / side).mkdir(exist_ok=True)
        with JsonlWriter(tmp_path / side / "eval_annotated.jsonl") as writer:
            writer.append(row | {"negative_spans": spans})
    text = write_report(tmp_path).read_text()
    for part in ("model", "`variant: rr`", "2.5", "12 steps", "9 seconds", "3 of 7", "**damn** it", "0.2500", "0.900"):
        assert part in text
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["model"], data["variant"], data["alpha"]) == ("some/model", "rr", 2.5)
    assert data["divergence"] == evaluation["divergence"]
