"""Whether a GPU computes what a CPU computes, and the fused losses what their definitions say."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from trl_extensions.core.generation.transformers import TransformersEngine
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.modeling import chunked
from trl_extensions.core.modeling.head import OutputHead
from trl_extensions.tnt.scores import score_rows
from trl_extensions.weak_to_strong.trainers.features import features

from ..speed import paths_sami, paths_tnt, paths_w2s
from .measure import Bench
from .models import SIZES, Size, make_model, make_tokenizer


# Relative, by norms. Float32 products differ in the order of their sums; bfloat16 has eight bits.
EXACT, HALF = 2e-4, 3e-2


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def kernels(bench: Bench, size: Size) -> None:
    """Log-probabilities and divergences, values and gradients, on the device against float32 on the CPU."""
    for dtype, tolerance in ((torch.float32, EXACT), (torch.bfloat16, HALF)):
        for name, scale, softcap in (("plain", 1.0, None), ("scaled and capped", 0.5, 8.0)):
            with bench.guarded("kernels", f"{name}, {dtype}"):
                _kernels(bench, size, dtype, tolerance, name, scale, softcap)


def _kernels(bench: Bench, size: Size, dtype, tolerance: float, name: str, scale: float, softcap) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, vocabulary = 130, min(size.vocabulary, 40000)
    states, ref_states = draw(rows, 64), draw(rows, 64)
    weight, ref_weight = 0.3 * draw(vocabulary, 64), 0.3 * draw(vocabulary, 64)
    bias = draw(vocabulary)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    factor = torch.rand(rows, generator=generator)

    def results(device: torch.device, kind: torch.dtype, function: Callable) -> list[torch.Tensor]:
        leaves = [tensor.to(device, kind, copy=True).requires_grad_() for tensor in (states, weight, bias)]
        head = OutputHead(leaves[1], leaves[2], scale, softcap)
        other = OutputHead(ref_weight.to(device, kind), None, scale, softcap)
        values = function(leaves[0], head, ref_states.to(device, kind), other, ids.to(device))
        (values * factor.to(device)).sum().backward()
        return [values, *(leaf.grad for leaf in leaves)]

    functions = {
        "log-probabilities": lambda s, head, r, other, ids: chunked.token_logps(s, head, ids),
        "forward KL": lambda s, head, r, other, ids: chunked.chunked_kl(s, head, r, other, reverse=False),
        "reverse KL": lambda s, head, r, other, ids: chunked.chunked_kl(s, head, r, other, reverse=True),
    }
    for what, function in functions.items():
        there = results(bench.device, dtype, function)
        here = results(torch.device("cpu"), torch.float32, function)
        for part, one, other in zip(("values", "states", "weight", "bias"), there, here, strict=True):
            precision = str(dtype).removeprefix("torch.")
            bench.check("kernels", f"{what} {name} {precision}: {part}", distance(one, other), tolerance)


def definitions(bench: Bench, size: Size) -> None:
    """Our losses and gradients in float32 against the ones with full logits, and those of the CPU, in bfloat16 too."""
    small = replace(size, hidden=256, intermediate=512, layers=2, heads=4, key_heads=4)
    small = size if size.hidden < 256 else small
    policy, original = (make_model(small, torch.device("cpu"), torch.float32, seed=seed) for seed in (0, 1))
    original.requires_grad_(False).eval()
    for model in (policy, original):  # rounded once, so that all precisions have the same weights
        for parameter in model.parameters():
            parameter.data = (3 * parameter.data).bfloat16().float() if parameter.dim() > 1 else parameter.data
    batch = paths_tnt.make_batch(2, 60, small.vocabulary)
    w2s = paths_w2s.make_batch(2, 16, 40, small.vocabulary)
    query = paths_sami.make_query(2, 20, 12, small.vocabulary)
    both = lambda path, batch: lambda p, o: path(p, o, batch)  # noqa: E731
    cases = {
        "TNT": (both(paths_tnt.ours, batch), {"full logits": both(paths_tnt.dense, batch)}),
        "SAMI": (lambda p, o: paths_sami.ours(p, query), {"C x C": lambda p, o: paths_sami.plain(p, query)}),
        "W2S": (
            lambda p, o: paths_w2s.ours(p, o, _on(w2s, p)),
            {"full logits": lambda p, o: paths_w2s.dense(p, o, _on(w2s, p)),
             "TRL's kernel": lambda p, o: paths_w2s.kernel(p, o, _on(w2s, p))},
        ),
    }  # fmt: skip
    for method, (ours, others) in cases.items():
        with bench.guarded("definitions", method):
            there = _run(policy, original, ours, bench.device, torch.float32)
            for name, other in others.items():
                _compare(bench, f"{method} / {name}, float32", there,
                         _run(policy, original, other, bench.device, torch.float32), EXACT)  # fmt: skip
            here = _run(policy, original, ours, torch.device("cpu"), torch.float32)
            _compare(bench, f"{method} / CPU, float32", there, here, EXACT)
            half = _run(policy, original, ours, bench.device, torch.bfloat16)
            _compare(bench, f"{method} bfloat16 / CPU float32", half, here, HALF, gradient=0.1)


def inference(bench: Bench) -> None:
    """What is sampled, scored and read out of models on the device against the CPU, in float32."""
    tokenizer = make_tokenizer()
    size = replace(SIZES["tiny"], vocabulary=len(tokenizer))
    model, original = (make_model(size, torch.device("cpu"), torch.float32, seed=seed) for seed in (0, 1))
    classifier = make_model(size, torch.device("cpu"), torch.float32, labels=2)
    prompts = ["a b c", "c", "b b a a c c", "a"]
    rows = [{"prompt": prompt, "completion": "c b a", "negative_spans": [[2, 3]]} for prompt in prompts]

    def run(device: torch.device) -> dict[str, torch.Tensor | list[str]]:
        own, other, pooled = (copy.deepcopy(m).to(device).eval() for m in (model, original, classifier))
        found: dict[str, torch.Tensor | list[str]] = {}
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            params = GenerationParams(max_new_tokens=12, temperature=temperature)
            written = dict(
                TransformersEngine(own, tokenizer).generate(prompts, params, seeds=list(range(len(prompts))))
            )
            found[name] = [written[number].text for number in range(len(prompts))]
        scores = score_rows(own, tokenizer, rows, original=other)
        found["scores"] = torch.tensor([list(score.values()) for score in scores])
        token_ids = tokenizer(prompts)["input_ids"]
        found["features"] = torch.from_numpy(features(pooled, token_ids, progress=False))
        return found

    with bench.guarded("inference", "all"):
        there, here = run(bench.device), run(torch.device("cpu"))
        for name in ("greedy", "sampled"):
            different = sum(one != other for one, other in zip(there[name], here[name], strict=True))
            bench.check("inference", f"texts / CPU: {name}", different / len(prompts), 0.0)
        for name in ("scores", "features"):
            bench.check("inference", f"numbers / CPU: {name}", distance(there[name], here[name]), EXACT)


def _on(batch: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}


def _run(policy: nn.Module, original: nn.Module, path: Callable, device: torch.device, dtype: torch.dtype):
    """Loss and all gradients in one row."""
    policy, original = (copy.deepcopy(model).to(device, dtype) for model in (policy, original))
    with torch.device(device):  # where batches are laid out
        loss = path(policy, original)
    return loss, torch.cat([p.grad.float().flatten().cpu() for p in policy.parameters() if p.grad is not None])


def _compare(bench: Bench, name: str, one, other, tolerance: float, gradient: float | None = None) -> None:
    bench.check("definitions", f"{name}: loss", distance(one[0], other[0]), tolerance)
    bench.check("definitions", f"{name}: gradient", distance(one[1], other[1]), gradient or tolerance)
