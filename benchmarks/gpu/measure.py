"""Time, memory and FLOPs of steps that run in turn in one process, each number a line of `results.jsonl` at once."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .trainers import Step


_GB = 1e9


def _product(_into, left, right, *_, **__) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query, key, value, *_, **__) -> int:
    """The scores and their product with the values, a full square whatever is masked; heads may share keys."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


def _attention_backward(_gradient, query, key, value, *_, **__) -> int:
    """The scores again, and the gradients of values, scores, queries and keys."""
    return query[0] * query[1] * query[2] * key[2] * (6 * query[3] + 4 * value[3])


# Products with a sum, which torch's counter does not know in place or with an `out_dtype`, and attention, of which it
# takes no grouped heads
_KNOWN = {torch.ops.aten.addmm: _product, torch.ops.aten.addmm_: _product}
for _kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
    for _suffix, _formula in (("", _attention), ("_backward", _attention_backward)):
        _KNOWN[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}{_suffix}")] = _formula


@dataclass
class Bench:
    """Where things run and are written to; `deadline` is in seconds of `time.time`."""

    device: torch.device
    results: Path
    deadline: float
    rounds: int = 5

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    def left(self) -> float:
        return self.deadline - time.time()

    def write(self, **row: Any) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def check(self, case: str, name: str, difference: float, tolerance: float) -> None:
        """A relative difference and what it may be; nan is too much."""
        self.write(what="check", case=case, name=name, difference=difference, tolerance=tolerance,
                   ok=difference <= tolerance)  # fmt: skip

    @contextmanager
    def guarded(self, case: str, path: str) -> Iterator[None]:
        """Write an error down and go on; a device that is lost ends the process, which is started anew."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.write(what="error", case=case, path=path, error=shortly(error))
            if "CUDA error" in str(error) or "device-side" in str(error):
                raise SystemExit(3) from None

    def sync(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        self.sync()
        start = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - start

    def peak(self, work: Callable[[], Any]) -> float | None:
        """GB taken at the peak of some work beyond what was there before; None on a CPU."""
        if self.cpu:
            work()
            return None
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / _GB

    def compare(
        self, case: str, builders: dict[str, Callable[[], Step]], *, rounds: int | None = None, count=True
    ) -> None:
        """Build the paths of a case, run them in turn, and write a line for each; `count` its FLOPs."""
        steps: dict[str, Step] = {}
        first: dict[str, float] = {}
        for path, build in builders.items():
            with self.guarded(case, path):
                step = build()
                first[path] = self.seconds(step.run)
                step.run()
                steps[path] = step
            clear(steps.get(path))
        seconds: dict[str, list[float]] = {path: [] for path in steps}
        for number in range(rounds or self.rounds):
            if number > 1 and self.left() < 5:
                break
            order = list(steps)
            for path in order[number % len(order) :] + order[: number % len(order)]:
                with self.guarded(case, path):
                    seconds[path].append(self.seconds(steps[path].run))
                clear(steps[path])
        for path, step in steps.items():
            with self.guarded(case, path):
                self._write_step(case, path, step, seconds[path], first[path], count)
        steps.clear()
        free()

    def _write_step(self, case: str, path: str, step: Step, seconds: list[float], first: float, count: bool) -> None:
        losses = []
        gb = self.peak(lambda: losses.append(float(step.run())))
        clear(step)
        flops = None
        if count:
            with self.guarded(case, f"{path}, counted"):
                flops = counted_flops(step.run)
            clear(step)
        row = {
            "ms": 1e3 * statistics.median(seconds), "low": 1e3 * min(seconds), "high": 1e3 * max(seconds),
            "first_s": first, "gb": gb, "tokens": step.tokens, "flops": flops, "loss": losses[0],
        }  # fmt: skip
        self.write(what="step", case=case, path=path, **row)
        print(case, path, {name: value for name, value in row.items() if name != "flops"}, flush=True)


def counted_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of some work; a multiplication and an addition are two."""
    with FlopCounterMode(display=False, custom_mapping=_KNOWN) as counter:
        work()
    return counter.get_total_flops()


def shortly(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site" not in frame.filename]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def clear(step: Step | None) -> None:
    if step is not None:
        step.model.zero_grad(set_to_none=True)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
