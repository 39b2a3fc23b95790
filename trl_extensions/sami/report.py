"""The report of a SAMI run, written from what its stages left on disk: what the rounds changed, and at what cost."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.generation.sampling import completion_text
from ..core.judge.win_rate import EQUAL_WITHIN
from ..core.runs import plots
from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import NOT_TRAINED, RunReport, first_true, loss_stayed, quoted
from .data import load_rows
from .principles import constitution_label


FEW = 30  # held-out queries, from which on an error of a mean is to be believed
SIDE_BY_SIDE, _MOST_LABELS, _LINES = 6, 16, 4  # held-out queries shown; constitutions in the table, in the figure


def write_report(folder: Path) -> Path:
    """Write `report.md`, `report.json`, `axes.png` and `rounds.png` into a run's folder; returns the first's path."""
    model = _json(folder / "settings.json")["model_name_or_path"]
    count = len(list(folder.glob("round_*/evaluation.json")))
    rounds = [_round_data(folder / f"round_{number}", number) for number in range(count)]
    report = RunReport(f"SAMI: {Path(model).name}")
    report.data = {"model": model, "rounds": rounds}
    _first_lines(report, rounds)
    _rounds_table(report, rounds)
    last = rounds[-1]["evaluation"]
    _obedience_table(report, last.get("obedience"), "Obedience, by principle")
    _obedience_table(
        report, last.get("obedience_held_out_principles"), "Obedience to principles that were not trained"
    )
    _side_effects_table(report, rounds)
    if any("difference" in own["all"] for own in (last.get("obedience") or {}).values()):
        draw_axes(last, folder / "axes.png")
        report.figure("axes.png", "Both axes after the last round: what was asked for, and what else moved (95 %).")
    draw_rounds([entry["evaluation"] for entry in rounds], folder / "rounds.png")
    report.figure("rounds.png", "Bound (with standard errors) and response length by round; 0 is the original.")
    report_win_rates(report, rounds)
    report_absorbed(report, folder / "absorbed")
    _training_table(report, rounds)
    _lengths_table(report, rounds)
    _samples(report, folder / "round_0", folder / f"round_{count - 1}")
    return report.write(folder)


def summary_of(report: Path) -> str:
    """What a report says first: all under its title up to the first heading, and the table by round."""
    text = report.read_text(encoding="utf-8")
    table = next(paragraph for paragraph in text.split("\n\n") if paragraph.startswith("| round"))
    return text.partition("\n## ")[0].partition("\n")[2].strip() + f"\n\n{table}"


def _round_data(folder: Path, number: int) -> dict[str, Any]:
    data = {"round": number, "evaluation": _json(folder / "evaluation.json")}
    if number == 0:
        return data
    log = _json(folder / "train" / "trainer_state.json")["log_history"]
    guard, judged = folder / "train" / "guard.jsonl", folder / "win_rate.json"
    data |= {"sampling": _json(folder / "sampling.json"), "steps": [entry for entry in log if "loss" in entry]}
    data["training_seconds"] = next((entry["train_runtime"] for entry in log if "train_runtime" in entry), None)
    data["guard"] = read_jsonl(guard) if guard.exists() else []
    return data | ({"win_rate": _json(judged)} if judged.exists() else {})


def verdict(rounds: list[dict]) -> tuple[str, str]:
    """What came of a run, and what to do: its kind, and a sentence. Clear is what is more than two standard errors."""
    first, last = rounds[0]["evaluation"], rounds[-1]["evaluation"]
    changes = {name: own["all"].get("difference") for name, own in (last.get("obedience") or {}).items()}
    more = [quoted(name) for name, own in changes.items() if own and own["value"] > 2 * own["se"]]
    less = [quoted(name) for name, own in changes.items() if own and -own["value"] > 2 * own["se"]]
    rise, error = _rise(first, last)
    contradicted = (rounds[-1].get("win_rate") or {}).get("contradiction_share") or 0
    return first_true(
        ("obeys", more and not less, f"It worked: obeyed clearly more often than before: {', '.join(more)}."),
        ("disobeys", less, f"Obeyed clearly less often than before: {', '.join(less)} (more often: "
         f"{', '.join(more) or 'none'}). Lower `learning_rate`, and filter what is trained on (`filter_by_check`)."),
        ("told_apart", rise > 2 * error, "Answers to different constitutions are clearly easier to tell apart, but no "
         "principle is clearly obeyed more often: give principles a `check`, or read the answers below."),
        ("less_apart", -rise > 2 * error, "It got worse: answers to different constitutions are harder to tell apart "
         "than before. Lower `learning_rate`."),
        ("judge", contradicted > 0.9, "The judge prefers whatever stands in one place, so its win rate says nothing, "
         "and nothing else is clear: take a larger judge, or `judge_mode: logprobs`."),
        ("loss", loss_stayed(rounds[-1].get("steps", [])), NOT_TRAINED),
        ("too_few", last["num_queries"] < FEW, f"Nothing is clear of its error on {last['num_queries']} held-out "
         "queries: hold out more (`num_eval_prompts`)."),
        ("unclear", True, "Nothing is clear of its error: train for longer (`rounds`, `steps_per_round`), at a higher "
         "`learning_rate`, or on principles that the model follows when it is asked to."),
    )  # fmt: skip


def _rise(first: dict[str, Any], last: dict[str, Any]) -> tuple[float, float]:
    """Of the tight bound, with its standard error."""
    error = math.hypot(last["mi_bound"]["se"], first["mi_bound"]["se"])
    return last["mi_bound"]["mean"] - first["mi_bound"]["mean"], error


def _first_lines(report: RunReport, rounds: list[dict]) -> None:
    first, last = rounds[0]["evaluation"], rounds[-1]["evaluation"]
    rise, error = _rise(first, last)
    report.data["rise"] = {"mi_bound": rise, "se": error}
    clarity = f", {'clear of' if abs(rise) > 2 * error else 'within'} twice its standard error" if error else ""
    orders = ""
    if "same_order" in last and "same_order" in first:
        was, now = (e["same_order"]["accuracy_columns"]["mean"] for e in (first, last))
        orders = f" ({was:.0%} to {now:.0%} in the order they were written under)"
    report.verdict(
        *verdict(rounds),
        f"On {last['num_queries']} held-out queries the tight bound on mutual information went from "
        f"{_pm(first['mi_bound'])} to {_pm(last['mi_bound'])} nats (at most {last['max_bound']:.2f}), principles in a "
        f"fresh order: a change of {rise:+.3f} ± {error:.3f}{clarity}. Which constitution a response was written for, "
        f"the model could tell {first['accuracy_columns']['mean']:.0%} of the time before and "
        f"{last['accuracy_columns']['mean']:.0%} after{orders}.",
    )
    if words := axes_in_words(last):
        report.text(quoted(" ".join(words)))
    for entry in rounds[1:]:
        for check in (check for check in entry["guard"] if check.get("stopped")):
            report.text(f"**Round {entry['round']} was stopped at step {check['step']}:** {quoted(check['stopped'])}")


def axes_in_words(evaluation: dict[str, Any]) -> list[str]:
    """Both axes of a trained model's `evaluation.json` in sentences: how often principles are obeyed, and how much
    else stayed; nothing where that was not measured."""
    every = {name: own["all"] for name, own in (evaluation.get("obedience") or {}).items()}
    shares = {
        name: [own[side]["value"] for side in ("original", "obeyed") if side in own] for name, own in every.items()
    }
    listed = [f"{name} " + " → ".join(f"{share:.0%}" for share in own) for name, own in shares.items()]
    words = [f"Obeyed before and after: {', '.join(listed)}."] if listed else []
    moved = evaluation.get("side_effects") or {}
    if same := moved.get("plain_answers", {}).get("unchanged"):
        words.append(f"Without a constitution {same['value']:.0%} of its answers are what they were, word for word.")
    if change := moved.get("references", {}).get("relative_change"):
        how = "less" if change["value"] > 0 else "more"
        words.append(f"Answers that people wrote are {how} likely than before ({change['value']:+.1%} nats).")
    return words


def _rounds_table(report: RunReport, rounds: list[dict]) -> None:
    report.heading("Held-out queries, by round")
    rows = []
    for entry in rounds:
        e = entry["evaluation"]
        queries = f"{e['num_queries']} ({e['num_empty']} empty)" if e["num_empty"] else e["num_queries"]
        same = e.get("same_order")
        rows.append([
            entry["round"], queries, _pm(e["mi_bound"]), _pm(same["mi_bound"]) if same else "",
            f"{e['accuracy_columns']['mean']:.0%}", f"{same['accuracy_columns']['mean']:.0%}" if same else "",
            _pm(e.get("fixed_responses", e)["mi_bound"]), _pm(e.get("contrast_per_token", e["mi_bound"])),
            e["kl"]["mean"], f"{e['length']:.0f}", f"{e['truncated']:.0%}", e["distinct_2"],
        ])  # fmt: skip
    header = ["round", "queries", "tight bound", "same order", "which constitution?", "same order", "same responses†"]
    report.table([*header, "contrast per token", "KL", "tokens", "cut off", "distinct-2"], rows)
    report.text(
        'The tight bound (nats) is of log-probabilities of whole responses; "which constitution?" is how often a '
        "response has the highest one under the constitution it was written for. Principles stand in an order drawn "
        'anew; "same order": as the response was sampled under, which tells constitutions apart by itself. †The bound '
        "on the original's responses, the same texts in every round."
    )
    unseen = [(entry["round"], entry["evaluation"].get("held_out_principles")) for entry in rounds]
    if any(own for _, own in unseen):
        report.heading("Principles that were not trained")
        rows = [[n, _pm(own["mi_bound"]), f"{own['accuracy_columns']['mean']:.0%}"] for n, own in unseen if own]
        report.table(["of round", "tight bound", "which constitution?"], rows)


def _obedience_table(report: RunReport, obedience: dict[str, Any] | None, heading: str) -> None:
    """How often each principle is obeyed, by side; nothing without checks."""
    if not obedience:
        return
    report.heading(heading)
    rows = []
    for name, sides in obedience.items():
        for side, own in sides.items():
            change = own.get("difference")
            shown = f"{change['value']:+.0%} [{change['low']:+.0%}, {change['high']:+.0%}]" if change else ""
            unread = f" ({own['unread']} unread)" if own["unread"] else ""
            rows.append([name, side, f"{own['n']}{unread}", _rate(own.get("original")), _rate(own["obeyed"]), shown])
    report.table(["principle", "chosen", "responses", "obeyed before", "after", "difference"], rows)
    report.text(
        "The share of held-out responses that pass the `check` of the principle, where its definition or its "
        "antithesis was chosen: means over queries, 95 % intervals (Wilson; Agresti and Min for the difference)."
    )


def _side_effects_table(report: RunReport, rounds: list[dict]) -> None:
    """The second axis; nothing in folders of earlier versions."""
    rows = []
    for entry in rounds[1:]:
        moved = entry["evaluation"].get("side_effects") or {}
        plain, people, choices = (moved.get(name, {}) for name in ("plain_answers", "references", "multiple_choice"))
        change, kl = people.get("relative_change"), plain.get("kl")
        rows.append([
            entry["round"], _rate(plain.get("unchanged")), f"{kl['value']:.4f}" if kl else "not measured",
            f"{people['original']['value']:.3f} → {people['nats_per_token']['value']:.3f} ({change['value']:+.1%} "
            f"[{change['low']:+.1%}, {change['high']:+.1%}])" if change else "not measured",
            f"{_rate(choices['original'])} → {_rate(choices['accuracy'])}" if "original" in choices else
            "not measured",
        ])  # fmt: skip
    if not any(entry["evaluation"].get("side_effects") for entry in rounds[1:]):
        return
    report.heading("What else moved")
    header = ["round", "answers unchanged", "KL on them", "people's answers, nats per token", "multiple choice"]
    report.table(header, rows)
    report.text(
        "Nothing here has a constitution in its prompt. Unchanged: greedy answers to the held-out queries that are "
        "the original's word for word; KL to the original in nats per token. People's answers: `eval_references`; "
        "multiple choice: `eval_multiple_choice`, by log-probability per token of the choices."
    )


def report_win_rates(report: RunReport, rounds: list[dict]) -> None:
    """The section on win rates; nothing where no round was judged."""
    judged = [(entry["round"], entry["win_rate"]) for entry in rounds if entry.get("win_rate")]
    if not judged:
        return
    rows = []
    for round_, own in judged:
        shares = [own["contradiction_share"], own["first_place_share"]]
        rows.append([
            round_, own["pairs"], own["wins"], f"{own['ties']} ({own['equal']} of equal texts)", own["losses"],
            own["unread"], *(_rate(own[name]) for name in ("raw", "length_balanced", "length_adjusted")),
            f"{own['tokens']:.0f}", f"{own['original_tokens']:.0f}",
            *("none" if share is None else f"{share:.0%}" for share in shares),
        ])  # fmt: skip
    header = ["round", "pairs", "wins", "ties", "losses", "unread", "win rate", "length-balanced", "at equal length"]
    report.heading("Win rate against the original")
    report.table([*header, "tokens", "original's tokens", "contradictions", "first place"], rows)
    judge = judged[-1][1]["judge"]
    report.text(
        f"Judged by {quoted(judge['model'])} ({judge['mode']}), each pair in both orders: a win is one in both, a tie "
        "half a win; 95 % intervals by query. Contradictions: the share of compared pairs with another winner in each "
        "order; first place: how often the answer shown first is preferred, 50 % for a judge without bias. Balanced: "
        f"the mean over responses that are shorter, equal (within a factor {EQUAL_WITHIN}) and longer than the "
        "original's; at equal length: by a logistic regression."
    )
    breakdown = judged[-1][1].get("breakdown") or {}
    if lines := [[kind, name, own["n"], _rate(own)] for kind, of in breakdown.items() for name, own in of.items()]:
        report.text(f"Round {judged[-1][0]} in parts; the desired constitution is that of all definitions:")
        report.table(["by", "where the prompt had", "pairs", "win rate"], lines)
    for round_, own in judged:
        for remark in _remarks(own):
            report.text(f"Round {round_}: {remark}")


def _remarks(result: dict[str, Any]) -> Iterator[str]:
    """What keeps the numbers of a round from meaning what they seem to."""
    if result["raw"] is None:
        yield "no reply of the judge could be read."
        return
    if (result["contradiction_share"] or 0) > 0.5:
        yield "the judge contradicts itself on most pairs: such ties say that it cannot tell, not that both are equal."
    if count := result["low_mass"]:
        yield f"in {count} questions the judge gave A and B less than 1 % of the probability together."
    strata, adjusted = result["length_balanced"]["strata"], result["length_adjusted"]
    if small := [f"{name} {own['n']}" for name, own in strata.items() if own["n"] < 5]:
        yield f"too few pairs to balance lengths ({', '.join(small)})."
    if adjusted["reason"] is None and adjusted["overlap"] < 0.05:
        yield "one side is nearly always the longer one: the rate at equal length is extrapolated."


def report_absorbed(report: RunReport, folder: Path) -> None:
    """The section on a constitution that was absorbed; nothing where none was."""
    if not (folder / "evaluation.json").exists():
        return
    cases = report.data["absorbed"] = _json(folder / "evaluation.json")
    log = _json(folder / "train" / "trainer_state.json")["log_history"]
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    report.heading("Constitution absorbed")
    names = list(cases["absorbed"]["obedience"])
    rows = []
    for case in cases.values():
        sides = [case["obedience"].get(name, {}).get("definition") for name in names]
        cells = [own and f"{_rate(own['obeyed'])} ({100 * own['difference']['value']:+.0f})" for own in sides]
        rows.append([case["what"], f"{case['length']:.0f}", *cells])
    report.table(["answers by", "tokens", *names], rows)
    report.text(
        f"Answers to {cases['absorbed']['queries']} held-out queries that do as a definition says, 95 % intervals, "
        "and points more than the original without a constitution. In training, KL(last model with the constitution "
        f"|| the same without) went from {losses[0]:.3f} to {losses[-1]:.3f} nats per response token."
    )


def _training_table(report: RunReport, rounds: list[dict]) -> None:
    report.heading("Sampling and training")
    rows = []
    for entry in rounds[1:]:
        sampling, steps = entry["sampling"], entry["steps"]
        dropped = ", ".join(f"{count} {reason}" for reason, count in sampling["dropped"].items()) or "none"
        rows.append([
            entry["round"], sampling["sampled"], sampling["kept"], dropped, sampling["tokens"],
            f"{sampling['seconds']:.0f}", steps[-1]["step"] if steps else 0,
            f"{float(steps[0]['loss']):.3f} → {float(steps[-1]['loss']):.3f}" if steps else "",
            f"{entry['training_seconds']:.0f}" if entry["training_seconds"] else "",
        ])  # fmt: skip
    report.table(["round", "rows sampled", "kept", "dropped", "tokens", "seconds", "steps", "loss", "seconds"], rows)


def _lengths_table(report: RunReport, rounds: list[dict]) -> None:
    report.heading("Response length by constitution (tokens)")
    by_round = [entry["evaluation"]["length_by_constitution"] for entry in rounds]
    shown = list(by_round[0])[:_MOST_LABELS]
    rows = [[label, *(f"{own[label]['mean']:.0f}" if label in own else "" for own in by_round)] for label in shown]
    report.table(["constitution", *(f"round {entry['round']}" for entry in rounds)], rows)
    if len(by_round[0]) > len(shown):
        report.text(f"{len(shown)} of {len(by_round[0])} constitutions shown; all are in report.json.")


def _samples(report: RunReport, first: Path, last: Path) -> None:
    report.heading("Side by side")
    before, after = ({row["id"]: row for row in load_rows(side / "eval_samples.jsonl")} for side in (first, last))
    for key in [key for key in before if key in after][:SIDE_BY_SIDE]:
        old, new = before[key], after[key]
        columns = zip(old["choices"], old["completions"], new["completions"], strict=True)
        report.text(f"**{quoted(old['query'].strip())}**")
        rows = [[constitution_label(choices), completion_text(a), completion_text(b)] for choices, a, b in columns]
        report.table(["constitution", "original", last.name.replace("_", " ")], rows)


def draw_axes(evaluation: dict[str, Any], path: Path) -> None:
    """Two panels: obedience by principle and side, before and after; and the second axis in percent."""
    figure, (first, second) = plots.panels(2)
    sides = [
        (f"{name}\n{side}", own) for name, sides in evaluation["obedience"].items() for side, own in sides.items()
        if side != "all" and "original" in own
    ]  # fmt: skip
    series = {"before": [own["original"] for _, own in sides], "after": [own["obeyed"] for _, own in sides]}
    colours = {"before": plots.BEFORE, "after": plots.COLOURS[0]}
    plots.bar_plot(first, [name for name, _ in sides], series, unit=100, colours=colours, digits="%.0f")
    first.set(ylabel="responses that obey (%)", ylim=(0, 115))
    moved = evaluation.get("side_effects") or {}
    people, choices = moved.get("references", {}), moved.get("multiple_choice", {})
    bars = {
        "answers\nunchanged": (1.0, moved.get("plain_answers", {}).get("unchanged")),
        "multiple\nchoice": (choices.get("original"), choices.get("accuracy")),
    }
    if change := people.get("relative_change"):
        name, value = "nats of people's\nanswers", {key: 1 + own for key, own in change.items()}
        bars[name] = 1.0, value
    shown = {name: own for name, own in bars.items() if own[1] is not None}
    series = {side: [own[i] for own in shown.values()] for i, side in enumerate(("before", "after"))}
    plots.bar_plot(second, list(shown), series, unit=100, colours=colours, digits="%.1f")
    second.set(ylabel="of the original (%); accuracy (%)", ylim=(0, max(115, second.get_ylim()[1])))
    plots.save(figure, path)


def draw_rounds(evaluations: list[dict[str, Any]], path: Path) -> None:
    """Two panels by round: the bound with standard errors under its ceiling log C, and mean length in tokens."""
    rounds = range(len(evaluations))
    figure, (bounds, lengths) = plots.panels(2)
    own = [_estimate(e["mi_bound"]) for e in evaluations]
    fixed = [_estimate(e.get("fixed_responses", e)["mi_bound"]) for e in evaluations]
    plots.line_plot(bounds, {"own responses": (rounds, own), "the original's responses": (rounds, fixed)})
    bounds.axhline(evaluations[0]["max_bound"], color=plots.BEFORE, linestyle=":", label="log C")
    bounds.set(xlabel="round", ylabel="tight bound (nats)", xticks=rounds)
    by_label = [e["length_by_constitution"] for e in evaluations]
    means = {label: [own.get(label, {}).get("mean") for own in by_label] for label in list(by_label[0])[:_LINES]}
    means["all"] = [e["length"] for e in evaluations]
    colours = dict(zip(means, plots.COLOURS[2:], strict=False))
    plots.line_plot(lengths, {label: (rounds, own) for label, own in means.items()}, colours=colours)
    lengths.set(xlabel="round", ylabel="response length (tokens)", xticks=rounds, ylim=(0, None))
    plots.save(figure, path)


def _estimate(value: dict[str, float]) -> dict[str, float]:
    return {"value": value["mean"], "low": value["mean"] - value["se"], "high": value["mean"] + value["se"]}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _pm(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def _rate(value: dict[str, Any] | None) -> str:
    if value is None:
        return "none"
    interval = "" if value["low"] is None else f" [{value['low']:.0%}, {value['high']:.0%}]"
    return f"{value['value']:.0%}{interval}"
