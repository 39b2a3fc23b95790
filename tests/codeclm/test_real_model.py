"""The demo's run on the real model, in small: every stage works in process, and the adapter learned from the pairs."""

import json
from pathlib import Path

import pytest

from trl_extensions.cli.main import main


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_small_model_goes_from_metadata_to_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = ["--config", "recipes/smollm2-135m/codeclm/config_lora.yaml", "--output_dir", str(tmp_path)]
    fewer = ["--num_instructions", "8", "--num_train_epochs", "2", "--num_benchmark_prompts", "2"]
    shorter = ["--max_new_tokens", "64", "--max_answer_tokens", "24", "--gap_threshold", "0"]
    assert main(["codeclm", "run", *recipe, *fewer, *shorter]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert len(pairs) >= 4
    assert len({pair["metadata"]["use_case"] for pair in pairs}) >= 2
    for pair in pairs:
        assert pair["scores"]["gap"] == pytest.approx(pair["scores"]["strong"] - pair["scores"]["target"])
        assert pair["winner"] == ("strong" if pair["scores"]["gap"] > 0 else "target")
    held_out = json.loads((tmp_path / "held_out.json").read_text())
    before, after, change = (held_out[name]["nats_per_token"] for name in ("before", "after", "change"))
    assert change == pytest.approx(after - before)  # of one pair, in either direction
    log = json.loads((tmp_path / "train" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[len(losses) // 2 :]) < sum(losses[: len(losses) // 2])  # the second epoch against the first
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    # Before training the target is the strong model: greedy answers are equal, and there is nothing to judge
    assert comparison["before"]["equal"] == comparison["before"]["ties"] == 2
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
