"""The demo's run on the real model, one variant: what its deep layers know, its first two do not."""

import json
from pathlib import Path

import pytest

from trl_extensions.cli.main import main


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_layers_know_more_than_the_first_two_and_pass_it_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = ["--config", "recipes/smollm2-135m/w2s/config_probe.yaml", "--output_dir", str(tmp_path)]
    assert main(["w2s", "run", *recipe, "--variants", "product"]) == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    weak, product, ceiling = (
        evaluation["scores"][name]["accuracy"]["value"] for name in ("weak", "product", "ceiling")
    )
    assert 0.55 < weak < product < ceiling
    assert evaluation["gap"]["accuracy"]["low"] > 0
    assert evaluation["pgr"]["accuracy"]["product"]["value"] == pytest.approx((product - weak) / (ceiling - weak))
