"""Runs cases one after another in one process, whose imports and weights they share."""

import os
import time
from pathlib import Path

import torch

from .cases import cases
from .measure import Bench, free


def run_cases(sizes: list[str], device: str, results: Path, deadline: float, skip: set[str], only: str) -> None:
    """Run what is not in `skip`; a line tells when each case begins and ends."""
    bench = Bench(torch.device(device), results, deadline, rounds=2 if device == "cpu" else 5)
    if bench.cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench.write(what="planned", cases=[case.name for case in cases(sizes) if only in case.name])
    for case in cases(sizes):
        if case.name in skip or only not in case.name:
            continue
        reason = None
        if bench.cpu and not case.on_cpu:
            reason = "needs a GPU"
        elif bench.left() < case.needs:
            reason = f"{bench.left():.0f} s were left"
        if reason:
            bench.write(what="skipped", case=case.name, reason=reason)
            continue
        bench.write(what="begin", case=case.name, limit=case.limit, time=time.time())
        with bench.guarded(case.name, "all"):
            case.run(bench)
        free()
        bench.write(what="end", case=case.name, time=time.time())
