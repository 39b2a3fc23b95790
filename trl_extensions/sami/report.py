"""The report of a SAMI run: what the rounds changed, and at what cost."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.runs.jsonl import read_jsonl
from ..core.runs.report import RunReport
from .principles import constitution_label
from .sampling import load_rows
from .win_rate import report_win_rates


if TYPE_CHECKING:
    from .run import SAMIRun


SIDE_BY_SIDE = 6


def write_run_report(run: "SAMIRun") -> Path:
    """Write `report.md`, `report.json` and `rounds.png` from what the stages left; returns the path of the first.

    Bounds are in nats (of at most log C), KL in nats per response token, lengths in tokens; the +- are standard errors
    over held-out queries.
    """
    rounds = [_round_data(run, round_) for round_ in range(run.args.rounds + 1)]
    report = RunReport(f"SAMI: {Path(run.model_args.model_name_or_path).name}")
    report.data = {"model": run.model_args.model_name_or_path, "rounds": rounds}
    _verdict(report, rounds)
    _rounds_table(report, rounds)
    draw_rounds([entry["evaluation"] for entry in rounds], run.folder / "rounds.png")
    report.figure(
        "rounds.png",
        "Mutual information bound (with standard errors) and response length by round; 0 is the original.",
    )
    report_win_rates(report, rounds)
    _training_table(report, rounds)
    _lengths_table(report, rounds)
    _samples(report, run)
    return report.write(run.folder)


def summary_of(report: Path) -> str:
    """What a report says first: the paragraph under its title, and the table by round."""
    paragraphs = report.read_text(encoding="utf-8").split("\n\n")
    table = next(paragraph for paragraph in paragraphs if paragraph.startswith("| round"))
    return f"{paragraphs[1]}\n\n{table}"


def _round_data(run: "SAMIRun", round_: int) -> dict[str, Any]:
    folder = run.round_folder(round_)
    data = {"round": round_, "evaluation": json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))}
    if round_:
        data["sampling"] = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
        state = json.loads((folder / "train" / "trainer_state.json").read_text(encoding="utf-8"))
        data["steps"] = [entry for entry in state["log_history"] if "loss" in entry]
        data["training_seconds"] = next(
            (entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry), None
        )
        guard = folder / "train" / "guard.jsonl"
        data["guard"] = read_jsonl(guard) if guard.exists() else []
        judged = folder / "win_rate.json"
        if judged.exists():
            data["win_rate"] = json.loads(judged.read_text(encoding="utf-8"))
    return data


def _verdict(report: RunReport, rounds: list[dict]) -> None:
    first, last = rounds[0]["evaluation"], rounds[-1]["evaluation"]
    rise = last["mi_bound"]["mean"] - first["mi_bound"]["mean"]
    error = math.hypot(last["mi_bound"]["se"], first["mi_bound"]["se"])
    report.data["rise"] = {"mi_bound": rise, "se": error}
    report.text(
        f"On {last['num_queries']} held-out queries the mutual information bound went from "
        f"{_pm(first['mi_bound'])} to {_pm(last['mi_bound'])} nats (at most {last['max_bound']:.2f}): a change of "
        f"{rise:+.3f} ± {error:.3f}{', ' + _clarity(rise, error) if error else ''}. KL to the original is "
        f"{last['kl']['mean']:.3f} nats per token, responses went from {first['length']:.0f} to {last['length']:.0f} "
        f"tokens, distinct-2 from {first['distinct_2']:.2f} to {last['distinct_2']:.2f}."
    )
    for entry in rounds[1:]:
        for check in entry["guard"]:
            if check.get("stopped"):
                report.text(f"**Round {entry['round']} was stopped at step {check['step']}:** {check['stopped']}")


def _clarity(rise: float, error: float) -> str:
    return "clear of twice its standard error" if abs(rise) > 2 * error else "within twice its standard error"


def _queries(evaluation: dict) -> str:
    empty = evaluation["num_empty"]
    return f"{evaluation['num_queries']}{f' ({empty} empty)' if empty else ''}"


def _pm(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def _rounds_table(report: RunReport, rounds: list[dict]) -> None:
    report.heading("Held-out queries, by round")
    header = [
        "round",
        "queries",
        "MI bound",
        "MI bound (sums)",
        "same responses*",
        "which constitution?",
        "KL",
        "tokens",
    ]
    rows = []
    for entry in rounds:
        e = entry["evaluation"]
        fixed = e.get("fixed_responses", e)
        rows.append([
            entry["round"], _queries(e), _pm(e["mi_bound"]), _pm(e["mi_bound_sum"]), _pm(fixed["mi_bound"]),
            f"{e['accuracy_columns']['mean']:.0%}", e["kl"]["mean"], f"{e['length']:.0f}",
        ])  # fmt: skip
    report.table([*header, "cut off", "distinct-2"], [
        [*row, f"{entry['evaluation']['truncated']:.0%}", entry["evaluation"]["distinct_2"]]
        for row, entry in zip(rows, rounds, strict=True)
    ])  # fmt: skip
    report.text(
        '*The bound on the original\'s responses, the same texts in every round. "Which constitution?" is how often '
        "the model gives a response the highest probability under the constitution it was written for."
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
    labels = list(rounds[0]["evaluation"]["length_by_constitution"])
    rows = []
    for label in labels[:16]:
        values = [entry["evaluation"]["length_by_constitution"].get(label) for entry in rounds]
        rows.append([label, *(f"{value['mean']:.0f}" if value else "" for value in values)])
    report.table(["constitution", *(f"round {entry['round']}" for entry in rounds)], rows)
    if len(labels) > 16:
        report.text(f"16 of {len(labels)} constitutions shown; all are in report.json.")


def _samples(report: RunReport, run: "SAMIRun") -> None:
    report.heading("Side by side")
    last = run.args.rounds
    before = {row["id"]: row for row in load_rows(run.round_folder(0) / "eval_samples.jsonl")}
    after = {row["id"]: row for row in load_rows(run.round_folder(last) / "eval_samples.jsonl")}
    shared = [key for key in before if key in after][:SIDE_BY_SIDE]
    for key in shared:
        old, new = before[key], after[key]
        report.text(f"**{old['query'].strip()}**")
        report.table(
            ["constitution", "original", f"round {last}"],
            [
                [constitution_label(choices), _short(_text(a)), _short(_text(b))]
                for choices, a, b in zip(old["choices"], old["completions"], new["completions"], strict=True)
            ],
        )


def _text(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _short(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def draw_rounds(evaluations: list[dict[str, Any]], path: Path) -> None:
    """Two panels by round: the bound with standard errors under its ceiling log C, and mean length in tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rounds = range(len(evaluations))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, label in (("mi_bound", "own responses"), ("fixed", "the original's responses")):
        values = [e.get("fixed_responses", e)["mi_bound"] if name == "fixed" else e["mi_bound"] for e in evaluations]
        left.errorbar(
            rounds, [v["mean"] for v in values], [v["se"] for v in values], marker="o", capsize=3, label=label
        )
    left.axhline(evaluations[0]["max_bound"], color="gray", linestyle=":", label="log C")
    left.set(xlabel="round", ylabel="MI bound (nats)", xticks=list(rounds))
    left.legend(fontsize=8)
    for label in list(evaluations[0]["length_by_constitution"])[:4]:
        lengths = [e["length_by_constitution"].get(label, {"mean": math.nan})["mean"] for e in evaluations]
        right.plot(rounds, lengths, marker=".", linewidth=1, label=label)
    right.plot(rounds, [e["length"] for e in evaluations], marker="o", color="black", label="all")
    right.set(xlabel="round", ylabel="response length (tokens)", xticks=list(rounds), ylim=(0, None))
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
