"""Two processes against one: same loss, gradient norm, metrics and updated weights."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_processes


def launch(method: str, processes: int, model_dir, output: Path, per_device: int, accumulation: int, kind: str):
    output.mkdir()
    arguments = [method, str(model_dir), str(output), str(per_device), str(accumulation), kind]
    run_processes(Path(__file__).with_name("train.py"), arguments, processes=processes, folder=output)
    return json.loads((output / "result.json").read_text()), torch.load(output / "weights.pt")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
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
    ],
)
def test_two_processes_are_one_large_batch(tiny_model_dir, tmp_path, method, kind):
    one, weights_one = launch(method, 1, tiny_model_dir, tmp_path / "one", 4, 1, kind)
    cut = (2, 1) if method == "TNT:shared" else (1, 2)  # two rows of one prompt have to meet on a device
    two, weights_two = launch(method, 2, tiny_model_dir, tmp_path / "two", *cut, kind)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["wrapper"] == "DistributedDataParallel"
    if method.startswith("TNT"):
        assert one["shared"] is two["shared"] is (method == "TNT:shared")
    for ours, theirs in zip(two["steps"], one["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    # 7 rows over two processes: the eighth only fills the batch up and must not count
    for result in (two["evaluation"], two["again"], one["again"]):
        assert result == pytest.approx(one["evaluation"], rel=1e-3, abs=1e-5)
    # Over rows, or tokens, whatever the batches
    assert one["losses"] + two["losses"] == pytest.approx([one["evaluation"]["eval_loss"]] * 8, rel=1e-4)
    assert weights_one.keys() == weights_two.keys()
    for name, value in weights_one.items():
        torch.testing.assert_close(weights_two[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_two_processes_resume_in_the_middle_of_an_epoch(tiny_model_dir, tmp_path):
    """Six rows on two processes are three steps an epoch; the fifth and sixth see the rows that the fourth left."""
    arguments = [str(tiny_model_dir), str(tmp_path)]
    run_processes(Path(__file__).with_name("resume.py"), arguments, processes=2, folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["processes"], result["steps"]) == (2, 6) and 1 < result["epoch"] < 2
    assert result["differ_by"] < 1e-6
