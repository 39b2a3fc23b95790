"""The report of a weak-to-strong run: did the strong model beat its teachers, and how much of the gap came back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.generation.sampling import completion_text
from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import RunReport
from .evaluation import CEILING, GAP_SCORES, ORIGINAL, WEAK
from .figures import MEASURE_TITLES, draw_pgr, draw_scores, draw_toxicity
from .report_text import listed, number, percent, pgr_cell, recovered, share, shares


if TYPE_CHECKING:
    from .generation.run import GenerationRun


SIDE_BY_SIDE = 5
TITLES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "macro F1", "f1_positive": "F1, class 1",
    "nll": "nll, nats", "ece": "ECE",
}  # fmt: skip
# Which of a pair is the better one is written in an arbitrary order, so scores by class say nothing.
PAIR_SCORES = ("accuracy", "nll", "ece")
# What a reader asks first; the trainer's other settings are in report.json.
SHOWN = (
    "form", "model_name_or_path", "weak_models", "middle_models", "ensemble", "calibrate", "examples",
    "examples_where", "num_examples", "test_examples", "test_where", "num_test_examples", "group_column",
    "weak_share", "keep_share", "linear_probe", "use_peft", "lora_r", "load_in_4bit", "learning_rate",
    "weak_learning_rate", "num_train_epochs", "weak_num_train_epochs", "max_steps", "lr_scheduler_type", "max_length",
    "confidence_coef", "product_alpha", "product_beta", "loss_warmup_ratio",
)  # fmt: skip


def write_label_report(
    folder: str | Path,
    evaluation: dict[str, Any],
    settings: Mapping[str, Any],
    weak_reports: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `report.md`, `report.json`, `scores.png` and `pgr.png` of a classification or reward run.

    Args:
        folder: Where to.
        evaluation: Result of `evaluation.evaluate_run`.
        settings: The run's settings, by name; those of `SHOWN` are listed, all are in `report.json`.
        weak_reports: What the weak labels looked like, for each seed: fields of `labelling.LabelReport` and `seed`.

    Returns:
        The path of `report.md`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(str(settings.get("model_name_or_path", "strong model"))).name
    report = RunReport(f"Weak-to-strong: {model}")
    report.data = {"settings": dict(settings), "weak_labels": [dict(own) for own in weak_reports]} | evaluation
    report.text(verdict(evaluation))
    report.text(_reading(evaluation))
    draw_scores({model: evaluation}, folder / "scores.png")
    report.figure("scores.png", "Accuracy on the test rows; dots are seeds, lines the weak model and the ceiling.")
    if evaluation["strong"]:
        draw_pgr({model: evaluation}, folder / "pgr.png")
        report.figure("pgr.png", "Share of the gap between the weak model (0) and the ceiling (1) that was recovered.")
    _scores_table(report, evaluation, is_pairs=settings.get("form") == "reward")
    _recovered_table(report, evaluation, is_pairs=settings.get("form") == "reward")
    _agreement_table(report, evaluation)
    _weak_tables(report, weak_reports)
    _cost_table(report, evaluation["costs"])
    report.heading("Settings")
    report.table(
        ["setting", "value"], [[f"`{name}`", _setting(settings[name])] for name in SHOWN if _is_set(settings, name)]
    )
    return report.write(folder)


def verdict(evaluation: dict[str, Any]) -> str:
    """Whether the strong models beat their teacher and what was recovered, in a few sentences."""
    strong, scores = evaluation["strong"], evaluation["scores"]
    differences, gaps = evaluation["differences"]["accuracy"], evaluation["pgr"]["accuracy"]
    weak = f"the weak model's {percent(scores[WEAK]['accuracy'])}"
    if not strong:
        return f"No strong model was trained on weak labels. Accuracy: {weak}."
    best = max(strong, key=lambda name: scores[name]["accuracy"]["value"])
    reached = percent(scores[best]["accuracy"])
    ceiling = f" (ceiling: {percent(scores[CEILING]['accuracy'])})" if CEILING in scores else ""
    clear = [name for name in strong if differences[name]["low"] > 0]
    if len(strong) == 1:
        beats = f"beats its teacher: {reached} accuracy against {weak}{ceiling}"
        misses = f"is not clear of its teacher: {reached} accuracy against {weak}{ceiling}"
        sentences = [f"Trained on weak labels (`{best}`), the strong model {beats if clear else misses}."]
    else:
        sentences = [
            f"{len(clear)} of {len(strong)} strong models trained on weak labels clearly beat their teacher (the "
            "interval of the difference lies above 0). "
            f"The most accurate, `{best}`, has {reached} accuracy against {weak}{ceiling}."
        ]
    sentences.append(recovered(gaps[best]))
    if len(strong) > 1:
        others = [gaps[name]["value"] for name in strong if name != best and gaps[name]["value"] is not None]
        span = f" PGR of the others: {min(others):.2f} to {max(others):.2f}." if others else ""
        sentences.append(
            f"`{best}` was picked out of {len(strong)} by these very test rows, which flatters it: to choose a loss, "
            f"compare them on other rows.{span}"
        )
    return " ".join(sentences)


def _reading(evaluation: dict[str, Any]) -> str:
    """How to take the intervals."""
    rows, seeds = evaluation["rows"], len(evaluation["seeds"])
    counted = f"{rows[0]}" if len(set(rows)) == 1 else f"{min(rows)} to {max(rows)}"
    groups = evaluation["groups"]
    grouped = (
        f" in {groups[0] if len(set(groups)) == 1 else f'{min(groups)} to {max(groups)}'} groups" if groups else ""
    )
    drawn = "whole groups of test rows" if groups else "test rows"
    text = (
        f"{counted} test rows{grouped}, {seeds} seed{'s' * (seeds > 1)}. Intervals are "
        f"{100 * evaluation['confidence']:g} %, by a bootstrap over {drawn} and over seeds; models are compared "
        "on the same draws."
    )
    if seeds == 1:
        return f"{text} With one seed they do not cover what another seed would change."
    return f"{text} So few seeds understate what another one could change." if seeds < 5 else text


def _scores_table(report: RunReport, evaluation: dict[str, Any], is_pairs: bool) -> None:
    report.heading("Scores on the test rows")
    names = [name for name in TITLES if name in evaluation["scores"][WEAK] and (not is_pairs or name in PAIR_SCORES)]
    report.table(
        ["model", *(TITLES[name] for name in names)],
        [
            [model, *(number(own[name], 3) for name in names)]
            for model, own in ((model, evaluation["scores"][model]) for model in evaluation["models"])
        ],
    )
    report.text("Means over seeds. No interval is given for ECE, which resampling rows inflates.")


def _recovered_table(report: RunReport, evaluation: dict[str, Any], is_pairs: bool) -> None:
    if not evaluation["strong"]:
        return
    report.heading("What was recovered")
    names = GAP_SCORES[:1] if is_pairs else GAP_SCORES
    report.table(
        ["model", "accuracy over the weak model", "above it in", *(f"PGR, {TITLES[n]}" for n in names), "by seed"],
        [
            [
                name,
                number(difference, 3, sign="+"),
                f"{difference['above_zero']:.1%} of resamples",
                *(pgr_cell(evaluation["pgr"][score][name]) for score in names),
                ", ".join("-" if value is None else f"{value:.2f}" for value in gap["per_seed"]),
            ]
            for name in evaluation["strong"]
            for difference, gap in [(evaluation["differences"]["accuracy"][name], evaluation["pgr"]["accuracy"][name])]
        ],
    )  # fmt: skip
    gap = evaluation["gap"]["accuracy"]
    if gap is not None:
        report.text(
            f"The ceiling is {number(gap, 3, sign='+')} above the weak model in accuracy, and above it in "
            f"{gap['above_zero']:.1%} of resamples. PGR is (strong - weak) / (ceiling - weak), of means over seeds; a "
            "dash is a seed without a gap, a question mark an interval that more than 5 % of resamples without a gap "
            "make unreliable."
        )


def _agreement_table(report: RunReport, evaluation: dict[str, Any]) -> None:
    if not evaluation["agreement"]:
        return
    report.heading("What became of the weak model's errors")
    rows = [
        [name, number(own["right"]), number(own["wrong"]), number(own["wrong"]["corrected"])]
        for name, own in evaluation["agreement"].items()
    ]
    report.table(["model", "agrees where weak is right", "agrees where weak is wrong", "corrects what is wrong"], rows)
    own = next(iter(evaluation["agreement"].values()))
    report.text(
        f"Shares of the {own['right']['n']} test rows on which the weak model is right and the {own['wrong']['n']} on "
        "which it is wrong (summed over seeds), with Wilson's intervals. A model that only imitates agrees as often "
        "on both; the ceiling, which saw no weak label, shows what agreement comes without imitation."
    )


def _weak_tables(report: RunReport, weak_reports: Sequence[Mapping[str, Any]]) -> None:
    if not weak_reports:
        return
    report.heading("The weak labels")
    report.table(
        [
            "seed",
            "rows labelled",
            "right",
            "right, test rows",
            "disagreement",
            "confidence",
            "classes",
            "true classes",
        ],
        [
            [
                own.get("seed", i),
                own["rows"],
                share(own["target_accuracy"]),
                share(own["extra_accuracy"].get("test")),
                own["disagreement"],
                own["confidence"],
                shares(own["class_shares"]),
                shares(own["labelled_shares"]),
            ]
            for i, own in enumerate(weak_reports)
        ],
    )
    report.table(
        ["seed", "weak model", "right", "right, test rows", "temperature", "ECE before and after"],
        [
            [own.get("seed", i), name, share(learner["target_accuracy"]),
             share(learner["extra_accuracy"].get("test")), listed(learner["temperature"]),
             f"{listed(learner['ece_before'])}, {listed(learner['ece'])}"]
            for i, own in enumerate(weak_reports)
            for name, learner in own["learners"].items()
        ],
    )  # fmt: skip
    for i, own in enumerate(weak_reports):
        for warning in own["warnings"]:
            report.text(f"**Seed {own.get('seed', i)}:** {warning}")


def _cost_table(report: RunReport, costs: Mapping[str, Mapping[str, Any]] | None) -> None:
    names = list(dict.fromkeys(name for own in (costs or {}).values() for name in own))
    if not names:
        return
    report.heading("What it took")
    rows = [
        [model, *(f"{np.mean(own[name]):,.0f}" if name in own else "" for name in names)]
        for model, own in costs.items()
        if own
    ]
    report.table(["model", *(name.replace("_", " ") for name in names)], rows)
    report.text("Means over seeds.")


def write_generation_report(run: "GenerationRun", evaluation: dict[str, Any]) -> Path:
    """Write `report.md`, `report.json` and `toxicity.png` of a run by generation, from what its stages left.

    Args:
        run: The run; its folder, its scorer's name and direction, and the strong model's name are looked at.
        evaluation: Result of `toxicity.evaluate_toxicity`, models called "original", "weak", "w2s" and "ceiling".

    Returns:
        The path of `report.md`.
    """
    model = Path(str(run.model_args.model_name_or_path)).name
    report = RunReport(f"Weak-to-strong by generation: {model}")
    keeping = _read_json(run.folder / "answers" / "keeping.json")
    report.data = {"model": run.model_args.model_name_or_path, "scorer": run.scorer.name, "kept": keeping} | evaluation
    report.text(generation_verdict(evaluation))
    low, high = run.scorer.range
    best = high if run.scorer.higher_is_better else low
    scale = "" if (low, high, best) == (0, 1, 0) else f", rescaled so that {best:g}, the best score, is 0"
    report.text(
        f"Scored by `{run.scorer.name}`{scale}. A prompt counts as toxic if one of its samples scores "
        f"{evaluation['threshold']:g} or more. Both numbers grow with the samples a prompt. Intervals are "
        f"{100 * evaluation['confidence']:g} %, over prompts; differences are paired by prompt."
    )
    draw_toxicity(evaluation, run.folder / "toxicity.png")
    report.figure("toxicity.png", "Expected maximum toxicity and toxicity probability on held-out prompts.")
    for kind, own in evaluation["kinds"].items():
        _toxicity_table(report, kind, own)
    _keeping_table(report, keeping)
    _side_by_side(report, run, evaluation["threshold"])
    return report.write(run.folder)


def generation_verdict(evaluation: dict[str, Any]) -> str:
    """Toxicity before and after, and against the teacher, in a few sentences."""
    kind = "sampled" if "sampled" in evaluation["kinds"] else next(iter(evaluation["kinds"]))
    own = evaluation["kinds"][kind]
    trained = [name for name in own["models"] if name not in (ORIGINAL, CEILING) and not name.startswith(WEAK)]
    what = f"{own['samples']} samples" if kind == "sampled" else "the greedy answer"
    if not trained:
        return f"Nothing was trained yet; {what} to each of {own['prompts']} held-out prompts were scored."
    name = trained[-1]
    sentences = []
    for measure, title in MEASURE_TITLES.items():
        before = own["models"].get(ORIGINAL)
        came = f" from {number(before[measure])}" if before else ""
        sentences.append(f"{title} went{came} to {number(own['models'][name][measure])}")
    text = f"Over {what} to each of {own['prompts']} held-out prompts, {' and '.join(sentences)}."
    for baseline, called in ((ORIGINAL, "the model before training"), (WEAK, "its teacher")):
        difference = own["differences"]["probability"].get(baseline, {}).get(name)
        if difference:
            side = "below" if difference["high"] < 0 else "above" if difference["low"] > 0 else "not clear of"
            text += f" The probability is {side} that of {called}: {number(difference, 3, sign='+')}."
    gap = own["pgr"]["probability"].get(name)
    return f"{text} {recovered(gap)}" if gap else text


def _toxicity_table(report: RunReport, kind: str, own: dict[str, Any]) -> None:
    left_out = f", {own['incomplete']} left out for a missing score" if own["incomplete"] else ""
    report.heading(f"{kind.capitalize()}: {own['prompts']} prompts, {own['samples']} a prompt{left_out}")
    report.table(
        ["model", *MEASURE_TITLES.values()],
        [
            [name, *(number(values[measure], 3) for measure in MEASURE_TITLES)]
            for name, values in own["models"].items()
        ],
    )
    rows = [
        [f"{name} - {baseline}", *(number(own["differences"][measure][baseline][name], 3, sign="+")
                                   for measure in MEASURE_TITLES)]
        for baseline, others in own["differences"]["probability"].items()
        for name in others
    ]  # fmt: skip
    if rows:
        report.table(["difference", *MEASURE_TITLES.values()], rows)
    if own["pgr"]["probability"]:
        report.table(
            ["gap recovered", *MEASURE_TITLES.values()],
            [
                [name, *(pgr_cell(own["pgr"][measure][name]) for measure in MEASURE_TITLES)]
                for name in own["pgr"]["probability"]
            ],
        )


def _keeping_table(report: RunReport, keeping: dict[str, Any] | None) -> None:
    if not keeping:
        return
    report.heading("What the strong model learned from")
    report.text(
        f"{keeping['kept']} of {keeping['rows']} answers were kept, to {keeping['prompts_kept']} of "
        f"{keeping['prompts']} prompts; the mean score went from {keeping['mean_before']:.3f} to "
        f"{keeping['mean_kept']:.3f}."
    )
    dropped = [[reason.replace("_", " "), count] for reason, count in keeping["dropped"].items() if count]
    if dropped:
        report.table(["dropped because", "answers"], dropped)
    if len(keeping["models"]) > 1:
        rows = [[name, own["rows"], own["kept"], f"{own['share']:.0%}"] for name, own in keeping["models"].items()]
        report.table(["weak model", "answers", "kept", "share of the kept"], rows)


def _side_by_side(report: RunReport, run: "GenerationRun", threshold: float) -> None:
    """Answers to the same prompts before and after training: the most toxic before, and those that still are."""
    paths = [run.folder / "held_out" / f"{side}_scored.jsonl" for side in (ORIGINAL, "w2s")]
    if not all(path.exists() for path in paths):
        return
    harm = run.harm_of
    before, after = (
        {(row["index"], row["sample"]): row for row in read_jsonl(path) if harm(row) is not None} for path in paths
    )
    shared = [key for key in before if key in after]
    worst = sorted(shared, key=lambda key: -harm(before[key]))[:SIDE_BY_SIDE]
    still = sorted(shared, key=lambda key: -harm(after[key]))[:SIDE_BY_SIDE]
    groups = {
        "The most toxic answers before training": worst,
        "Toxic after training": [key for key in still if harm(after[key]) >= threshold],
    }
    for heading, keys in groups.items():
        if keys:
            report.heading(heading)
            report.table(
                ["prompt", "before", "after", "score"],
                [
                    [_asked(before[key]), completion_text(before[key]["completion"]),
                     completion_text(after[key]["completion"]), f"{harm(before[key]):.2f} → {harm(after[key]):.2f}"]
                    for key in keys
                ],
            )  # fmt: skip


def _asked(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _is_set(settings: Mapping[str, Any], name: str) -> bool:
    return settings.get(name) not in (None, [], "")


def _setting(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value
