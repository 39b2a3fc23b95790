"""What is measured, the most important first."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from trl_extensions.core.generation.transformers import TransformersEngine
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.modeling import chunked
from trl_extensions.core.modeling.head import OutputHead
from trl_extensions.tnt import fused_loss

from . import trainers as make
from .checks import definitions, inference, kernels
from .measure import Bench, free
from .models import SIZES, Size, lora, make_model, make_tokenizer, quantise, twin
from .trainers import Step, step_of


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        needs: Seconds without which it is not begun.
        limit: Seconds after which it is taken to hang.
        on_cpu: Whether it runs without a GPU.
    """

    name: str
    run: Callable[[Bench], None]
    needs: float = 10
    limit: float = 90
    on_cpu: bool = True


def cases(sizes: list[str]) -> list[Case]:
    """The full set for the smallest of some sizes, and steps with adapters for a larger one."""
    name, size = sizes[0], SIZES[sizes[0]]
    weak = SIZES[name]
    own = [
        Case("ceilings", ceilings),
        Case("kernels", lambda bench: kernels(bench, size)),
        Case("definitions", lambda bench: definitions(bench, size)),
        Case("inference", inference),
        Case(f"{name} full", lambda bench: full(bench, f"{name} full", size), 15),
        Case("train", train_and_evaluate, 15),
        Case(f"{name} LoRA", lambda bench: adapters(bench, f"{name} LoRA", size, weak), 12),
        Case(f"{name} QLoRA", lambda bench: adapters(bench, f"{name} QLoRA", size, weak, quantised=True), 12),
        Case(f"{name} shared prompts", lambda bench: shared(bench, f"{name} shared prompts", size, "sdpa")),
        Case(f"{name} chunks", lambda bench: chunks(bench, f"{name} chunks", size)),
        Case(f"{name} checkpointing", lambda bench: checkpointing(bench, f"{name} checkpointing", size)),
    ]
    own.append(Case(f"{name} sampling", lambda bench: sampling(bench, f"{name} sampling", size)))
    for other in sizes[1:]:
        large = SIZES[other]
        own += [
            Case(f"{other} LoRA", partial(_large, f"{other} LoRA", large, weak, False), 35, 120),
            Case(f"{other} QLoRA", partial(_large, f"{other} QLoRA", large, weak, True), 35, 120),
        ]
    own += [
        Case(f"{name} compiled", lambda bench: compiled(bench, f"{name} compiled", size), 40, 90, on_cpu=False),
        Case(f"{name} flex", lambda bench: shared(bench, f"{name} flex", size, "flex_attention"), 30, 90, False),
    ]
    return own


def _large(name: str, size: Size, weak: Size, quantised: bool, bench: Bench) -> None:
    adapted(bench, name, size, weak, quantised=quantised, checkpointing=True, rounds=3)


def ceilings(bench: Bench) -> None:
    """Bytes copied, read and written, and bfloat16 products a second, on data that no cache holds."""
    length, side = (2**20, 256) if bench.cpu else (2**31, 8192)
    source = torch.randn(length // 4, device=bench.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    for name, work, amount in (
        ("copy, TB/s", lambda: target.copy_(source), 2 * length / 1e12),
        ("bfloat16 product, TFLOP/s", lambda: left @ right, 2 * side**3 / 1e12),
        ("float32 product, TFLOP/s", lambda: left.float() @ right.float(), 2 * side**3 / 1e12),
    ):
        work()
        seconds = sorted(bench.seconds(work) for _ in range(10))
        bench.write(what="ceiling", name=name, value=amount / seconds[5])


def full(bench: Bench, case: str, size: Size) -> None:
    """All weights trained, in bfloat16; all trainers share the weights, for none is updated."""
    _full_causal(bench, case, size)
    free()
    cpu, scorer = bench.cpu, make_model(size, bench.device, torch.bfloat16, labels=1)
    classifier = make_model(size, bench.device, torch.bfloat16, labels=2)
    bench.compare(case, {
        "TRL reward": lambda: step_of(make.reward(twin(scorer), size, cpu)),
        "W2S reward": lambda: step_of(make.weak_reward(twin(scorer), size, cpu)),
        "W2S classification": lambda: step_of(make.classification(twin(classifier), size, cpu)),
    })  # fmt: skip


def _full_causal(bench: Bench, case: str, size: Size) -> None:
    cpu, device = bench.cpu, bench.device
    base = make_model(size, device, torch.bfloat16)
    weak = make_model(size, device, torch.bfloat16, seed=1)
    bench.compare(case, {
        "TRL SFT": lambda: step_of(make.sft(twin(base), size, cpu)),
        "TNT": lambda: step_of(make.tnt(twin(base), size, cpu)),
        "TRL distillation": lambda: make.distillation(twin(base), twin(weak), size, cpu),
        "W2S SFT, token targets": lambda: step_of(make.token_targets(twin(base), twin(weak), size, cpu)),
        "W2S SFT, text": lambda: step_of(make.token_text(twin(base), size, cpu)),
    })  # fmt: skip
    bench.compare(case, {
        "TRL SFT of SAMI's tokens": lambda: step_of(make.sft_like_sami(twin(base), size, cpu)),
        "SAMI": lambda: step_of(make.sami(twin(base), size, cpu)),
        "SAMI, no KL logged": lambda: step_of(make.sami(twin(base), size, cpu, log_kl=False)),
    })  # fmt: skip


def adapters(bench: Bench, case: str, size: Size, weak_size: Size, *, quantised=False) -> None:
    """LoRA on every linear layer; the base's weights are there once."""
    adapted(bench, case, size, weak_size, quantised=quantised)
    free()
    cpu, peft = bench.cpu, lora(classifier=True)
    scorer, classifier = (make_model(size, bench.device, torch.bfloat16, labels=labels) for labels in (1, 2))
    if quantised:
        quantise(scorer)
        quantise(classifier)
    bench.compare(case, {
        "TRL reward": lambda: step_of(make.reward(_ready(scorer), size, cpu, peft)),
        "W2S reward": lambda: step_of(make.weak_reward(_ready(scorer), size, cpu, peft)),
        "W2S classification": lambda: step_of(make.classification(_ready(classifier), size, cpu, peft)),
    })  # fmt: skip


def adapted(
    bench: Bench, case: str, size: Size, weak_size: Size, *, quantised=False, checkpointing=False, rounds=None
) -> None:
    """The language models of `adapters`."""
    cpu, device = bench.cpu, bench.device
    base = make_model(size, device, torch.bfloat16)
    if quantised:
        quantise(base)
        free()
    weak = make_model(weak_size, device, torch.bfloat16, seed=1)
    own = {"peft": lora(), "gradient_checkpointing": checkpointing}
    bench.compare(case, {
        "TRL SFT": lambda: step_of(make.sft(_ready(base), size, cpu, **own)),
        "TNT": lambda: step_of(make.tnt(_ready(base), size, cpu, **own)),
        "SAMI": lambda: step_of(make.sami(_ready(base), size, cpu, **own)),
        "TRL distillation": lambda: make.distillation(_ready(base), twin(weak), size, cpu, **own),
        "W2S SFT, token targets": lambda: step_of(make.token_targets(_ready(base), twin(weak), size, cpu, **own)),
    }, rounds=rounds)  # fmt: skip


def _ready(base: nn.Module) -> nn.Module:
    own = twin(base)
    if getattr(base, "is_loaded_in_4bit", False):
        own.is_loaded_in_4bit = True
    return own


def shared(bench: Bench, case: str, size: Size, attention: str) -> None:
    """Prompts computed once for all that is scored behind them, with an attention, beside each in a row of its own."""
    cpu = bench.cpu
    base = make_model(size, bench.device, torch.bfloat16)

    def model(kind: str) -> nn.Module:
        own = twin(base)
        own.set_attn_implementation(kind)
        return own

    plainly = attention == "sdpa"  # counting does not go with every compiled kernel
    kinds = {"apart": (False, "sdpa"), f"shared, {attention}": (True, attention)}
    for constitutions in (2, 4):
        data = make.queries(size, constitutions, max(1, size.queries // constitutions), size.shared_prompt)
        bench.compare(case, {
            f"SAMI C = {constitutions}, {name}": partial(
                lambda share, kind, data: step_of(
                    make.sami(model(kind), size, cpu, data, share_prefix=share, log_kl=False)), share, kind, data
            ) for name, (share, kind) in kinds.items()
        }, count=plainly)  # fmt: skip
    rows = make.samples(size, size.shared_prompt, size.response)
    data = make.signed(rows, size.shared_prompt)
    bench.compare(case, {
        f"TNT, 4 of a prompt, {name}": partial(
            lambda share, kind: step_of(make.tnt(model(kind), size, cpu, data, share_prefix=share)), share, kind
        ) for name, (share, kind) in kinds.items()
    }, count=plainly)  # fmt: skip


def chunks(bench: Bench, case: str, size: Size) -> None:
    """Losses from states alone, by the numbers of one chunk of logits, beside TRL's kernels."""
    generator = torch.Generator(bench.device).manual_seed(0)
    number = size.rows * (size.length - size.prompt)

    def draw(*shape: int, factor: float = 1.0) -> torch.Tensor:
        return (factor * torch.randn(shape, device=bench.device, generator=generator)).bfloat16()

    states, ref_states = draw(number, size.hidden), draw(number, size.hidden)
    weights = [draw(size.vocabulary, size.hidden, factor=0.02) for _ in range(2)]
    ids = torch.randint(size.vocabulary, (number,), device=bench.device, generator=generator)
    signs = torch.tensor([-1 if random.Random(i).random() < 0.02 else 1 for i in range(number)], device=bench.device)

    def step(trained: bool, loss: Callable[..., torch.Tensor]) -> Step:
        holder = nn.Module()
        holder.states, holder.weight = nn.Parameter(states), nn.Parameter(weights[0], requires_grad=trained)

        def run() -> torch.Tensor:
            holder.zero_grad(set_to_none=True)
            head, other = OutputHead(holder.weight, None, 1.0, None), OutputHead(weights[1], None, 1.0, None)
            value = loss(holder.states, head, other)
            value.backward()
            return value.detach()

        return Step(run, holder, number)

    def tnt(elements: int, states, head, other) -> torch.Tensor:
        with _set(fused_loss, _CHUNK_ELEMENTS=elements, _CUDA_CHUNK_ELEMENTS=elements):
            return fused_loss.fused_negative_loss(
                states, head, ref_states, other, ids, signs, fused_loss.Objective("ff")
            ).total

    def kl(kernel: bool, elements: int, states, head, other) -> torch.Tensor:
        own = chunked.use_triton if kernel else lambda device: False
        # The backward pass looks at the size of a chunk again
        chunked._CHUNK_ELEMENTS = elements
        with _set(chunked, use_triton=own):
            return chunked.chunked_kl(states, head, ref_states, other, reverse=False).sum()

    def logps(kernel: bool, elements: int, states, head, other) -> torch.Tensor:
        chunked._CHUNK_ELEMENTS = elements
        with _set(chunked, use_triton=chunked.use_triton if kernel else lambda device: False):
            return chunked.token_logps(states, head, ids).sum()

    before = chunked._CHUNK_ELEMENTS
    try:
        for trained in (True, False):
            head = "trained head" if trained else "frozen head"
            paths = {f"TNT, 2^{power}": partial(tnt, 2**power) for power in (22, 24, 25, 26, 27, 28)}
            paths |= {f"KL here, 2^{power}": partial(kl, False, 2**power) for power in (24, 27)}
            paths |= {"KL, TRL's kernel": partial(kl, True, before)}
            paths |= {f"log-p here, 2^{power}": partial(logps, False, 2**power) for power in (24, 27)}
            paths |= {"log-p, TRL's kernel": partial(logps, True, before)}
            bench.compare(f"{case}, {head}", {name: partial(step, trained, loss) for name, loss in paths.items()},
                          rounds=3)  # fmt: skip
    finally:
        chunked._CHUNK_ELEMENTS = before


class _set:  # noqa: N801 (reads as a verb)
    """Module constants for the time of a block."""

    def __init__(self, module, **values) -> None:
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.before = {name: getattr(self.module, name) for name in self.values}
        vars(self.module).update(self.values)

    def __exit__(self, *_) -> None:
        vars(self.module).update(self.before)


def checkpointing(bench: Bench, case: str, size: Size) -> None:
    base = make_model(size, bench.device, torch.bfloat16)
    for name, trainer in (("TNT", make.tnt), ("SAMI", make.sami)):
        bench.compare(case, {
            f"{name}, {'recomputed' if on else 'kept'}": partial(
                lambda trainer, on: step_of(trainer(twin(base), size, bench.cpu, gradient_checkpointing=on)),
                trainer, on,
            ) for on in (False, True)
        }, rounds=3)  # fmt: skip


def sampling(bench: Bench, case: str, size: Size) -> None:
    """Tokens a second of the engine in this process: prompts of one length, no end before the limit."""
    tokenizer = make_tokenizer()
    model = make_model(size, bench.device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    prompts = [" ".join("abc"[(i * j) % 3] for j in range(size.prompt)) for i in range(8 * size.rows)]
    engine = TransformersEngine(model, tokenizer, batch_tokens=2**20)
    params = GenerationParams(max_new_tokens=max(8, size.prompt // 2), temperature=1.0)
    written: list[int] = []

    def run() -> None:
        written.append(sum(generation.num_tokens for _, generation in engine.generate(prompts, params)))

    bench.seconds(run)
    seconds = bench.seconds(run)
    bench.write(what="ceiling", name=f"{case}, {len(prompts)} prompts, tokens a second", value=written[-1] / seconds)


def compiled(bench: Bench, case: str, size: Size) -> None:
    """`torch.compile` of each decoder layer, in place; `first_s` is the time of the first step, compilation in it."""
    base = make_model(size, bench.device, torch.bfloat16)

    def build(trainer: Callable, compile_: bool) -> Step:
        own = twin(base)
        if compile_:
            for layer in own.model.layers:
                layer.compile()
        return step_of(trainer(own, size, bench.cpu))

    for name, trainer in (("TRL SFT", make.sft), ("TNT", make.tnt)):
        bench.compare(case, {
            f"{name}, {'compiled' if on else 'eager'}": partial(build, trainer, on) for on in (False, True)
        }, rounds=3, count=False)  # fmt: skip


def train_and_evaluate(bench: Bench) -> None:
    """Two steps of every trainer as a user runs it, with AdamW, then an evaluation."""
    for kind in ("full", "LoRA", "QLoRA"):
        for name, build in _builders(bench, kind).items():
            with bench.guarded("train", f"{name}, {kind}"):
                trainer = build()
                before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
                trainer.train()
                metrics = trainer.evaluate()
                after = [p for p in trainer.model.parameters() if p.requires_grad]
                moved = any(not torch.equal(one, other.to(one)) for one, other in zip(before, after, strict=True))
                finite = all(value == value for value in metrics.values() if isinstance(value, float))
                bench.write(what="train", name=f"{name}, {kind}", ok=moved and finite, loss=metrics["eval_loss"])


def _builders(bench: Bench, kind: str) -> dict[str, Callable]:
    """Trainers of float32 weights, of adapters on bfloat16 or on 4 bits."""
    size, cpu = replace(SIZES["tiny"], vocabulary=1000), bench.cpu
    dtype = torch.float32 if kind == "full" else torch.bfloat16
    peft, scorer = (None, None) if kind == "full" else (lora(), lora(classifier=True))

    def model(labels: int | None = None) -> nn.Module:
        own = make_model(size, bench.device, dtype, labels=labels)
        return quantise(own) if kind == "QLoRA" else own

    def weak() -> nn.Module:
        return make_model(size, bench.device, torch.bfloat16, seed=1)

    return {
        "TRL SFT": lambda: make.sft(model(), size, cpu, peft=peft),
        "SAMI": lambda: make.sami(model(), size, cpu, peft=peft, beta=0.1),
        "TNT": lambda: make.tnt(model(), size, cpu, peft=peft, share_prefix=True),
        "W2S SFT": lambda: make.token_targets(model(), weak(), size, cpu, peft=peft),
        "W2S reward": lambda: make.weak_reward(model(1), size, cpu, peft=scorer),
        "W2S classification": lambda: make.classification(model(2), size, cpu, peft=scorer),
    }
