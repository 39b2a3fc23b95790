"""CodecLM against a local OpenAI-compatible server that answers by rule, slowly, and fails now and then.

    python benchmarks/codeclm_server.py --latency 0.5 --cores 0 1

The server runs in a process of its own and takes `--latency` seconds for every request, failed ones included. One
engine has all roles, so that no more than `--concurrency` requests are in flight. Wall time, from the seeds to the
report, is compared with the least it could be: latency times calls, so many at a time. Failed requests and the pauses
after them are not in that. Counted at the server: requests that never got an answer, and any that got two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.generation.endpoint import EndpointEngine
from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl


ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64, help="most requests in flight")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds of a request at the server")
    parser.add_argument("--failures", type=float, default=0.05, help="share of requests that fail")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("SERVER", "RUN"), help="pin the two processes")
    args = parser.parse_args()
    with serving(args) as url, tempfile.TemporaryDirectory() as folder:
        if args.cores:
            os.sched_setaffinity(0, {args.cores[1]})
        seeds = Path(folder) / "seeds.jsonl"
        write_jsonl(seeds, ({"instruction": f"Please help me with box {number}, as I asked"} for number in range(20)))
        engine = EndpointEngine(url, "either", concurrency=args.concurrency)
        config = CodecLMConfig(prompts=str(seeds), num_instructions=args.instructions)
        started, used = time.monotonic(), time.process_time()
        result = CodecLM(config, Path(folder) / "run", strong=engine, target=engine).run()
        wall, used = time.monotonic() - started, time.process_time() - used
        calls = Counter(row["step"] for row in ResponseCache(Path(folder) / "run" / "calls.sqlite").rows())
        finished = {row["id"] for row in read_jsonl(Path(folder) / "run" / "items.jsonl")}
        asked = {row["id"] for row in read_jsonl(Path(folder) / "run" / "basics.jsonl")}
        with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as reply:
            stats = json.load(reply)
    report(args, stats, calls, {"asked": len(asked), "lost": len(asked - finished), "pairs": result.pairs}, wall, used)


def report(args: argparse.Namespace, stats: dict, calls: Counter, counts: dict, wall: float, used: float) -> None:
    total = sum(calls.values())
    ideal = args.latency * total / args.concurrency
    failed = ", ".join(f"{number} {kind}" for kind, number in sorted(stats["failed"].items()))
    print(f"instructions: {counts['asked']}, not finished: {counts['lost']}; pairs: {counts['pairs']}")
    print(f"calls: {total} ({', '.join(f'{number} {name}' for name, number in calls.items())})")
    print(f"failures: {sum(stats['failed'].values())} of {stats['received']} requests ({failed})")
    print(f"never answered: {stats['never_answered']}; answered twice: {stats['answered_twice']}")
    print(f"not in the log: {stats['answered'] - total}; most in flight: {stats['most_in_flight']}")
    print(
        f"wall time: {wall:.1f} s, of which this process computed {used:.1f} s ({1000 * used / total:.1f} ms a call)"
    )
    print(f"latency x calls / concurrency: {ideal:.1f} s; ratio {wall / ideal:.2f}")


@contextmanager
def serving(args: argparse.Namespace):
    """The address of the server meanwhile."""
    command = [sys.executable, "-m", "tests.codeclm.server"]
    command += ["--delay", str(args.latency), "--failures", str(args.failures)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if args.cores:
            os.sched_setaffinity(process.pid, {args.cores[0]})
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


if __name__ == "__main__":
    main()
