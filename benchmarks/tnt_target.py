"""Reach a target or say why not: targeted negative training until enough is off and enough is left, by seed and alpha.

    python benchmarks/tnt_target.py --prompts prompts.jsonl --num_eval_prompts 200 \
        --phrases popular great common important --seeds 0 1 2 --alphas 8 --jobs 3 --output runs/tnt_target

The original is sampled once (`<output>/original`), and again the prompts that showed a phrase, until `--min_marked`
outputs have one. Every point is then a whole `trl-ext tnt run` on these rows, which chooses its strength on prompts
held off the training ones and meets the test prompts once; seeds differ in the order of rows. Points are processes,
`--jobs` of them at once; the same command goes on where a killed one stopped. Options of `trl-ext tnt run` may be
added. Prints a table and writes it to `<output>/table.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from trl_extensions.cli.tnt import METHOD
from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl
from trl_extensions.tnt.search import place_of


CONFIG = Path(__file__).with_name("tnt_smollm2.yaml")


def main() -> None:
    args, more = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = prepare(args, more)
    print(f"{rows}: ready after {time.perf_counter() - start:.0f} s", flush=True)
    points = list(product(args.alphas, args.marked, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        for point, code, seconds in pool.map(lambda point: run(point, rows, args, more), points):
            print(f"{folder_of(point, args).name}: exit code {code}, {seconds:.0f} s", flush=True)
    table = "\n".join(table_of(points, args)) + "\n"
    (args.output / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{time.perf_counter() - start:.0f} s in all", flush=True)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--num_eval_prompts", type=int, default=200)
    parser.add_argument("--phrases", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--alphas", nargs="+", type=float, default=[8.0])
    parser.add_argument("--marked", nargs="+", type=int, default=[0], help="use so many marked outputs; 0: all")
    parser.add_argument("--min_marked", type=int, default=500)
    parser.add_argument("--target_reduction", type=float, default=0.85)
    parser.add_argument("--min_preserved", type=float, default=0.6)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_known_args()  # what is left over goes to `trl-ext tnt run`


def options(args: argparse.Namespace, more: list[str], output: Path) -> list[str]:
    return [
        "--config", str(CONFIG), "--prompts", args.prompts, "--num_eval_prompts", str(args.num_eval_prompts),
        "--phrases", *args.phrases, "--target_reduction", str(args.target_reduction),
        "--min_preserved", str(args.min_preserved), "--num_train_epochs", "0", "--clean_ratio", "4",
        "--max_length", "512", "--output_dir", str(output), *more,
    ]  # fmt: skip


def prepare(args: argparse.Namespace, more: list[str]) -> Path:
    """The annotated outputs all points are trained on, and the original's held-out ones."""
    folder, rows = args.output / "original", args.output / "rows.jsonl"
    run = METHOD.parse("run", options(args, [*more, "--min_marked", str(args.min_marked)], folder))
    run.check()
    run.claim()
    for stage in run.stages():
        if stage.of == "original" and not stage.done.exists():
            run.perform(stage.name, stage.of)
    own = read_jsonl(folder / "original" / "annotated.jsonl")
    further = folder / "original" / "more_annotated.jsonl"
    write_jsonl(rows, own + (read_jsonl(further) if further.exists() else []))
    return rows


def run(point: tuple[float, int, int], rows: Path, args: argparse.Namespace, more: list[str]):
    """One whole run in a process of its own."""
    alpha, marked, seed = point
    start, folder = time.perf_counter(), folder_of(point, args)
    if marked:
        rows = fewer(rows, marked, args.output / f"rows_{marked}.jsonl")
    own = [*options(args, more, folder), "--alpha", str(alpha), "--data_seed", str(seed)]
    own += ["--dataset_name", str(rows), "--min_marked", "0"]
    folder.mkdir(parents=True, exist_ok=True)
    return point, *call(own, folder, start)


def call(own: list[str], folder: Path, start: float) -> tuple[int, float]:
    """Train, validate, choose, evaluate: in one process, since starting one takes longer than a stage here."""
    code = "import sys; from trl_extensions.cli.tnt import METHOD; METHOD.parse('run', sys.argv[1:]).execute()"
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        made = subprocess.call([sys.executable, "-c", code, *own], stdout=log, stderr=log, env=environment)
    return made, time.perf_counter() - start


def fewer(rows: Path, marked: int, output: Path) -> Path:
    """So many marked rows to train on, and all others."""
    left, kept = marked, []
    for row in read_jsonl(rows):
        trained_on = bool(row["negative_spans"]) and place_of(row["prompt"]) >= 0.25  # not for validation
        left -= trained_on
        if left >= 0 or not trained_on:
            kept.append(row)
    if not output.exists():
        write_jsonl(output, kept)
    return output


def folder_of(point: tuple[float, int, int], args: argparse.Namespace) -> Path:
    alpha, marked, seed = point
    return args.output / f"alpha_{alpha:g}_marked_{marked}_seed_{seed}"


def table_of(points: list[tuple[float, int, int]], args: argparse.Namespace):
    """A line a point: what was chosen on the validation prompts, and what the test prompts say of it."""
    header = ["alpha", "marked", "seed", "stopped by", "round, alpha, scale", "validation: off, unchanged"]
    header += ["test: before, after", "off", "unchanged", "KL"]
    yield f"| {' | '.join(header)} |"
    yield "| --- " * len(header) + "|"
    for point in points:
        folder = folder_of(point, args)
        if not (folder / "evaluation.json").exists():
            yield f"| {point[0]:g} | {point[1] or 'all'} | {point[2]} | failed, see {folder}/log.txt |" + " |" * 6
            continue
        found, search = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "search"))
        chosen, clean = search["chosen"], found["preservation"]["clean"]["exact_match"]
        before, after = (found[side]["greedy"]["share"] for side in ("original", "patched"))
        cells = [
            f"{point[0]:g}", point[1] or "all", point[2], search["stopped_by"],
            f"{chosen['round']}, {chosen['alpha']:g}, {chosen['scale']:g}",
            f"{percent(chosen['reduction'])}, {percent(chosen['preserved'])}", f"{percent(before)}, {percent(after)}",
            f"{1 - after['value'] / before['value']:.0%}" if before["value"] else "", percent(clean),
            f"{found['divergence']['kl_clean']['value']:.4f}",
        ]  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


def percent(estimate: dict) -> str:
    return f"{100 * estimate['value']:.0f} % ({100 * estimate['low']:.0f} to {100 * estimate['high']:.0f})"


if __name__ == "__main__":
    main()
