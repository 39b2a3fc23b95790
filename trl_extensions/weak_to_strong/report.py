"""The report of a weak-to-strong run, from what lies in its folder: did the strong model beat its teachers, and how
much of the gap came back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.generation.sampling import completion_text
from ..core.runs.jsonl import read_jsonl
from ..core.runs.plots import BEFORE, COLOURS, bar_plot, panels, save
from ..core.runs.report import NOT_TRAINED, Markdown, RunReport, first_true, loss_stayed, quoted
from ..core.stats import wilson
from .evaluation import CEILING, GAP_SCORES, ORIGINAL, STRONG, WEAK, harm_of


SIDE_BY_SIDE = 5
TITLES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "macro F1", "f1_positive": "F1, class 1",
    "nll": "nll, nats", "auroc": "AUROC", "ece": "ECE",
}  # fmt: skip
MEASURE_TITLES = {"expected_maximum": "expected maximum toxicity", "probability": "toxicity probability"}
# Which of a pair is the better one is written in an arbitrary order, so scores by class say nothing.
PAIR_SCORES = ("accuracy", "nll", "ece")
# What a reader asks first; the trainer's other settings are in report.json.
SHOWN = (
    "task", "model_name_or_path", "weak_models", "bootstrap_models", "ensemble", "calibrate", "examples",
    "examples_where", "num_examples", "test_examples", "test_where", "num_test_examples", "group_column",
    "subgroup_column", "unlabelled", "check_models",
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

    The evaluation is that of `evaluate_run`, of `forecast` by strong model under "forecast", or both. Of the settings
    those of `SHOWN` are listed; `weak_reports` are the fields of `learners.LabelReport`, and `seed`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(str(settings.get("model_name_or_path", "strong model"))).name
    report = RunReport(f"Weak-to-strong: {model}")
    report.data = {"settings": dict(settings), "weak_labels": [dict(own) for own in weak_reports]} | evaluation
    if "scores" in evaluation:
        _evaluation_tables(report, folder, evaluation, settings)
    if "forecast" in evaluation:
        _forecast_tables(report, evaluation)
    _weak_tables(report, weak_reports)
    costs = {model: own for model, own in (evaluation.get("costs") or {}).items() if own}
    names = list(dict.fromkeys(name for own in costs.values() for name in own))
    columns = ["model", *(name.replace("_", " ") for name in names)]
    rows = [
        [model, *(f"{np.mean(own[name]):,.0f}" if name in own else "" for name in names)]
        for model, own in costs.items()
    ]
    _section(report, "What it took", columns, rows, "Means over seeds.")

    own = {name: settings.get(name) for name in SHOWN}
    own["num_train_epochs"] = own["num_train_epochs"] or "by the number of rows"
    shown = {name: value for name, value in own.items() if value not in (None, [], "")}
    texts = [f"{value:g}" if isinstance(value, float) else value for value in shown.values()]
    rows = [[Markdown(f"`{name}`"), text] for name, text in zip(shown, texts, strict=True)]
    _section(report, "Settings", ["setting", "value"], rows)
    return report.write(folder)


def _evaluation_tables(
    report: RunReport, folder: Path, evaluation: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """What true labels of the test rows say."""
    scores, pairs = evaluation["scores"], settings.get("task") == "reward"
    names = [name for name in TITLES if name in scores[WEAK] and (not pairs or name in PAIR_SCORES)]
    report.verdict(*verdict(evaluation), in_numbers(evaluation))
    report.text(_reading(evaluation))
    draw_scores(evaluation, folder / "scores.png")
    report.figure("scores.png", "Accuracy on the test rows; dots are seeds, lines the weak model and the ceiling.")
    if evaluation["strong"]:
        draw_pgr(evaluation, folder / "pgr.png")
        report.figure("pgr.png", "Share of the gap between the weak model (0) and the ceiling (1) that was recovered.")

    rows = [[model, *(number(scores[model][name], 3) for name in names)] for model in evaluation["models"]]
    note = "Means over seeds. No interval is given for ECE, a sum of absolute values."
    _section(report, "Scores on the test rows", ["model", *(TITLES[name] for name in names)], rows, note)

    rows, gaps = [], {f"PGR, {TITLES[name]}": evaluation["pgr"][name] for name in GAP_SCORES if name in names}
    for name in evaluation["strong"]:
        difference = evaluation["differences"]["accuracy"][name]
        seeds = evaluation["pgr"]["accuracy"][name]["per_seed"]
        by_seed = ", ".join("-" if value is None else f"{value:.2f}" for value in seeds)
        cells = [pgr_cell(own[name]) for own in gaps.values()]
        rows.append([name, number(difference, 3, sign="+"), *cells, by_seed])
    columns = ["model", "accuracy over the weak model", *gaps, "by seed"]
    note = ""
    if gap := evaluation["gap"]["accuracy"]:
        note = (
            f"The ceiling is {number(gap, 3, sign='+')} above the weak model in accuracy. PGR is (strong - weak) / "
            "(ceiling - weak), of means over seeds, and undefined where that gap is not clear of 0; a dash is a seed "
            "without a gap."
        )
    _section(report, "What was recovered", columns, rows, note)
    _part_tables(report, evaluation, pairs)

    rows = []
    for name, own in evaluation["agreement"].items():
        right, wrong = own["right"], own["wrong"]
        rows.append([name, number(right), number(wrong), number(wrong["corrected"])])
        note = (
            f"Shares of the {right['n']} test rows on which the weak model is right and the {wrong['n']} on which it "
            "is wrong (summed over seeds), with Wilson's intervals. A model that only imitates agrees as often on "
            "both; the ceiling, which saw no weak label, shows what agreement comes without imitation."
        )
    columns = ["model", "agrees where weak is right", "agrees where weak is wrong", "corrects what is wrong"]
    _section(report, "What became of the weak model's errors", columns, rows, note)


def _part_tables(report: RunReport, evaluation: dict[str, Any], pairs: bool) -> None:
    """Accuracy by subgroup and class, and which classes are taken for which; pairs have no classes of their own."""
    models, strong = evaluation["models"], evaluation["strong"]
    columns = ["rows", *models, *(f"PGR, {name}" for name in strong)]
    for title, parts, first in (
        ("By subgroup", evaluation.get("by_subgroup", {}), "subgroup"),
        ("By class: recall", {} if pairs else evaluation.get("by_class", {}), "class"),
    ):
        rows = [
            [
                part,
                own["rows"],
                *(number(own["scores"][n], 3) for n in models),
                *(pgr_cell(own["pgr"][n]) for n in strong),
            ]
            for part, own in parts.items()
        ]
        _section(report, title, [first, *columns], rows)
    if worst := evaluation.get("worst"):
        listed = [f"{name}: {quoted(str(own['subgroup']))}, {number(own, 3)}" for name, own in worst.items()]
        note = "Intervals allow for the subgroup having been picked as the worst (Bonferroni)."
        report.text(f"Worst subgroup by accuracy: {'; '.join(listed)}. {note}")
    if pairs or "confusion" not in evaluation:
        return
    names = evaluation["class_names"]
    best = max(strong, key=lambda name: evaluation["scores"][name]["accuracy"]["value"], default=WEAK)
    for name in dict.fromkeys((WEAK, best)):
        rows = [
            [true, *(f"{value:.1f}" for value in own)]
            for true, own in zip(names, evaluation["confusion"][name], strict=True)
        ]
        _section(report, f"Confusion: {name}", ["true class", *(f"called {called}" for called in names)], rows)


def _forecast_tables(report: RunReport, evaluation: dict[str, Any]) -> None:
    """What can be said without true labels."""
    if "scores" not in evaluation:
        report.text("The test rows have no true labels: what follows is a forecast, not a measurement.")
    rows = []
    for name, own in evaluation["forecast"].items():
        report.text(f"`{name}`: {forecast_text(own)}")
        checks = "; ".join(f"{checker}: {number(each)}" for checker, each in own["by_checker"].items())
        cells = [number(own["disagreement"], 3), number(own["ratio"]), number(own["gain"], 3, sign="+"), checks]
        rows.append([name, *cells])
    columns = ["model", "disagrees with its teacher", "informedness over the teacher's", "forecast gain", "by checker"]
    note = (
        "Informedness is 2 x balanced accuracy - 1; the gain is in balanced accuracy. Both rest on teacher, student "
        "and checkers erring independently of each other: a checker like the teacher makes the forecast too low, one "
        "like the student too high, and no number here shows it."
    )
    _section(report, "Forecast without true labels", columns, rows, note)


def forecast_text(own: dict[str, Any]) -> str:
    """A result of `forecast` as a sentence or two."""
    ratio, gain = own["ratio"], own["gain"]
    if ratio["value"] is None:
        return f"the forecast is worth nothing: {ratio['reason']}."
    text = f"forecast informedness {number(ratio)} times the teacher's"
    text += (
        f"; {gain['reason']}."
        if gain["value"] is None
        else f", a gain of {number(gain, 3, sign='+')} in balanced accuracy."
    )
    if ratio["low"] is None:
        return f"{text} One seed has no interval."
    side = "above" if ratio["low"] > 1 else "below" if ratio["high"] < 1 else "not clear of"
    return f"{text} It is {side} the teacher's."


def verdict(evaluation: dict[str, Any]) -> tuple[str, str]:
    """What came of a run, and what to do: its kind, and a sentence. Clear is what the intervals leave no doubt of."""
    strong, rows = evaluation["strong"], evaluation["rows"][0]
    differences, gap = evaluation["differences"]["accuracy"], evaluation["gap"]["accuracy"]
    clear = [name for name in strong if (differences[name]["low"] or 0) > 0]
    # Always saying one class is right so often; one seed has no interval of its own
    most = max(own["rows"] for own in evaluation["by_class"].values()) / rows
    ceiling = evaluation["scores"].get(CEILING, {}).get("accuracy")
    low = ceiling and (wilson(ceiling["value"] * rows, rows)[0] if ceiling["low"] is None else ceiling["low"])
    return first_true(
        ("no_strong_model", not strong, "No strong model was trained on weak labels: name losses in `variants`."),
        ("ceiling_untrained", ceiling and low <= most, "Even on true labels the strong model learned nothing: the "
         f"ceiling is not clear of always saying one class ({most:.0%} right), and no number here means a thing. "
         "Raise `learning_rate` or `num_train_epochs`, give more `examples`, or train more than a head."),
        ("one_seed", len(evaluation["seeds"]) == 1, "One seed settles nothing, without intervals: add `seeds`."),
        ("no_gap", gap and (gap["low"] or 0) <= 0, "The strong model trained on true labels is not clearly better "
         "than the teacher, so there is no gap to recover and PGR says nothing: take a weaker teacher or a stronger "
         "model, train more of it than a head, or, where the two are close, test on more rows and `seeds`."),
        ("beats_teacher", clear,
         f"It worked: {len(clear)} of {len(strong)} strong models trained on weak labels clearly beat their teacher."),
        ("unclear", True, f"No strong model clearly beats its teacher on {rows} test rows: test on more, add `seeds`, "
         "or try another loss (`variants`) where errors are imitated."),
    )  # fmt: skip


def in_numbers(evaluation: dict[str, Any]) -> str:
    """How right the models are and what was recovered, in a few sentences."""
    strong, scores, gaps = evaluation["strong"], evaluation["scores"], evaluation["pgr"]["accuracy"]
    weak = f"the weak model's {percent(scores[WEAK]['accuracy'])}"
    if not strong:
        return f"Accuracy: {weak}."
    best = max(strong, key=lambda name: scores[name]["accuracy"]["value"])
    ceiling = f" (ceiling: {percent(scores[CEILING]['accuracy'])})" if CEILING in scores else ""
    reached = percent(scores[best]["accuracy"])
    text = f"`{best}` has {reached} accuracy against {weak}{ceiling}. {recovered(gaps[best])}"
    if len(strong) == 1:
        return text
    others = [gaps[name]["value"] for name in strong if name != best and gaps[name]["value"] is not None]
    span = f" PGR of the others: {min(others):.2f} to {max(others):.2f}." if others else ""
    return (
        f"The most accurate, {text} It was picked out of {len(strong)} by these very test rows, which flatters it: to "
        f"choose a loss, compare them on other rows.{span}"
    )


def _reading(evaluation: dict[str, Any]) -> str:
    """How to take the intervals."""
    seeds, groups = len(evaluation["seeds"]), evaluation["groups"]
    grouped, whole = (f" in {groups[0]} groups", "groups of ") if groups else ("", "")
    text = f"{evaluation['rows'][0]} test rows{grouped}, {seeds} seed{'s' * (seeds > 1)}."
    if seeds == 1:
        return f"{text} One seed has no intervals: it does not show what another would change. Add `seeds`."
    text += (
        f" Intervals are {100 * evaluation['confidence']:g} %, and allow for other {whole}test rows and other seeds "
        "(Cochran's t; Fieller's for PGR); models are compared row by row and seed by seed."
    )
    return f"{text} They are wide for want of seeds: five or more make them narrower." if seeds < 5 else text


def _section(
    report: RunReport, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = ""
) -> None:
    """A heading, a table and what to know of it, where there are rows."""
    if not rows:
        return
    report.heading(title)
    report.table(columns, rows)
    if note:
        report.text(note)


def _weak_tables(report: RunReport, weak_reports: Sequence[Mapping[str, Any]]) -> None:
    labels, learners = [], []
    for own in weak_reports:
        classes = [" / ".join(f"{part:.0%}" for part in own[name]) for name in ("class_shares", "labelled_shares")]
        labels.append([own["seed"], own["rows"], *_right(own), own["disagreement"], own["confidence"], *classes])
        for name, learner in own["learners"].items():
            ece = f"{_listed(learner['ece_before'])}, {_listed(learner['ece'])}"
            learners.append([own["seed"], name, *_right(learner), _listed(learner["temperature"]), ece])
    columns = ["rows labelled", "right", "right, test rows", "disagreement", "confidence", "classes", "true classes"]
    _section(report, "The weak labels", ["seed", *columns], labels)
    if learners:
        columns = ["seed", "weak model", "right", "right, test rows", "temperature", "ECE before and after"]
        report.table(columns, learners)
    for own in weak_reports:
        for warning in own["warnings"]:
            report.text(f"**Seed {own['seed']}:** {quoted(warning)}")


def _right(own: Mapping[str, Any]) -> list[str]:
    """Accuracies of weak labels, on the rows to label and on the test rows."""
    shares = (own["target_accuracy"], own["extra_accuracy"].get("test"))
    return ["n/a" if share is None else f"{share:.1%}" for share in shares]


# Runs by generation


def write_generation_report(folder: Path, evaluation: dict[str, Any]) -> Path:
    """Write `report.md`, `report.json` and `toxicity.png` of a run by generation, from what its stages left.

    The result of `evaluate_toxicity` comes with the strong `model` and the `scorer` (`name`, `range`,
    `higher_is_better`).
    """
    report = RunReport(f"Weak-to-strong by generation: {Path(str(evaluation['model'])).name}")
    path = folder / "answers" / "keeping.json"
    keeping = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    report.data = {"kept": keeping} | evaluation
    log = folder / f"train_{STRONG}" / "trainer_state.json"
    history = json.loads(log.read_text(encoding="utf-8"))["log_history"] if log.exists() else []
    report.verdict(*generation_verdict(evaluation, history), _generation_in_numbers(evaluation))
    scorer = evaluation["scorer"]
    (low, high), name = scorer["range"], scorer["name"]
    best = high if scorer["higher_is_better"] else low
    scale = "" if (low, high, best) == (0, 1, 0) else f", rescaled so that {best:g}, the best score, is 0"
    report.text(
        f"Scored by {quoted(name)}{scale}. A prompt counts as toxic if one of its samples scores "
        f"{evaluation['threshold']:g} or more. Both numbers grow with the samples a prompt. Intervals are "
        f"{100 * evaluation['confidence']:g} %, over prompts; differences are paired by prompt."
    )
    _overview(report, evaluation)
    draw_toxicity(evaluation, folder / "toxicity.png")
    report.figure("toxicity.png", "Expected maximum toxicity and toxicity probability on held-out prompts.")
    for kind, own in evaluation["kinds"].items():
        _toxicity_tables(report, kind, own)
    if keeping:
        _keeping_tables(report, keeping)
    _side_by_side(report, folder / "held_out", evaluation)
    return report.write(folder)


def generation_verdict(evaluation: dict[str, Any], log: Sequence[Mapping[str, Any]] = ()) -> tuple[str, str]:
    """What came of a run by generation, and what to do: its kind, and a sentence."""
    own = evaluation["kinds"][_headline_kind(evaluation)]
    before, changes = own["models"].get(ORIGINAL), own["differences"]["probability"].get(ORIGINAL, {})
    change = changes.get(STRONG, {"low": 0, "high": 0})
    return first_true(
        ("not_trained", STRONG not in own["models"], "Nothing was trained yet."),
        ("nothing_unwanted", before and not before["probability"]["value"], "Before training no held-out answer is "
         "toxic, so nothing can fall: give prompts that bring it out, or more of them (`num_eval_prompts`)."),
        ("less", change["high"] < 0, "It worked: answers are clearly less often toxic than before training."),
        ("more", change["low"] > 0, "Answers are clearly more often toxic than before: keep better ones (`best_of`)."),
        ("loss", loss_stayed(log), NOT_TRAINED),
        ("unclear", True, f"Nothing is clear of its error on {own['prompts']} held-out prompts: hold out more "
         "(`num_eval_prompts`), or train for longer (`num_train_epochs`)."),
    )  # fmt: skip


def _generation_in_numbers(evaluation: dict[str, Any]) -> str:
    """Toxicity before and after, and against the teacher, in a few sentences."""
    kind = _headline_kind(evaluation)
    own = evaluation["kinds"][kind]
    trained = [name for name in own["models"] if name not in (ORIGINAL, CEILING) and not name.startswith(WEAK)]
    what = f"{own['samples']} samples" if kind == "sampled" else "the greedy answer"
    if not trained:
        return f"{what.capitalize()} to each of {own['prompts']} held-out prompts were scored."
    name, before = trained[-1], own["models"].get(ORIGINAL)
    went = []
    for measure, title in MEASURE_TITLES.items():
        came = f" from {number(before[measure])}" if before else ""
        went.append(f"{title} went{came} to {number(own['models'][name][measure])}")
    text = f"Over {what} to each of {own['prompts']} held-out prompts, {' and '.join(went)}."
    for baseline, called in ((ORIGINAL, "the model before training"), (WEAK, "its teacher")):
        difference = own["differences"]["probability"].get(baseline, {}).get(name)
        if difference:
            side = "below" if difference["high"] < 0 else "above" if difference["low"] > 0 else "not clear of"
            text += f" The probability is {side} that of {called}: {number(difference, 3, sign='+')}."
    gap = own["pgr"]["probability"].get(name)
    return f"{text} {recovered(gap)}" if gap else text


def _overview(report: RunReport, evaluation: dict[str, Any]) -> None:
    """One row a model: harm by each scorer, and how likely its answers are to the model before training."""
    kind, fluency = _headline_kind(evaluation), evaluation.get("fluency")
    scored = [own for own in (evaluation, evaluation.get("confirmed")) if own]
    header = ["", *(f"{title}, {own['scorer']['name']}" for own in scored for title in MEASURE_TITLES.values())]
    header += ["perplexity under the original", "times the original's", "empty answers"] if fluency else []
    roles = {ORIGINAL: "before", WEAK: "teacher", STRONG: "after"}
    rows = []
    for name in evaluation["models"]:
        models = [own["kinds"][kind]["models"][name] for own in scored]
        cells = [number(own[measure], 3) for own in models for measure in MEASURE_TITLES]
        if fluency:
            own = fluency[kind][name]
            cells += [number(own, 1), number(own["ratio"]) if "ratio" in own else "", f"{own['empty']:.0%}"]
        rows.append([f"{name} ({roles[name]})" if name in roles else name, *cells])
    report.table(header, rows)


def _headline_kind(evaluation: dict[str, Any]) -> str:
    return "sampled" if "sampled" in evaluation["kinds"] else next(iter(evaluation["kinds"]))


def _toxicity_tables(report: RunReport, kind: str, own: dict[str, Any]) -> None:
    left_out = f", {own['incomplete']} left out for a missing score" if own["incomplete"] else ""
    report.heading(f"{kind.capitalize()}: {own['prompts']} prompts, {own['samples']} a prompt{left_out}")
    differences, gaps = own["differences"], own["pgr"]
    tables = {
        "model": [[name, *(number(values[m], 3) for m in MEASURE_TITLES)] for name, values in own["models"].items()],
        "difference": [
            [f"{name} - {base}", *(number(differences[m][base][name], 3, sign="+") for m in MEASURE_TITLES)]
            for base, others in differences["probability"].items()
            for name in others
        ],
        "gap recovered": [[name, *(pgr_cell(gaps[m][name]) for m in MEASURE_TITLES)] for name in gaps["probability"]],
    }
    for first, rows in tables.items():
        if rows:
            report.table([first, *MEASURE_TITLES.values()], rows)


def _keeping_tables(report: RunReport, keeping: dict[str, Any]) -> None:
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


def _side_by_side(report: RunReport, folder: Path, evaluation: dict[str, Any]) -> None:
    """Answers to the same prompts before and after training: the most toxic before, and those that still are."""
    paths = [folder / f"{side}_scored.jsonl" for side in (ORIGINAL, STRONG)]
    if not all(path.exists() for path in paths):
        return
    before, after = ({(row["index"], row["sample"]): row for row in read_jsonl(path)} for path in paths)
    harm = {}
    for key in (key for key in before if key in after):
        first, second = (harm_of(rows[key], evaluation["scorer"]) for rows in (before, after))
        if first is not None and second is not None:
            harm[key] = (first, second)
    worst = sorted(harm, key=lambda key: -harm[key][0])[:SIDE_BY_SIDE]
    still = sorted(harm, key=lambda key: -harm[key][1])[:SIDE_BY_SIDE]
    still = [key for key in still if harm[key][1] >= evaluation["threshold"]]
    for heading, keys in (("The most toxic answers before training", worst), ("Toxic after training", still)):
        table = []
        for key in keys:
            prompt = before[key]["prompt"]
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            texts = [completion_text(rows[key]["completion"]) for rows in (before, after)]
            table.append([asked, *texts, f"{harm[key][0]:.2f} → {harm[key][1]:.2f}"])
        _section(report, heading, ["prompt", "before", "after", "score"], table)


# Estimates {"value", "low", "high"} and shares as text


def percent(estimate: dict[str, Any]) -> str:
    """A share in percent with its interval, where it has one."""
    interval = f" ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})" if estimate["low"] is not None else ""
    return f"{100 * estimate['value']:.1f} %{interval}"


def number(estimate: dict[str, Any], digits: int = 2, sign: str = "") -> str:
    """A number with its interval, where it has one; `sign` "+" writes the sign of positive ones too."""
    if estimate["value"] is None:
        return "n/a"
    form = f"{{:{sign}.{digits}f}}".format
    text = form(estimate["value"])
    return text if estimate["low"] is None else f"{text} ({form(estimate['low'])} to {form(estimate['high'])})"


def _listed(values: Sequence[float | None]) -> str:
    """One number, or those of the two halves of a bootstrap chain."""
    return " and ".join("n/a" if value is None else f"{value:.2f}" for value in values)


def recovered(gap: dict[str, Any]) -> str:
    """A result of `Comparison.pgr` as a sentence."""
    if gap["value"] is None:
        return f"The performance gap recovered is undefined: {gap['reason']}."
    return f"Performance gap recovered: {number(gap)}."


def pgr_cell(gap: dict[str, Any]) -> str:
    """The same in a table."""
    return f"undefined: {gap['reason']}" if gap["value"] is None else number(gap)


# Figures


def draw_scores(evaluation: dict[str, Any], path: str | Path) -> Any:
    """Bars of every model's accuracy with intervals, a dot a seed, and lines at the weak model and the ceiling."""
    own = {name: evaluation["scores"][name]["accuracy"] for name in evaluation["models"]}
    figure, [axes] = panels(width=max(4.5, 1.2 + 0.8 * len(own)))
    bar_plot(axes, list(own), {"": list(own.values())}, unit=100, digits="%.1f")
    for place, estimate in enumerate(own.values()):
        seeds = [100 * value for value in estimate["per_seed"]]
        axes.scatter([place] * len(seeds), seeds, s=13, color="white", edgecolor="black", linewidth=0.7, zorder=3)
    for name, style in ((WEAK, ":"), (CEILING, "--")):
        if name in own:
            axes.axhline(100 * own[name]["value"], color="0.35", linestyle=style, linewidth=1, label=name)
    axes.set_ylabel("accuracy (%)")
    return save(figure, path)


def draw_pgr(evaluation: dict[str, Any], path: str | Path) -> Any:
    """Bars of the gap recovered by loss, with intervals."""
    gaps = {name: evaluation["pgr"]["accuracy"][name] for name in evaluation["strong"]}
    figure, [axes] = panels(width=max(4.5, 1.2 + 0.8 * len(gaps)))
    bar_plot(axes, list(gaps), {"": list(gaps.values())}, digits="%.2f")
    for height, style, name in ((0, ":", WEAK), (1, "--", CEILING)):
        axes.axhline(height, color="0.35", linestyle=style, linewidth=1, label=name)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1.0), min(max(high, 1.15), 2.0))  # a PGR far out only says that the gap is small
    axes.set_ylabel("gap recovered (accuracy)")
    return save(figure, path)


def draw_toxicity(evaluation: dict[str, Any], path: str | Path) -> Any:
    """Two panels, expected maximum toxicity and toxicity probability, a bar per model and kind of decoding."""
    models = evaluation["models"]
    figure, grid = panels(2, width=max(4.0, 1.2 + 0.8 * len(models)))
    for axes, (measure, title) in zip(grid, MEASURE_TITLES.items(), strict=True):
        series, colours = {}, {}
        for kind, own in evaluation["kinds"].items():
            label = f"{kind}, {own['samples']} a prompt"
            series[label] = [own["models"].get(name, {}).get(measure) for name in models]
            colours[label] = COLOURS[0] if kind == "sampled" else BEFORE
        bar_plot(axes, models, series, colours=colours, digits="%.2f")
        axes.set_ylabel(f"{title} (should fall)")
    return save(figure, path)
