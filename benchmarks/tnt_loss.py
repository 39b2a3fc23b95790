"""Step time and peak memory of the TNT loss: fused with the output layer against full logits, in one run.

    python benchmarks/tnt_loss.py --tokens 1024 --vocabulary 49152 --hidden 576

Forward and backward from hidden states to their gradient, as in LoRA training (the output layer itself is frozen), on
this machine's CPU. Three paths: full logits of both models through the definition (`tnt.loss`), full logits with the
closed-form gradient (one chunk), and the fused path as the trainer uses it. Each repeat runs all paths in turn; the
ratio of a repeat is taken within it. Peak memory is measured in a process of its own for each path, less what is
there before.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import torch

from trl_extensions.core.modeling.head import OutputHead
from trl_extensions.tnt import fused_loss
from trl_extensions.tnt.fused_loss import Objective, fused_negative_loss
from trl_extensions.tnt.loss import VARIANTS, targeted_negative_loss


PATHS = ("dense", "one chunk", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--variants", nargs="+", default=["ff", "rr", "ul"], choices=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    # First of all: a process inherits the peak of the one that starts it
    peaks = {(path, variant): peak_of(path, variant, args) for variant in args.variants for path in PATHS}
    print("| variant | path | time / dense | peak memory, MB |\n| --- | --- | --- | --- |")
    for variant in args.variants:
        problem = make_problem(args)
        ratios = {path: [] for path in PATHS}
        for _ in range(args.repeats):
            seconds = {path: timed(path, variant, problem) for path in PATHS}
            for path in PATHS:
                ratios[path].append(seconds[path] / seconds["dense"])
        for path in PATHS:
            low, middle, high = min(ratios[path]), statistics.median(ratios[path]), max(ratios[path])
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {variant} | {path} | {ratio} | {peaks[path, variant]:.0f} |", flush=True)


def make_problem(args) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "states": normal(args.tokens, args.hidden).requires_grad_(),
        "weight": normal(args.vocabulary, args.hidden).div_(args.hidden**0.5),
        "ref_states": normal(args.tokens, args.hidden),
        "token_ids": torch.randint(0, args.vocabulary, (args.tokens,), generator=generator),
        "weights": torch.where(torch.arange(args.tokens) % 50 == 0, -1, 1),  # two in a hundred are unwanted
    }


def step(path: str, variant: str, problem: dict) -> None:
    problem["states"].grad = None
    if path == "dense":
        logits = problem["states"] @ problem["weight"].T
        with torch.no_grad():
            ref_logits = problem["ref_states"] @ problem["weight"].T
        losses = targeted_negative_loss(
            logits[None], ref_logits[None], problem["token_ids"][None], problem["weights"][None], variant=variant
        )
        losses.sum().backward()
        return
    before = fused_loss._CHUNK_ELEMENTS
    if path == "one chunk":
        fused_loss._CHUNK_ELEMENTS = problem["weight"].shape[0] * len(problem["states"])
    head = OutputHead(problem["weight"], None, 1.0, None)
    scores = fused_negative_loss(
        problem["states"], head, problem["ref_states"], head, problem["token_ids"], problem["weights"],
        Objective(variant),
    )  # fmt: skip
    scores.total.backward()
    fused_loss._CHUNK_ELEMENTS = before


def timed(path: str, variant: str, problem: dict) -> float:
    start = time.perf_counter()
    step(path, variant, problem)
    return time.perf_counter() - start


def peak_of(path: str, variant: str, args) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (path, variant, args))


def _peak(path: str, variant: str, args) -> float:
    problem = make_problem(args)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the libraries take once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(path, variant, problem)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
