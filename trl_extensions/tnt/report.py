"""The report of a patch: what it removed, what it left alone, and at what cost."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.generation.sampling import completion_text
from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import RunReport
from .figures import draw_two_axes


if TYPE_CHECKING:
    from .run import TNTRun


SIDE_BY_SIDE = 5


def write_run_report(run: "TNTRun") -> Path:
    """Write `report.md`, `report.json` and `two_axes.png` from what the stages left; returns the path of the first.

    Intervals are 95 %: Wilson's for shares, a bootstrap over prompts for KL and spans per 1,000 tokens. KL in nats per
    token.
    """
    evaluation = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    report = RunReport(f"Targeted negative training: {Path(run.original).name}")
    report.data = {"model": run.original, "variant": run.config.variant, "alpha": run.config.alpha} | evaluation
    report.text(verdict(evaluation))
    draw_two_axes(evaluation, run.folder / "two_axes.png")
    report.figure(
        "two_axes.png", "Left: outputs with something unwanted. Right: how like the original's clean outputs."
    )
    _unwanted_table(report, evaluation)
    _preservation_table(report, evaluation)
    _making_table(report, run)
    _samples(report, run)
    return report.write(run.folder)


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
    if estimate["low"] is None:
        return f"{estimate['value']:.{digits}f}"
    return f"{estimate['value']:.{digits}f} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


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


def _making_table(report: RunReport, run: "TNTRun") -> None:
    report.heading("How it was made")
    state = json.loads((run.folder / "train" / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    seconds = next((entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry), None)
    report.text(
        f"`variant: {run.config.variant}`, `alpha: {run.config.alpha}`, learning rate {run.config.learning_rate:g}, "
        f"{state['global_step']} steps" + (f" in {float(seconds):.0f} seconds." if seconds else ".")
    )
    annotation = run.folder / "original" / "annotation.json"
    if not run.args.dataset_name and annotation.exists():
        made = json.loads(annotation.read_text(encoding="utf-8"))
        report.text(f"{made['with_span']} of {made['rows']} sampled outputs had a span, {made['spans']} spans in all.")
    names = ("loss", "prob/negative", "prob/negative_ref", "kl/negative", "kl/kept", "entropy", "tokens/negative")
    if steps:
        report.table(
            ["log entry", *names],
            [[f"step {entry['step']}", *(_logged(entry, name) for name in names)] for entry in (steps[0], steps[-1])],
        )


def _logged(entry: dict[str, Any], name: str) -> str:
    return f"{float(entry[name]):.4f}" if name in entry else ""


def _samples(report: RunReport, run: "TNTRun") -> None:
    before, after = (
        {row["id"]: row for row in read_jsonl(run.folder / side / "eval_annotated.jsonl") if row["sample"] == 0}
        for side in ("original", "patched")
    )
    shared = [key for key in before if key in after]
    groups = {
        "Unwanted before": [key for key in shared if before[key]["negative_spans"]],
        "Clean before, and changed": [
            key for key in shared if not before[key]["negative_spans"] and _text(before[key]) != _text(after[key])
        ],
    }
    for heading, keys in groups.items():
        if keys:
            report.heading(heading)
            report.table(
                ["prompt", "original", "patched"],
                [[_asked(before[k]), _marked(before[k]), _marked(after[k])] for k in keys[:SIDE_BY_SIDE]],
            )


def _text(row: dict[str, Any]) -> str:
    return completion_text(row["completion"])


def _asked(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _marked(row: dict[str, Any]) -> str:
    """The output with its spans in bold."""
    text, parts, end = _text(row), [], 0
    for start, stop in row["negative_spans"]:
        parts += [text[end:start], f"**{text[start:stop]}**"]
        end = stop
    return "".join([*parts, text[end:]])
