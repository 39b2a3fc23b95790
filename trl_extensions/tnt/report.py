"""The report of a patch, written from what lies in the folder: what it removed, what it left, and at what cost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.generation.sampling import completion_text
from ..core.runs import plots
from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import NOT_TRAINED, Markdown, RunReport, first_true, loss_stayed, quoted
from .search import MoreReport, describe


SIDES = ("original", "patched")
MOVED = 0.8  # of the probability that unwanted tokens had
AXES = ("reduction", "preserved")
SIDE_BY_SIDE, MOST_CANDIDATES = 5, 20
LOGGED = ("loss", "prob/negative", "prob/negative_ref", "kl/negative", "kl/kept", "entropy", "tokens/negative")


def write_report(folder: Path) -> Path:
    """Write `report.md`, `report.json` and `two_axes.png` of a run's folder; returns the path of the first."""
    evaluation, settings, training, state = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("evaluation.json", "settings.json", "training_settings.json", "train/trainer_state.json")
    )
    model, caption = settings["model_name_or_path"], "Left: outputs with something unwanted. Right: what stayed."
    report = RunReport(f"Targeted negative training: {Path(model).name}")
    path = folder / "search.json"
    search = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    point = search["chosen"] if search else {"alpha": training["alpha"], "steps": state["global_step"]}
    report.data = {"model": model, "variant": training["variant"], "alpha": point["alpha"]} | evaluation
    report.verdict(*verdict(evaluation, state["log_history"]), in_numbers(evaluation))
    draw_two_axes(evaluation, folder / "two_axes.png")
    report.figure("two_axes.png", caption)
    _write_axes(report, evaluation)
    if search:
        _write_search(report, search, folder)
    report.heading("How it was made")
    took = [f" in {entry['train_runtime']:.0f} seconds" for entry in state["log_history"] if "train_runtime" in entry]
    report.text(
        f"`variant: {training['variant']}`, `alpha: {point['alpha']:g}`, learning rate "
        f"{training['learning_rate']:g}, {point['steps']} steps{'' if search else ''.join(took[:1])}."
    )
    annotation = folder / "original" / "annotation.json"
    if not training["dataset_name"] and annotation.exists():
        made = json.loads(annotation.read_text(encoding="utf-8"))
        report.text(f"{made['with_span']} of {made['rows']} sampled outputs had a span, {made['spans']} spans in all.")
    more = folder / "original" / "more.json"
    if more.exists():
        report.text(MoreReport(**json.loads(more.read_text(encoding="utf-8"))).summary)
    if steps := [entry for entry in state["log_history"] if "loss" in entry]:
        cells = [[f"{float(entry[name]):.4f}" if name in entry else "" for name in LOGGED] for entry in steps]
        rows = [[f"step {steps[place]['step']}", *cells[place]] for place in (0, -1)]
        report.table(["log entry", *LOGGED], rows)
    _write_samples(report, folder)
    return report.write(folder)


def verdict(evaluation: dict[str, Any], log: Sequence[Mapping[str, Any]] = ()) -> tuple[str, str]:
    """What came of a patch, and what to do: its kind, and a sentence. Clear is what the 95 % intervals set apart."""
    kinds = [kind for kind in ("greedy", "sampled") if all(kind in evaluation[side] for side in SIDES)]
    kind = next((kind for kind in kinds if evaluation["original"][kind]["share"]["value"]), "greedy")
    before, after = (evaluation[side][kind]["share"] for side in SIDES)
    fell, kept = after["high"] < before["low"], evaluation["preservation"]["clean"]["exact_match"]["value"]
    was, now = (evaluation["divergence"][name] for name in ("prob_negative_original", "prob_negative"))
    return first_true(
        ("nothing_unwanted", not before["value"], "No held-out answer of the original has anything unwanted, so the "
         "first axis measures nothing: give `prompts` that bring it out, or more of them (`num_eval_prompts`)."),
        ("at_a_price", fell and kept is not None and kept < 0.5, "It worked, at a price: clearly less is unwanted, "
         "but most clean answers changed. Lower `alpha` or `num_train_epochs`, or set `min_preserved`."),
        ("removed", fell, "It worked: clearly less is unwanted than before."),
        ("more", after["low"] > before["high"], "It got worse, more is unwanted than before: lower `learning_rate`."),
        ("loss", loss_stayed(log), NOT_TRAINED),
        ("hardly_moved", was and now > MOVED * was, "It hardly moved the model: unwanted tokens are nearly as likely "
         "as before. Raise `num_train_epochs`, `learning_rate` or `alpha`, or mark more (`min_marked`)."),
        ("too_few", True, "Unwanted tokens became less likely, but the held-out answers do not show it clearly: "
         "hold out more (`num_eval_prompts`), or train more (`num_train_epochs`, `alpha`)."),
    )  # fmt: skip


def in_numbers(evaluation: dict[str, Any]) -> str:
    """Both axes in a few sentences."""
    before, after = (evaluation[side]["greedy"]["share"] for side in SIDES)
    clean = evaluation["preservation"]["clean"]
    off = f", a reduction of {1 - after['value'] / before['value']:.0%}" if before["value"] else ""
    sentences = [
        f"Of {evaluation['patched']['greedy']['n']} held-out greedy outputs {_percent(before)} had something unwanted "
        f"before and {_percent(after)} after{off}."
    ]
    if "sampled" in evaluation["patched"] and "sampled" in evaluation["original"]:
        pair = (_percent(evaluation[side]["sampled"]["share"]) for side in SIDES)
        sentences.append("Random samples: {} before, {} after.".format(*pair))
    if clean["n"]:
        sentences.append(
            f"Of the {clean['n']} greedy outputs that were clean before, {_percent(clean['exact_match'])} are "
            f"unchanged word for word (BLEU {clean['bleu']:.0f}, ROUGE-L {clean['rouge_l']:.2f}), at a KL of "
            f"{_number(evaluation['divergence']['kl_clean'])} nats per token from the original."
        )
    return " ".join(sentences)


def _percent(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "n/a"
    interval = f" ({100 * estimate['low']:.0f} to {100 * estimate['high']:.0f})" if estimate["low"] is not None else ""
    return f"{estimate['value']:.1%}{interval}"


def _number(estimate: dict[str, float | None], digits: int = 4) -> str:
    if estimate["value"] is None:
        return "n/a"
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.{digits}f}" + ("" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})")


def draw_two_axes(evaluation: dict[str, Any], path: Path) -> Any:
    """The unwanted rate before and after, and what is left of the original's behaviour, in percent: figure and PNG."""
    figure, (left, right) = plots.panels(2)
    kinds = [kind for kind in ("greedy", "sampled") if all(kind in evaluation[side] for side in SIDES)]
    names = [f"{kind}\n(n = {evaluation['patched'][kind]['n']})" for kind in kinds]
    rates = {side: [evaluation[side][kind]["share"] for kind in kinds] for side in SIDES}
    plots.bar_plot(left, names, rates, unit=100, colours={"original": plots.BEFORE})
    left.set(title="unwanted: should fall", ylabel="outputs with an unwanted span (%)", ylim=(0, None))
    clean = evaluation["preservation"]["clean"]
    bleu = None if clean["bleu"] is None else clean["bleu"] / 100
    likeness = [clean["exact_match"], bleu, clean["rouge_l"], clean["first_difference"]]
    names = ["unchanged", "BLEU", "ROUGE-L", "words before\na difference"]
    plots.bar_plot(right, names, {"": likeness}, unit=100, colours={"": plots.COLOURS[2]})
    right.set(title="preserved: should stay at 100", ylabel="likeness to the original (%)", ylim=(0, 115))
    right.set_xlabel(f"{clean['n']} greedy outputs that were clean")
    return plots.save(figure, path)


def _write_axes(report: RunReport, evaluation: dict[str, Any]) -> None:
    kept, divergence, perplexity = (evaluation[name] for name in ("preservation", "divergence", "perplexity"))
    report.heading("Unwanted outputs, on held-out prompts")
    rows = [
        [side, kind, entry["n"], _percent(entry["share"]), _number(entry["spans_per_1000_tokens"], 2)]
        for kind in ("greedy", "sampled")
        for side in SIDES
        if (entry := evaluation[side].get(kind))
    ]
    report.table(["model", "decoding", "outputs", "with a span", "spans per 1,000 tokens"], rows)
    if named := evaluation.get("candidates"):
        report.text("What of it is left, on greedy outputs; weighed by severity, 1 where nobody gave one:")
        cells = [[c["label"], c["severity"], c["original"], c["patched"]] for c in named[:MOST_CANDIDATES]]
        if any(c["severity"] != 1 for c in named):
            cells.append(["all, weighed", "", *(evaluation[side]["greedy"]["severity"] for side in SIDES)])
        header = ["unwanted", "severity", "outputs with it before", "after", "taken off"]
        report.table(header, [[label, f"{s:g}" if s else "", *_before_after(*own)] for label, s, *own in cells])
    if divergence["prob_negative_original"] is not None:
        report.text(
            f"Where the original wrote an unwanted token, the patched model gives it a probability of "
            f"{divergence['prob_negative']:.3f}, the original {divergence['prob_negative_original']:.3f}."
        )
    report.heading("What was preserved")
    if (clean := kept["clean"])["n"]:
        report.table(
            ["clean greedy outputs", "unchanged word for word", "BLEU", "ROUGE-L", "words before a difference"],
            [[clean["n"], _percent(clean["exact_match"]), f"{clean['bleu']:.1f}", clean["rouge_l"],
              f"{clean['first_difference']:.0%}"]],
        )  # fmt: skip
    kls = [[_number(divergence["kl_target"]), _number(divergence["kl_clean"])]]
    report.table(["KL to the ideal target", "KL to the original, clean outputs"], kls)
    report.text("Nats per token, over the original's greedy outputs; 95 % intervals.")
    report.table(
        ["model", "tokens", "cut off", "seq-rep-4", "distinct-2", "perplexity under the original"],
        [
            [side, f"{own['length']:.0f}", f"{own['truncated']:.0%}", own["seq_rep_4"], own["distinct_2"],
             f"{perplexity[side]:.2f}"]
            for side, own in ((side, kept[side]) for side in SIDES)
        ],
    )  # fmt: skip


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    off = f"{1 - after['value'] / before['value']:.0%}" if before["value"] else ""
    return [_percent(before), _percent(after), off]


def _write_search(report: RunReport, search: dict[str, Any], folder: Path) -> None:
    """The frontier that the strength was chosen on, what was chosen, and what ended the search."""
    report.heading("How strong: the validation prompts")
    chosen, points = search["chosen"], search["points"]
    report.text(f"{search['words']} Chosen: {describe(chosen)}.")
    report.text(
        f"Of {chosen['outputs']} greedy answers {chosen['marked_before']} had something unwanted before: one of "
        f"them is {1 / chosen['marked_before']:.0%}. The point is the best of {len(points)} on these answers, so that "
        "its numbers here are optimistic; those of the held-out prompts above are not."
    )
    report.data["search"] = search
    draw_frontier(search, folder / "frontier.png")
    n = "Greedy answers to prompts held off the training ones: a line a round, a mark a scale of its adapter."
    report.figure("frontier.png", n)
    rows = [
        [p["round"], p["steps"], f"{p['alpha']:g}", f"{p['scale']:g}", *(_percent(p[name]) for name in AXES),
         "" if p["kl"] is None else f"{p['kl']:.4f}", "chosen" if p == chosen else ""]
        for p in points
    ]  # fmt: skip
    report.table(["round", "steps", "alpha", "scale", "taken off", "unchanged", "KL", ""], rows)


def draw_frontier(search: dict[str, Any], path: Path) -> Any:
    """Reduction against preservation in percent with their intervals, a line a round, the targets and what was chosen:
    figure and PNG."""
    figure, (axes,) = plots.panels(width=6.5, height=4.2)
    for number in dict.fromkeys(point["round"] for point in search["points"]):
        own = sorted((p for p in search["points"] if p["round"] == number), key=lambda point: point["scale"])
        x, y = ([[100 * p[name][key] for p in own] for key in ("value", "low", "high")] for name in AXES)
        ends = [[[abs(v - e) for v, e in zip(a[0], a[i], strict=True)] for i in (1, 2)] for a in (x, y)]
        label, colour = f"round {number}, alpha {own[0]['alpha']:g}", plots.COLOURS[(number - 1) % len(plots.COLOURS)]
        axes.errorbar(x[0], y[0], ends[1], ends[0], label=label, color=colour, marker="o", elinewidth=0.6)
        for point, at, height in zip(own, x[0], y[0], strict=True):
            axes.annotate(f"{point['scale']:g}", (at, height), (4, 4), textcoords="offset points", fontsize=7)
    chosen = [100 * search["chosen"][name]["value"] for name in AXES]
    axes.plot(*chosen, "o", markersize=13, fillstyle="none", color="black", label="chosen")
    for name, line in (("reduction", axes.axvline), ("preserved", axes.axhline)):
        if search["target"][name] is not None:
            line(100 * search["target"][name], color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="unwanted outputs taken off (%)", ylabel="clean outputs unchanged (%)")
    return plots.save(figure, path)


def _write_samples(report: RunReport, folder: Path) -> None:
    before, after = (
        {row["id"]: row for row in read_jsonl(folder / side / "eval_annotated.jsonl") if row["sample"] == 0}
        for side in SIDES
    )
    groups: dict[str, list[list[str]]] = {"Unwanted before": [], "Clean before, and changed": []}
    for old, new in ((row, after[key]) for key, row in before.items() if key in after):
        asked = old["prompt"] if isinstance(old["prompt"], str) else old["prompt"][-1]["content"]
        if old["negative_spans"]:
            groups["Unwanted before"].append([asked, _marked(old), _marked(new)])
        elif completion_text(old["completion"]) != completion_text(new["completion"]):
            groups["Clean before, and changed"].append([asked, _marked(old), _marked(new)])
    for heading, rows in groups.items():
        if rows:
            report.heading(heading)
            report.table(["prompt", *SIDES], rows[:SIDE_BY_SIDE])


def _marked(row: dict[str, Any]) -> Markdown:
    """The output with its spans in bold."""
    text, parts, end = completion_text(row["completion"]), [], 0
    for start, stop in row["negative_spans"]:
        parts += [quoted(text[end:start]), f"**{quoted(text[start:stop])}**"]
        end = stop
    return Markdown("".join([*parts, quoted(text[end:])]))
