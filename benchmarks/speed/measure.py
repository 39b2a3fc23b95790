"""How a step is measured: alternated runs in one process; peak memory and FLOPs in a process of its own."""

import gc
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .models import TINY


Step = Callable[[], torch.Tensor]
T = TypeVar("T")

_MB = 2**20


def _product(_into, left, right, **_) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# Products that the counter of torch does not know: the in-place one of chunked heads, attention on a CPU
_UNKNOWN = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def timed(step: Step) -> dict[str, float]:
    """Seconds of one run: `wall`, and `cpu` of this process with all of its threads."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def counted_flops(step: Step) -> int:
    """Floating point operations of the matrix products of one run; a multiplication and an addition are two.

    Attention is counted as a full square, as torch counts it, whatever its mask hides.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN) as counter:
        step()
    return counter.get_total_flops()


def measure_alone(case, path: str) -> dict[str, float]:
    """One run of a case's path in a fresh process.

    Returns:
        `mb`, taken at the peak beyond the loaded models, and `flops`.
    """
    return in_a_process(_alone, case, path)


def in_a_process(work: Callable[..., T], *arguments) -> T:
    """What `work` returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _alone(case, path: str) -> dict[str, float]:
    torch.set_num_threads(1)
    case.steps([path], TINY)[path]()  # what libraries load on first use
    step = case.steps([path])[path]
    flops, mb = with_peak(lambda: counted_flops(step))
    return {"mb": mb, "flops": flops}


def with_peak(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the most memory in MB that this process had meanwhile beyond what it had before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    result = work()
    return result, (_status("VmHWM") - before) / _MB


def _status(name: str) -> int:
    """A field of this process's memory, in bytes (Linux)."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024
