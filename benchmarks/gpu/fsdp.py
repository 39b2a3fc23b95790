"""A step of SAMI and TNT under FSDP 2 in one process, sharded and gathered, against plain losses and gradients."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset

from ..speed import paths_sami, paths_tnt
from . import trainers as make
from .checks import EXACT
from .measure import Bench
from .models import SIZES, make_model


# As `accelerate launch` would set them
_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "NCCL_SOCKET_IFNAME": "lo", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
}  # fmt: skip
CASE = "FSDP 2"


def run(results: Path, deadline: float) -> None:
    """Wait for a line on standard input, which is when the device is free, then compare."""
    if not sys.stdin.readline():
        return
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), results, deadline)
    os.environ |= _ENVIRONMENT
    store = tempfile.mkdtemp() + "/store"
    backend = "gloo" if bench.cpu else "nccl"
    if not bench.cpu:
        torch.cuda.set_device(0)
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    size = replace(SIZES["tiny"], vocabulary=1000) if bench.cpu else replace(SIZES["1b"], layers=2, hidden=1024)
    for method in ("SAMI", "TNT"):
        with bench.guarded(CASE, method):
            _compare(bench, method, size)
    sys.stdout.flush()
    os._exit(0)  # process groups that are torn down late may hang


def _compare(bench: Bench, method: str, size) -> None:
    policy = make_model(size, bench.device, torch.float32)
    original = make_model(size, bench.device, torch.float32, seed=0).requires_grad_(False)
    # Rows are drawn on the CPU; only where they are laid out is a matter of the device
    query, batch = paths_sami.make_query(2, 20, 12, size.vocabulary), paths_tnt.make_batch(2, 60, size.vocabulary)
    with torch.device(bench.device):
        loss = paths_sami.ours(policy, query) if method == "SAMI" else paths_tnt.ours(policy, original, batch)
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    policy.zero_grad(set_to_none=True)
    settings = {"bf16": False, "max_steps": 1, "max_grad_norm": 1e9, "eval_strategy": "no", "optim": "sgd"}
    if method == "SAMI":
        data = Dataset.from_dict({"prompt_input_ids": [query.prompts], "completion_input_ids": [query.responses]})
        trainer = make.sami(policy, size, bench.cpu, data, **settings)
    else:
        signs = [[0] + [-1 if i % 50 == 0 else 1 for i in range(1, len(row))] for row in batch.rows]
        data = Dataset.from_dict({"input_ids": batch.rows, "token_weights": signs})
        trainer = make.tnt(policy, size, bench.cpu, data, **settings)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    kind = type(trainer.model_wrapped).__name__
    for name, ours, other in (("loss", logged["loss"], loss.item()), ("gradient norm", logged["grad_norm"], norm)):
        difference = abs(float(ours) - float(other)) / max(abs(float(other)), 1e-3)
        bench.check(CASE, f"{method} in {kind} / plain: {name}", difference, EXACT if name == "loss" else 1e-3)
