"""Run the speed benchmarks and write their tables and figure.

    python -m benchmarks.speed --output runs/speed

Every measurement is a line of `<output>/results.jsonl`, written when it is made: the same command goes on where an
interrupted one stopped, and with everything measured it only writes `speed.md` and `speed.png` again.
"""

import argparse
import time
from pathlib import Path

import torch

from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl

from .bookkeeping import SIZES, measure_bookkeeping
from .cases import Case, all_cases, quick_cases
from .measure import Step, measure_alone, timed
from .models import TINY
from .report import write_report
from .startup import measure_startup


def main() -> None:
    args = parse()
    results = args.output / "results.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    deadline = time.monotonic() + (args.seconds or float("inf"))
    cases = [case for case in (quick_cases() if args.quick else all_cases()) if args.only in case.name]
    rounds = args.rounds or (2 if args.quick else 5)
    done = read_jsonl(results) if results.exists() else []
    with JsonlWriter(results) as writer:
        finished = all(measure_case(case, rounds, done, writer, deadline) for case in cases)
        if finished and not args.only:
            sizes = [*([] if args.quick else SIZES), *args.bookkeeping]
            finished = measure_rest(done, sizes, writer, deadline)
    write_report(read_jsonl(results), all_cases(), args.output)
    print(f"{args.output}/speed.md" if finished else "out of time; the same command goes on from here", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--quick", action="store_true", help="a small subset, two rounds")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, help="alternated runs of each case (5; quick: 2)")
    parser.add_argument("--seconds", type=float, help="stop after about this long; the same command goes on")
    parser.add_argument(
        "--bookkeeping",
        type=int,
        nargs="*",
        default=[],
        metavar="ROWS",
        help="instructions of further runs of CodecLM without models (not with --only); a million take half an hour "
        "and 6 GB of disk",
    )
    return parser.parse_args()


def measure_rest(done: list[dict], sizes: list[int], writer: JsonlWriter, deadline: float) -> bool:
    """Measure what runs in processes of its own: start-up, and CodecLM without models; whether that is complete."""
    if not any(row["what"] == "startup" for row in done):
        writer.append({"what": "startup", **measure_startup()})
    known = {row["rows"] for row in done if row["what"] == "bookkeeping"}
    missing = [size for size in dict.fromkeys(sizes) if size not in known]
    while missing and time.monotonic() < deadline:
        print(f"CodecLM, {missing[0]} instructions", flush=True)
        writer.append({"what": "bookkeeping", **measure_bookkeeping(missing.pop(0))})
    return not missing


def measure_case(case: Case, rounds: int, done: list[dict], writer: JsonlWriter, deadline: float) -> bool:
    """Measure what is missing of a case; whether it is complete."""
    own = [row for row in done if row.get("case") == case.name]
    have = {(row["what"], row["path"], row.get("round")) for row in own}
    todo = [number for number in range(rounds) if any(("time", path, number) not in have for path in case.paths)]
    if todo and time.monotonic() < deadline:
        for warm_up in case.steps(case.paths, TINY).values():
            warm_up()
        steps = case.steps(case.paths)
        while todo and time.monotonic() < deadline:
            run_round(case, steps, todo.pop(0), writer)
    alone = [path for path in case.paths if ("alone", path, None) not in have]
    while alone and time.monotonic() < deadline:
        path = alone.pop(0)
        writer.append({"case": case.name, "what": "alone", "path": path, **measure_alone(case, path)})
    return not todo and not alone


def run_round(case: Case, steps: dict[str, Step], number: int, writer: JsonlWriter) -> None:
    """Time each path once; each round begins with another one, so that none always follows the same."""
    shift = number % len(steps)
    order = [*case.paths[shift:], *case.paths[:shift]]
    seconds = {path: timed(steps[path]) for path in order}
    for path in case.paths:
        writer.append({"case": case.name, "what": "time", "path": path, "round": number, **seconds[path]})
    print(case.name, number, {path: round(value["cpu"], 2) for path, value in seconds.items()}, flush=True)


if __name__ == "__main__":
    main()
