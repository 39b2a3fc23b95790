"""The report of a patch: what it removed, what it left alone, and at what cost; written from what lies in the folder."""

import json
from pathlib import Path
from typing import Any

from ..core.generation.sampling import completion_text
from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import RunReport


SIDE_BY_SIDE = 5


def write_report(folder: Path) -> Path:
    """Write `report.md`, `report.json` and `two_axes.png` of a run's folder; returns the path of the first.

    Intervals are 95 %: Wilson's for shares, a bootstrap over prompts for KL and spans per 1,000 tokens. KL in nats per
    token.
    """
    evaluation, settings, training = (
        _read(folder / name) for name in ("evaluation.json", "settings.json", "training_settings.json")
    )
    model = settings["model_name_or_path"]
    report = RunReport(f"Targeted negative training: {Path(model).name}")
    report.data = {"model": model, "variant": training["variant"], "alpha": training["alpha"]} | evaluation
    report.text(verdict(evaluation))
    draw_two_axes(evaluation, folder / "two_axes.png")
    report.figure(
        "two_axes.png", "Left: outputs with something unwanted. Right: how like the original's clean outputs."
    )
    _unwanted_table(report, evaluation)
    _preservation_table(report, evaluation)
    _making_table(report, folder, training)
    _samples(report, folder)
    return report.write(folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def verdict(evaluation: dict[str, Any]) -> str:
    """Both axes in a few sentences."""
    before, after = (evaluation[side]["greedy"]["share"] for side in ("original", "patched"))
    clean = evaluation["preservation"]["clean"]
    off = f", a reduction of {1 - after['value'] / before['value']:.0%}" if before["value"] else ""
    sentences = [
        f"Of {evaluation['patched']['greedy']['n']} held-out greedy outputs {_percent(before)} had something unwanted "
        f"before and {_percent(after)} after{off}."
    ]
    if "sampled" in evaluation["patched"] and "sampled" in evaluation["original"]:
        pair = (_percent(evaluation[side]["sampled"]["share"]) for side in ("original", "patched"))
        sentences.append("Random samples: {} before, {} after.".format(*pair))
    if clean["n"]:
        sentences.append(
            f"Of the {clean['n']} greedy outputs that were clean before, {_percent(clean['exact_match'])} are "
            f"unchanged word for word (BLEU {clean['bleu']:.0f}, ROUGE-L {clean['rouge_l']:.2f}), at a KL of "
            f"{_number(evaluation['divergence']['kl_clean'])} nats per token from the original."
        )
    return " ".join(sentences)


def _percent(estimate: dict[str, float | None]) -> str:
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
    from matplotlib.figure import Figure

    sides = {"original": "#999999", "patched": "#0072B2"}
    kinds = [kind for kind in ("greedy", "sampled") if all(kind in evaluation[side] for side in sides)]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for shift, (side, colour) in zip((-0.19, 0.19), sides.items(), strict=True):
        shares = [evaluation[side][kind]["share"] for kind in kinds]
        _bars(left, [place + shift for place in range(len(kinds))], shares, 0.34, color=colour, label=side)
    counts = [evaluation["patched"][kind]["n"] for kind in kinds]
    left.set_xticks(range(len(kinds)), [f"{kind}\n(n = {n})" for kind, n in zip(kinds, counts, strict=True)])
    left.set(title="unwanted: should fall", ylabel="outputs with an unwanted span (%)", ylim=(0, None))
    left.legend(frameon=False)
    clean = evaluation["preservation"]["clean"]
    if clean["n"]:
        values = [clean["exact_match"]["value"], clean["bleu"] / 100, clean["rouge_l"], clean["first_difference"]]
        estimates = [clean["exact_match"], *({"value": value} for value in values[1:])]
        _bars(right, list(range(4)), estimates, 0.6, color="#009E73")
    right.set_xticks(range(4), ["unchanged\nword for word", "BLEU", "ROUGE-L", "words before\na difference"])
    right.set(title="preserved: should stay at 100", ylabel="likeness to the original (%)", ylim=(0, 105))
    right.set_xlabel(f"{clean['n']} greedy outputs that were clean")
    figure.savefig(path, dpi=150, format="png")
    return figure


def _bars(axes: Any, places: list[float], estimates: list[dict[str, Any]], width: float, **style: Any) -> None:
    heights = [100 * (estimate["value"] or 0.0) for estimate in estimates]
    axes.bar(places, heights, width, **style)
    for place, height, estimate in zip(places, heights, estimates, strict=True):
        if estimate.get("high") is not None:
            ends = [[height - 100 * estimate["low"]], [100 * estimate["high"] - height]]
            axes.errorbar(place, height, ends, color="0.2", capsize=3, linewidth=1)


def _unwanted_table(report: RunReport, evaluation: dict[str, Any]) -> None:
    report.heading("Unwanted outputs, on held-out prompts")
    rows = [
        [side, kind, entry["n"], _percent(entry["share"]), _number(entry["spans_per_1000_tokens"], 2)]
        for kind in ("greedy", "sampled")
        for side in ("original", "patched")
        if (entry := evaluation[side].get(kind))
    ]
    report.table(["model", "decoding", "outputs", "with a span", "spans per 1,000 tokens"], rows)
    divergence = evaluation["divergence"]
    if divergence["prob_negative_original"] is not None:
        report.text(
            f"Where the original wrote an unwanted token, the patched model gives it a probability of "
            f"{divergence['prob_negative']:.3f}, the original {divergence['prob_negative_original']:.3f}."
        )


def _preservation_table(report: RunReport, evaluation: dict[str, Any]) -> None:
    report.heading("What was preserved")
    kept, divergence, perplexity = (evaluation[name] for name in ("preservation", "divergence", "perplexity"))
    clean = kept["clean"]
    if clean["n"]:
        report.table(
            ["clean greedy outputs", "unchanged word for word", "BLEU", "ROUGE-L", "words before a difference"],
            [[clean["n"], _percent(clean["exact_match"]), f"{clean['bleu']:.1f}", clean["rouge_l"],
              f"{clean['first_difference']:.0%}"]],
        )  # fmt: skip
    report.table(
        ["KL to the ideal target", "KL to the original, clean outputs"],
        [[_number(divergence["kl_target"]), _number(divergence["kl_clean"])]],
    )
    report.text("Nats per token, over the original's greedy outputs; 95 % intervals.")
    report.table(
        ["model", "tokens", "cut off", "seq-rep-4", "distinct-2", "perplexity under the original"],
        [
            [side, f"{kept[side]['length']:.0f}", f"{kept[side]['truncated']:.0%}", kept[side]["seq_rep_4"],
             kept[side]["distinct_2"], f"{perplexity[side]:.2f}"]
            for side in ("original", "patched")
        ],
    )  # fmt: skip


def _making_table(report: RunReport, folder: Path, training: dict[str, Any]) -> None:
    report.heading("How it was made")
    state = _read(folder / "train" / "trainer_state.json")
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    seconds = next((entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry), None)
    report.text(
        f"`variant: {training['variant']}`, `alpha: {training['alpha']}`, learning rate "
        f"{training['learning_rate']:g}, {state['global_step']} steps"
        + (f" in {float(seconds):.0f} seconds." if seconds else ".")
    )
    annotation = folder / "original" / "annotation.json"
    if not training["dataset_name"] and annotation.exists():
        made = _read(annotation)
        report.text(f"{made['with_span']} of {made['rows']} sampled outputs had a span, {made['spans']} spans in all.")
    names = ("loss", "prob/negative", "prob/negative_ref", "kl/negative", "kl/kept", "entropy", "tokens/negative")
    if steps:
        report.table(
            ["log entry", *names],
            [
                [f"step {entry['step']}", *(f"{float(entry[name]):.4f}" if name in entry else "" for name in names)]
                for entry in (steps[0], steps[-1])
            ],
        )


def _samples(report: RunReport, folder: Path) -> None:
    before, after = (
        {row["id"]: row for row in read_jsonl(folder / side / "eval_annotated.jsonl") if row["sample"] == 0}
        for side in ("original", "patched")
    )
    shared = [key for key in before if key in after]
    texts = {key: [completion_text(side[key]["completion"]) for side in (before, after)] for key in shared}
    clean = [key for key in shared if not before[key]["negative_spans"]]
    groups = {
        "Unwanted before": [key for key in shared if before[key]["negative_spans"]],
        "Clean before, and changed": [key for key in clean if texts[key][0] != texts[key][1]],
    }
    for heading, keys in groups.items():
        if keys:
            report.heading(heading)
            report.table(
                ["prompt", "original", "patched"],
                [[_asked(before[key]), _marked(before[key]), _marked(after[key])] for key in keys[:SIDE_BY_SIDE]],
            )


def _asked(row: dict[str, Any]) -> str:
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


def _marked(row: dict[str, Any]) -> str:
    """The output with its spans in bold."""
    text, parts, end = completion_text(row["completion"]), [], 0
    for start, stop in row["negative_spans"]:
        parts += [text[end:start], f"**{text[start:stop]}**"]
        end = stop
    return "".join([*parts, text[end:]])
