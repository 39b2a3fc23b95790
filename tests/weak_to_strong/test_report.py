"""The reports of weak-to-strong runs: what they say first, and that their numbers are the evaluation's."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from trl_extensions.core.runs.jsonl import write_jsonl
from trl_extensions.weak_to_strong.data.select import keep_rows
from trl_extensions.weak_to_strong.evaluation import Predictions, evaluate_run, evaluate_toxicity
from trl_extensions.weak_to_strong.forecast import forecast
from trl_extensions.weak_to_strong.labels.learners import LabelReport
from trl_extensions.weak_to_strong.report import (
    draw_pgr,
    draw_scores,
    draw_toxicity,
    generation_verdict,
    in_numbers,
    verdict,
    write_generation_report,
    write_label_report,
)


def run_of(wrong, n=100, seeds=2):
    """Two classes, and models that are wrong on some rows, given as their numbers."""
    labels = np.arange(n) % 2
    own = {}
    for name, rows in wrong.items():
        said = np.where(np.isin(np.arange(n), rows), 1 - labels, labels)
        own[name] = Predictions(tuple(map(str, range(n))), labels, np.eye(2)[said] * 0.8 + 0.1)
    subgroups = {str(i): "関西" if i % 4 else "東京" for i in range(n)}
    return evaluate_run(dict.fromkeys(range(seeds), own), subgroups=subgroups, costs={"ceiling": {"steps": [4, 8]}})


# Accuracies .6, .8, .7 and .9: PGR 2/3 and 1/3, both clear of the weak model
CLEAR = {"weak": range(40), "soft_ce": range(20), "product": range(30), "ceiling": range(10)}


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def label_report(**changes):
    learner = {
        "accuracy": [0.6], "ece": [0.05], "ece_before": [0.25], "temperature": [1.5], "note": [""],
        "target_accuracy": 0.75, "extra_accuracy": {"test": 0.625}, "resumed": False,
    }  # fmt: skip
    own = LabelReport(
        path="weak_labels.jsonl", rows=800, labelled=640, slice_rows=160, ensemble="soft",
        learners={"linear": learner, "layers": learner | {"target_accuracy": None, "ece_before": [None]}},
        target_accuracy=0.7125, extra_accuracy={"test": 0.6}, disagreement=0.123, confidence=0.456,
        class_shares=[0.25, 0.75], labelled_shares=[0.5, 0.5], warnings=["class 0 is rarer than it should be"],
    )  # fmt: skip
    return {"seed": 7, "summary": "..."} | asdict(own) | changes


class TestVerdict:
    @pytest.mark.parametrize(
        ("wrong", "seeds", "kind"),
        [
            (CLEAR, 2, "beats_teacher"),
            (CLEAR, 1, "one_seed"),
            ({"weak": range(40), "ceiling": range(10)}, 2, "no_strong_model"),
            # .5 is what always saying one class gives: of 56 of 100 right the interval starts at .46, of 65 at .55
            ({"weak": range(10), "soft_ce": range(50), "ceiling": range(50)}, 2, "ceiling_untrained"),
            ({"weak": range(10), "soft_ce": range(50), "ceiling": range(44)}, 1, "ceiling_untrained"),
            ({"weak": range(10), "soft_ce": range(50), "ceiling": range(35)}, 1, "one_seed"),
            ({"weak": range(20), "soft_ce": range(10), "ceiling": range(40)}, 2, "no_gap"),
            ({"weak": range(20), "soft_ce": range(10), "ceiling": range(20)}, 2, "no_gap"),
            ({"weak": range(40), "soft_ce": range(30), "ceiling": [*range(3, 40), 50, 51]}, 2, "no_gap"),
            ({"weak": range(20), "soft_ce": range(40), "product": range(50), "ceiling": range(5)}, 2, "unclear"),
            ({"weak": range(40), "soft_ce": range(1, 40), "ceiling": range(10)}, 2, "unclear"),
            ({"weak": range(40), "soft_ce": range(20)}, 2, "beats_teacher"),  # nobody trained a ceiling
        ],
    )
    def test_what_came_of_it(self, wrong, seeds, kind):
        assert verdict(run_of(wrong, seeds=seeds))[0] == kind

    @pytest.mark.parametrize(
        ("change", "before", "losses", "kind"),
        [
            ((-0.3, -0.4, -0.2), 0.5, [3, 2, 1], "less"),
            ((0.3, 0.2, 0.4), 0.5, [3, 2, 1], "more"),
            ((0.0, 0.0, 0.0), 0.0, [3, 2, 1], "nothing_unwanted"),
            ((0.0, -0.1, 0.1), 0.5, [1, 2, 3], "loss"),
            ((0.0, -0.1, 0.1), 0.5, [3, 2, 1], "unclear"),
            (None, 0.5, [], "not_trained"),
        ],
    )
    def test_what_came_of_generation(self, change, before, losses, kind):
        own = {"prompts": 9, "models": {"original": {"probability": {"value": before}}}}
        own["differences"] = {"probability": {"original": {}}}
        if change:
            own["models"]["w2s"] = {}
            own["differences"]["probability"]["original"]["w2s"] = dict(
                zip(("value", "low", "high"), change, strict=True)
            )
        assert generation_verdict({"kinds": {"sampled": own}}, [{"loss": loss} for loss in losses])[0] == kind

    def test_several_losses_and_that_the_best_was_picked_here(self):
        text = in_numbers(run_of(CLEAR))
        assert "`soft_ce` has 80.0 % (" in text and "the weak model's 60.0 % (" in text and "ceiling: 90.0 % (" in text
        assert "Performance gap recovered: 0.67 (" in text and "picked out of 2" in text and "0.33 to 0.33" in text

    def test_one_loss_was_not_picked(self):
        text = in_numbers(run_of({name: CLEAR[name] for name in ("weak", "product", "ceiling")}))
        assert text.startswith("`product` has 70.0 % (") and "picked" not in text

    def test_no_gap(self):
        text = in_numbers(run_of({"weak": range(20), "soft_ce": range(10), "ceiling": range(30)}))
        assert "undefined: the ceiling (0.700) is not above the weak model (0.800)." in text
        text = in_numbers(run_of({"weak": range(40), "soft_ce": range(30), "ceiling": [*range(3, 40), 50, 51]}))
        assert "undefined: the gap to the ceiling, +0.010 ± 0.0" in text and "not clear of 0" in text


class TestLabelReport:
    def test_numbers_files_and_sections(self, tmp_path):
        evaluation = run_of(CLEAR, seeds=2)
        settings = {
            "model_name_or_path": "/models/strong-1b",
            "learning_rate": 1e-4,
            "logging_dir": "x",
            "lora_r": None,
        }
        path = write_label_report(tmp_path / "run", evaluation, settings, [label_report()])
        assert path == tmp_path / "run" / "report.md"
        text = path.read_text(encoding="utf-8")
        assert text.startswith(
            f"# Weak-to-strong: strong-1b\n\n**{verdict(evaluation)[1]}** {in_numbers(evaluation)}\n"
        )
        assert {"scores.png", "pgr.png"} <= {own.name for own in path.parent.iterdir()}
        own = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
        assert own["scores"] == evaluation["scores"] and own["settings"] == settings
        assert "100 test rows, 2 seeds." in text and "want of seeds" in text
        scores = section(text, "Scores on the test rows")
        assert "| soft_ce | 0.800 (" in scores and "| ceiling | 0.900 (" in scores and "macro F1" in scores
        recovered = section(text, "What was recovered")
        assert "| soft_ce | +0.200 (" in recovered and " | 0.67 (" in recovered
        assert "| 0.67, 0.67 |" in recovered and "The ceiling is +0.300 (" in recovered
        # soft_ce is wrong on rows 0-19 only, of 0-39 where the weak model is: it keeps all and corrects half
        errors = section(text, "What became of the weak model's errors")
        assert "| soft_ce | 1.00 (" in errors and "| 0.50 (" in errors and "120 test rows" in errors
        weak = section(text, "The weak labels")
        assert "| 7 | 800 | 71.2% | 60.0% | 0.123 | 0.456 | 25% / 75% | 50% / 50% |" in weak
        assert "| 7 | linear | 75.0% | 62.5% | 1.50 | 0.25, 0.05 |" in weak
        assert "| 7 | layers | n/a | 62.5% | 1.50 | n/a, 0.05 |" in weak
        assert "**Seed 7:** class 0 is rarer than it should be" in weak
        assert "| ceiling | 6 |" in section(text, "What it took")
        listed = section(text, "Settings")
        assert "| `learning_rate` | 0.0001 |" in listed and "logging_dir" not in listed and "lora_r" not in listed

    def test_pairs_have_no_scores_by_class(self, tmp_path):
        text = write_label_report(tmp_path, run_of(CLEAR), {"task": "reward"}).read_text(encoding="utf-8")
        assert "balanced" not in text and "F1" not in text and "PGR, accuracy" in text
        assert "The weak labels" not in text

    def test_without_a_ceiling(self, tmp_path):
        evaluation = run_of({"weak": range(40), "soft_ce": range(20)}, seeds=1)
        text = write_label_report(tmp_path, evaluation, {}).read_text(encoding="utf-8")
        assert "undefined: there is no ceiling model" in text and "One seed has no intervals" in text

    def test_subgroups_and_classes(self, tmp_path):
        text = write_label_report(tmp_path, run_of(CLEAR), {}).read_text(encoding="utf-8")
        # Rows 0, 4, 8, ...: weak is wrong on 10 of 25, soft_ce on 5, ceiling on 3; of the others on 30, 15 and 7 of 75
        assert "| 東京 | 25 | 0.600 (" in section(text, "By subgroup") and "| 関西 | 75 | 0.600 (" in text
        assert "ceiling: 東京, 0.880 (" in text and "(Bonferroni)" in text
        assert "| 0 | 50 | 0.600 (" in section(text, "By class: recall")
        assert "| 0 | 40.0 | 10.0 |" in section(text, "Confusion: soft_ce")

    def test_a_forecast_alone(self, tmp_path):
        random = np.random.default_rng(0)
        labels = random.integers(2, size=(2, 400))
        said = [[own ^ (random.random(400) < wrong) for own in labels] for wrong in (0.3, 0.1, 0.2, 0.2)]
        own = forecast(said[0], said[1], {"審査": said[2], "b": said[3]})
        text = write_label_report(tmp_path, {"forecast": {"soft_ce": own}}, {}).read_text(encoding="utf-8")
        assert "no true labels" in text and "the teacher's" in text
        assert "審査: " in section(text, "Forecast without true labels") and not (tmp_path / "pgr.png").exists()


HARM = {"original": [0.9, 0.6, 0.1], "weak": [0.9, 0.8, 0.6], "w2s": [0.2, 0.7, 0.1]}


SCORERS = [
    {"name": "profanity", "higher_is_better": False, "range": (0, 1)},
    {"name": "kindness", "higher_is_better": True, "range": (1, 11)},
]


def answers(side, scorer):
    """A greedy answer to each of three prompts, harmful as `HARM` says."""
    return [
        {
            "id": f"{side}-{i}", "index": i, "sample": 0, "prompt": f"prompt {i}",
            "completion": [{"role": "assistant", "content": f"{side} says {i}"}],
            "scores": {scorer["name"]: 11 - 10 * harm if scorer["higher_is_better"] else harm},
        }
        for i, harm in enumerate(HARM[side])
    ]  # fmt: skip


@pytest.fixture(params=SCORERS, ids=["lower is better", "higher is better"])
def scorer(tmp_path, request):
    """A scorer, and what a run with it left in a folder."""
    scorer = request.param
    for side in HARM:
        write_jsonl(tmp_path / "held_out" / f"{side}_scored.jsonl", answers(side, scorer))
    made = [row | {"model": "weak-a" if row["index"] else "weak-b"} for row in answers("weak", scorer)]
    direction = scorer["higher_is_better"]
    _, keeping = keep_rows(made, scorer=scorer["name"], higher_is_better=direction, threshold=4 if direction else 0.7)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "keeping.json").write_text(json.dumps(asdict(keeping)))
    return scorer


class TestGenerationReport:
    def evaluation(self, scorer=SCORERS[0], **more):
        toxicity = {s: {"greedy": [[v] for v in values]} for s, values in (HARM | more).items()}
        return evaluate_toxicity(toxicity, resamples=200) | {"model": "/models/strong-1b", "scorer": scorer}

    def test_numbers_and_texts(self, scorer, tmp_path):
        evaluation = self.evaluation(scorer)
        text = write_generation_report(tmp_path, evaluation).read_text(encoding="utf-8")
        assert f"Scored by {scorer['name']}" in text
        assert ("rescaled so that 11, the best score, is 0" in text) == scorer["higher_is_better"]
        assert text.startswith("# Weak-to-strong by generation: strong-1b\n\n**")
        assert (tmp_path / "toxicity.png").exists()
        table = section(text, "Greedy: 3 prompts, 1 a prompt")
        # Means .533 and .333; 2 and 1 prompts of 3 are toxic
        assert "| original | 0.533 (" in table and "| w2s | 0.333 (" in table
        assert "| w2s - original | -0.200 (" in table and "| -0.333 (" in table
        learned = section(text, "What the strong model learned from")
        assert "1 of 3 answers were kept, to 1 of 3 prompts" in learned and "| beyond threshold | 2 |" in learned
        assert "| weak-b | 1 | 0 |" in learned
        before = section(text, "The most toxic answers before training")
        assert [line.split(" | ")[0] for line in before.splitlines()[3:6]] == [
            "| prompt 0",
            "| prompt 1",
            "| prompt 2",
        ]
        assert "| prompt 0 | original says 0 | w2s says 0 | 0.90 → 0.20 |" in before
        after = section(text, "Toxic after training")
        assert "0.60 → 0.70" in after and "prompt 0" not in after

    def test_first_come_the_numbers_behind_the_verdict(self, scorer, tmp_path):
        first = write_generation_report(tmp_path, self.evaluation(scorer)).read_text(encoding="utf-8").split("\n\n")[1]
        assert "toxicity probability went from 0.67 (" in first and "to 0.33 (" in first
        assert "not clear of that of the model before training: -0.333 (" in first
        assert "that of its teacher: -0.667 (" in first and "gap recovered" not in first
        # Toxic: weak 3 of 3, w2s 1, ceiling 0
        text = write_generation_report(tmp_path, self.evaluation(scorer, ceiling=[0.1, 0.2, 0.1])).read_text("utf-8")
        assert "Performance gap recovered: 0.67 (" in text.split("\n\n")[1]

    def test_before_anything_is_trained(self, scorer, tmp_path):
        evaluation = evaluate_toxicity({"original": {"sampled": [[0.1, 0.2]] * 4}}, resamples=20)
        evaluation |= {"model": "strong", "scorer": scorer}
        (tmp_path / "held_out" / "w2s_scored.jsonl").unlink()
        text = write_generation_report(tmp_path, evaluation).read_text(encoding="utf-8")
        assert json.loads((tmp_path / "report.json").read_text())["verdict"]["kind"] == "not_trained"
        assert "2 samples to each of 4 held-out prompts were scored." in text


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


class TestFigures:
    def test_scores_are_in_percent_with_seeds_and_lines(self, tmp_path):
        evaluation = run_of(CLEAR, seeds=2)
        (axes,) = draw_scores(evaluation, tmp_path / "scores.png").axes
        assert (tmp_path / "scores.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert heights(axes) == pytest.approx([60, 80, 70, 90])
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["weak", "soft_ce", "product", "ceiling"]
        dots = [c.get_offsets()[:, 1].tolist() for c in axes.collections if not hasattr(c, "get_segments")]
        assert dots == [pytest.approx([height] * 2) for height in (60, 80, 70, 90)]
        lines = {
            line.get_linestyle(): line.get_ydata()[0] for line in axes.lines if line.get_linestyle() in (":", "--")
        }
        assert lines == {":": pytest.approx(60), "--": pytest.approx(90)}
        assert "%" in axes.get_ylabel()

    def test_gap_recovered(self, tmp_path):
        evaluation = run_of({"weak": range(40), "soft_ce": range(30), "ceiling": range(10)})
        evaluation["strong"].append("none")
        evaluation["pgr"]["accuracy"]["none"] = {"value": None, "low": None, "high": None}
        (axes,) = draw_pgr(evaluation, tmp_path / "pgr.png").axes
        assert heights(axes) == [evaluation["pgr"]["accuracy"]["soft_ce"]["value"], 0]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["soft_ce", "none"]
        assert "n/a" in [text.get_text() for text in axes.texts]
        assert -1 <= axes.get_ylim()[0] < axes.get_ylim()[1] <= 2

    def test_toxicity_has_both_panels(self, tmp_path):
        kinds = {
            "original": {"sampled": [[0.4, 0.6]] * 4, "greedy": [[0.4]] * 4},
            "w2s": {"sampled": [[0.5, 0.2]] * 4},
        }
        figure = draw_toxicity(evaluate_toxicity(kinds, resamples=20), tmp_path / "toxicity.png")
        greedy, sampled = [0.4, 0], [0.6, 0.5]
        assert heights(figure.axes[0]) == pytest.approx(greedy + sampled)
        assert heights(figure.axes[1]) == pytest.approx([0, 0, 1, 1])
        assert {t.get_text() for t in figure.legends[0].get_texts()} == {"greedy, 1 a prompt", "sampled, 2 a prompt"}
