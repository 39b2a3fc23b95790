"""Two processes against one: same loss, gradient norm, metrics and updated weights."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_processes


CASES = [
    ("SAMI", "full"),
    ("SAMI", "adapter"),
    ("TNT", "full"),
    ("TNT", "adapter"),
    ("TNT:shared", "full"),
    ("WeakToStrong:confidence", "full"),
    ("WeakToStrong:confidence", "adapter"),
    ("WeakToStrong:confidence", "probe"),
    ("WeakToStrongReward:confidence", "full"),
    ("WeakToStrongSFT:", "adapter"),
    ("WeakToStrongSFT:text", "full"),
]


def launch(processes: int, model_dir, folder: Path):
    """Carry out every case in processes that are started once; a case's result and weights by its place."""
    folder.mkdir()
    cases = []
    for place, (method, kind) in enumerate(CASES):
        (folder / str(place)).mkdir()
        # Two rows of one prompt have to meet on a device
        cut = (4, 1) if processes == 1 else (2, 1) if method == "TNT:shared" else (1, 2)
        cases.append([str(folder / str(place)), method, kind, *cut])
    script = Path(__file__).with_name("train.py")
    run_processes(script, [str(model_dir), json.dumps(cases)], processes=processes, folder=folder)
    results = [json.loads((folder / str(place) / "result.json").read_text()) for place in range(len(CASES))]
    return results, [torch.load(folder / str(place) / "weights.pt") for place in range(len(CASES))]


def test_two_processes_are_one_large_batch(tiny_model_dir, tmp_path):
    ones = launch(1, tiny_model_dir, tmp_path / "one")
    twos = launch(2, tiny_model_dir, tmp_path / "two")
    for case, one, weights_one, two, weights_two in zip(CASES, *ones, *twos, strict=True):
        assert (one["processes"], two["processes"]) == (1, 2), case
        assert two["wrapper"] == "DistributedDataParallel", case
        if case[0].startswith("TNT"):
            assert one["shared"] is two["shared"] is (case[0] == "TNT:shared")
        for ours, theirs in zip(two["steps"], one["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), case
        # 7 rows over two processes: the eighth only fills the batch up and must not count
        for result in (two["evaluation"], two["again"], one["again"]):
            assert result == pytest.approx(one["evaluation"], rel=1e-3, abs=1e-5), case
        # Over rows, or tokens, whatever the batches
        losses = [one["evaluation"]["eval_loss"]] * 8
        assert one["losses"] + two["losses"] == pytest.approx(losses, rel=1e-4), case
        assert weights_one.keys() == weights_two.keys(), case
        for name, value in weights_one.items():
            torch.testing.assert_close(weights_two[name], value, atol=1e-5, rtol=1e-4, msg=f"{case}: {name}")


def test_two_processes_resume_in_the_middle_of_an_epoch(tiny_model_dir, tmp_path):
    """Six rows on two processes are three steps an epoch; the fifth and sixth see the rows that the fourth left."""
    arguments = [str(tiny_model_dir), str(tmp_path)]
    run_processes(Path(__file__).with_name("resume.py"), arguments, processes=2, folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["processes"], result["steps"]) == (2, 6) and 1 < result["epoch"] < 2
    assert result["differ_by"] < 1e-6
