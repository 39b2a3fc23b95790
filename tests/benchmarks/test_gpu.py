"""The benchmark for a GPU runs whole on a CPU, goes on after what fails or hangs, and reports what it has."""

import io
import json
import sys
import time
from argparse import Namespace

import pytest
import torch
from torch import nn

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import measure
from benchmarks.gpu.cases import cases
from benchmarks.gpu.measure import Bench, counted_flops
from benchmarks.gpu.models import SIZES, make_model, twin
from benchmarks.gpu.report import write_report
from benchmarks.gpu.trainers import Step
from benchmarks.gpu.worker import run_cases


def rows_of(folder) -> list[dict]:
    return command.read(folder / "results.jsonl")


def test_all_of_it_on_a_cpu(tmp_path):
    run_cases(["tiny"], "cpu", tmp_path / "results.jsonl", time.time() + 500, set(), "")
    rows = rows_of(tmp_path)
    assert [row for row in rows if row["what"] == "error"] == []
    assert all(row["ok"] for row in rows if row["what"] in ("check", "train"))
    assert {row["case"] for row in rows if row["what"] == "skipped"} == {"tiny compiled", "tiny flex"}
    losses = {(row["case"], row["path"]): row["loss"] for row in rows if row["what"] == "step"}
    # Ways to do the same step, in bfloat16
    for case in ("tiny full", "tiny LoRA", "tiny QLoRA"):
        ours, theirs = losses[case, "W2S SFT, token targets"], losses[case, "TRL distillation"]
        assert ours == pytest.approx(theirs, rel=0.01)
    for number in (2, 4):
        apart, shared = (
            losses["tiny shared prompts", f"SAMI C = {number}, {way}"] for way in ("apart", "shared, sdpa")
        )
        assert shared == pytest.approx(apart, rel=0.01)
    report = write_report(tmp_path)
    assert len(report) < 10_000
    assert all(name in report for name in ("|tiny QLoRA|", "TNT, 2^28", "Trained and evaluated: 18 of 18"))


def test_twins_share_weights_and_nothing_else():
    model = make_model(SIZES["tiny"], torch.device("cpu"), torch.float32)
    other = twin(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert all(one is not two for one, two in zip(model.modules(), other.modules(), strict=True))
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_path_that_fails_leaves_the_others(tmp_path):
    model = nn.Linear(3, 5, bias=False)
    inputs = torch.randn(2, 3)

    def broken() -> Step:
        raise RuntimeError("out of luck")

    bench = Bench(torch.device("cpu"), tmp_path / "results.jsonl", time.time() + 60, rounds=2)
    bench.compare("a case", {"bad": broken, "good": lambda: Step(lambda: model(inputs).sum(), model, 2)})
    error, step = rows_of(tmp_path)
    assert (error["what"], error["path"]) == ("error", "bad") and "out of luck" in error["error"]
    assert step["flops"] == 2 * 2 * 3 * 5 and step["low"] <= step["ms"] <= step["high"]


def test_flops_of_attention_by_hand():
    query, key, value = (torch.randn(1, 4, 8, 16, requires_grad=True) for _ in range(3))

    def attention() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    product = 2 * 4 * 8 * 8 * 16  # of four heads
    assert counted_flops(attention) == 2 * product
    assert counted_flops(lambda: attention().sum().backward()) == (2 + 5) * product
    own, shared = (1, 4, 8, 16), (1, 2, 8, 16)  # two heads to a key: as much work
    assert measure._attention(own, shared, shared) == 2 * product
    assert measure._attention_backward(own, own, shared, shared) == 5 * product


WORKER = """
import json, sys, time
path, skip = sys.argv[1], sys.argv[2:]
def write(**row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\\n")
write(what="planned", cases=["dies", "hangs", "works"])
for case in ("dies", "hangs", "works"):
    if case in skip:
        continue
    write(what="begin", case=case, limit=1 if case == "hangs" else 60, time=time.time())
    if case == "dies":
        sys.exit(7)
    if case == "hangs":
        time.sleep(60)
    write(what="end", case=case, time=time.time())
"""


def test_a_new_process_goes_on_where_one_died_or_hung(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    results.write_text("")

    def start(args, worker, deadline, skip, log):
        return command.subprocess.Popen([sys.executable, "-c", WORKER, str(results), *skip])

    monkeypatch.setattr(command, "start", start)
    command.supervise(Namespace(), results, time.time() + 60, io.StringIO())
    rows = rows_of(tmp_path)
    assert [row["case"] for row in rows if row["what"] == "begin"] == ["dies", "hangs", "works"]
    errors = {row["case"]: row["error"] for row in rows if row["what"] == "error"}
    assert set(errors) == {"dies", "hangs"} and "7" in errors["dies"]
    assert [row["case"] for row in rows if row["what"] == "end"] == ["works"]


def test_a_report_of_little(tmp_path):
    rows = [
        {"what": "check", "case": "kernels", "name": "KL plain float32: values", "difference": float("nan"),
         "tolerance": 1e-4, "ok": False},
        {"what": "error", "case": "1b full", "path": "TNT", "error": "OutOfMemoryError: 3 GiB"},
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_report(tmp_path)
    assert "NO kernels" in report and "OutOfMemoryError" in report


def test_cases_have_names_of_their_own():
    names = [case.name for case in cases(["1b", "8b"])]
    assert len(set(names)) == len(names)
    assert names.index("1b QLoRA") < names.index("8b LoRA") < names.index("1b flex")
