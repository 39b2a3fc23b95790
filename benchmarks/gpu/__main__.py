"""Measure the trainers on one GPU and check their numbers against the CPU's.

    python -m benchmarks.gpu --output runs/gpu                          # on a GPU: 1B and 8B shapes, up to 7 minutes
    python -m benchmarks.gpu --output runs/gpu --size tiny --device cpu # the same code, in a minute

Every measurement is a line of `<output>/results.jsonl` when it is made, the table at the end is `<output>/gpu.md`.
Cases run in one process; if one fails, the next goes on, and if one hangs or takes the process with it, a new process
does. Models have random weights and rows are random token ids: nothing is downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / "results.jsonl"
    results.write_text("", encoding="utf-8")
    deadline = time.time() + args.seconds
    with (args.output / "worker.log").open("w") as log:
        fsdp = start(args, "fsdp", deadline, [], log) if args.device == "cuda" and not args.only else None
        try:
            supervise(args, results, deadline, log)
            if fsdp is not None:
                finish_fsdp(fsdp, results, deadline)
        finally:
            if fsdp is not None and fsdp.poll() is None:
                fsdp.kill()
    from .report import write_report

    print(write_report(args.output))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=420, help="stop after this long, whatever is missing")
    parser.add_argument("--size", nargs="+", default=["1b", "8b"], choices=["tiny", "1b", "8b"],
                        help="everything for the first, steps with adapters for the others")  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--worker", choices=["cases", "fsdp"], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    results = args.output / "results.jsonl"
    if args.worker == "fsdp":
        from .fsdp import run

        run(results, args.until)
    else:
        from .worker import run_cases

        run_cases(args.size, args.device, results, args.until, set(args.skip), args.only)


def start(args: argparse.Namespace, worker: str, deadline: float, skip: list[str], log) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", worker, "--until", str(deadline)]
    command += ["--output", str(args.output), "--device", args.device, "--size", *args.size, "--only", args.only]
    command += ["--skip", *skip]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
             "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
    quiet |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | quiet, text=True)


def supervise(args: argparse.Namespace, results: Path, deadline: float, log) -> None:
    """Run the cases, in new processes where one ends too early; stop at the deadline."""
    failed: list[str] = []
    while time.time() < deadline - 10:
        seen = [row["case"] for row in read(results) if row["what"] in ("begin", "skipped")]
        planned = next((row["cases"] for row in read(results) if row["what"] == "planned"), None)
        if planned is not None and set(planned) <= set(seen):
            return
        process = start(args, "cases", deadline, seen, log)
        reason = wait(process, results, deadline)
        if reason is None:
            return
        process.kill()
        process.wait()
        case = unfinished(results) or "start"
        write(results, what="error", case=case, path="all", error=reason)
        if case in failed or reason == "out of time":
            return
        failed.append(case)


def wait(process: subprocess.Popen, results: Path, deadline: float) -> str | None:
    """None when a process has done all cases, else why it has not."""
    while process.poll() is None:
        if time.time() > deadline:
            return "out of time"
        case, rows = unfinished(results), read(results)
        begun = [row for row in rows if row["what"] == "begin" and row["case"] == case]
        if begun and time.time() > begun[-1]["time"] + begun[-1]["limit"]:
            return f"took longer than {begun[-1]['limit']:.0f} s"
        time.sleep(0.3)
    return None if process.returncode == 0 else f"the process ended with {process.returncode}, see worker.log"


def unfinished(results: Path) -> str | None:
    rows = read(results)
    ended = {row["case"] for row in rows if row["what"] in ("end", "error") and row.get("path", "all") == "all"}
    return next((row["case"] for row in rows if row["what"] == "begin" and row["case"] not in ended), None)


def finish_fsdp(process: subprocess.Popen, results: Path, deadline: float) -> None:
    """Let the process that has imported everything meanwhile run; it writes its own lines."""
    if time.time() > deadline - 5:
        write(results, what="skipped", case="FSDP 2", reason="no time was left")
        return
    try:
        process.communicate("go\n", timeout=min(60, deadline - time.time()))
    except subprocess.TimeoutExpired:
        write(results, what="error", case="FSDP 2", path="all", error="took too long")
    else:
        if process.returncode:
            reason = f"the process ended with {process.returncode}, see worker.log"
            write(results, what="error", case="FSDP 2", path="all", error=reason)


def read(results: Path) -> list[dict]:
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write(results: Path, **row) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
