"""The table of what was measured, short enough for the end of a log."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def write_report(output: Path) -> str:
    """Write and return `gpu.md`."""
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["what"]].append(row)
    parts = [_ceilings(by_kind["ceiling"]), _steps(by_kind["step"], by_kind["ceiling"]), _chunks(by_kind["step"])]
    parts.append(_checks(by_kind["check"]))
    parts += [_trained(by_kind["train"]), _failures(by_kind["error"], by_kind["skipped"]), _times(rows)]
    text = "\n".join(part for part in parts if part)
    (output / "gpu.md").write_text(text + "\n", encoding="utf-8")
    return text


def _ceilings(rows: list[dict[str, Any]]) -> str:
    return "Ceilings: " + "; ".join(f"{row['name']} {row['value']:.3g}" for row in rows) + "\n" if rows else ""


def _steps(rows: list[dict[str, Any]], ceilings: list[dict[str, Any]]) -> str:
    """ms: median (lowest to highest); GB: peak beyond what was there before the step; MFU: counted FLOPs of matrix
    products over those of a large bfloat16 product in the same time."""
    rows = [row for row in rows if "head" not in row["case"]]
    if not rows:
        return ""
    highest = next((row["value"] for row in ceilings if row["name"].startswith("bfloat16")), None)
    lines = ["|case|path|ms|k tok/s|GB|MFU|loss|", "|---|---|---|---|---|---|---|"]
    last = None
    for row in rows:
        rate = row["flops"] and row["flops"] / row["ms"] / 1e9
        share = f"{rate / highest:.0%}" if rate and highest else ""
        first = f" (first {row['first_s']:.0f} s)" if row["first_s"] > 3 else ""
        cells = [
            row["case"] if row["case"] != last else "", row["path"] + first,
            f"{row['ms']:.4g} ({row['low']:.4g}-{row['high']:.4g})", f"{row['tokens'] / row['ms']:.3g}",
            _gigabytes(row), share, f"{row['loss']:.4g}",
        ]  # fmt: skip
        lines.append("|" + "|".join(cells) + "|")
        last = row["case"]
    return "\n".join(lines) + "\n"


def _chunks(rows: list[dict[str, Any]]) -> str:
    """Losses from states alone, by the size of a chunk."""
    own: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if "head" in row["case"]:
            own[row["path"]][row["case"].rpartition(", ")[2]] = row
    if not own:
        return ""
    lines = ["|loss of states, chunk|trained head: ms|GB|frozen head: ms|GB|", "|---|---|---|---|---|"]
    for path, by_head in own.items():
        both = [by_head.get(head) for head in ("trained head", "frozen head")]
        cells = [cell for row in both for cell in ((f"{row['ms']:.4g}", _gigabytes(row)) if row else ("", ""))]
        lines.append("|" + "|".join([path, *cells]) + "|")
    return "\n".join(lines) + "\n"


def _gigabytes(row: dict[str, Any]) -> str:
    return "" if row["gb"] is None else f"{row['gb']:.2f}"


def _checks(rows: list[dict[str, Any]]) -> str:
    """The worst of each group, and all that are out of tolerance."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["case"], row["name"].partition(":")[0] if row["case"] != "kernels" else _kernel(row)].append(row)
    lines = []
    for (case, name), own in groups.items():
        worst = max(own, key=lambda row: (not row["ok"], row["difference"] / max(row["tolerance"], 1e-9)))
        state = "ok" if worst["ok"] else "NO"
        lines.append(f"- {state} {case}, {name}: {worst['difference']:.1e} of {worst['tolerance']:.0e} "
                     f"({worst['name'].rpartition(': ')[2]}; {len(own)} checks)")  # fmt: skip
    if not lines:
        return ""
    good = sum(row["ok"] for row in rows)
    return "\n".join([f"Checks, relative differences: {good} of {len(rows)} within tolerance", "", *lines]) + "\n"


def _kernel(row: dict[str, Any]) -> str:
    name = row["name"].partition(":")[0]
    return name.replace(" plain ", " ").replace(" scaled and capped ", " ")


def _trained(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    bad = [row["name"] for row in rows if not row["ok"]]
    good = sum(row["ok"] for row in rows)
    return f"Trained and evaluated: {good} of {len(rows)}" + (f"; NOT: {', '.join(bad)}" if bad else "") + "\n"


def _failures(errors: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> str:
    lines = [f"- FAILED {row['case']}, {row['path']}: {row['error'][:160]}" for row in errors[:20]]
    lines += [f"- skipped {row['case']}: {row['reason']}" for row in skipped]
    return "\n".join(lines) + "\n" if lines else ""


def _times(rows: list[dict[str, Any]]) -> str:
    begun = {row["case"]: row["time"] for row in rows if row["what"] == "begin"}
    ended = {row["case"]: row["time"] for row in rows if row["what"] == "end"}
    return "Seconds: " + ", ".join(f"{case} {ended[case] - begun[case]:.0f}" for case in begun if case in ended)
