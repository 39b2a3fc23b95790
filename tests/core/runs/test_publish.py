"""The card of a trained model, what goes to the hub, and the lines that say what to do next."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from trl.trainer.utils import generate_model_card

from trl_extensions.core.generation.types import adapter_base
from trl_extensions.core.runs import publish
from trl_extensions.embedded import EMBEDDED_ALIAS, HUB_ID, public_name, publish_base


REPORT = {
    "verdict": {"kind": "removed", "text": "It worked: 少なくなった."},
    "patched": {"greedy": {"share": {"value": 0.25, "low": 0.1, "high": 0.4}}},
    "no interval": {"value": 1.0, "low": None, "high": None},
}


@pytest.fixture
def run(tmp_path):
    model = tmp_path / "敬語" / "model"
    model.mkdir(parents=True)
    nobody = dict.fromkeys(("base_model", "hub_model_id", "dataset_name", "wandb_url", "trackio_url"))
    card = generate_model_card(
        model_name="x", tags=["tnt"], trainer_name="TNT", paper_id="2406.13660", paper_title="T", **nobody
    )
    card.save(model / "README.md")
    return SimpleNamespace(
        folder=model.parent,
        config=SimpleNamespace(hub_token="t", hub_model_id=None, hub_private_repo=True),
        model_args=SimpleNamespace(model_name_or_path="Qwen/Qwen3-0.6B"),
        args=SimpleNamespace(prompts="HuggingFaceH4/ultrachat_200k", dataset_name=str(model)),
    )


class Hub:
    def __init__(self, token=None):
        self.did = {"token": token}
        Hub.last = self

    def model_info(self, name):
        if name == HUB_ID:
            raise OSError("no network")
        return SimpleNamespace(card_data=SimpleNamespace(license="apache-2.0"))

    def create_repo(self, name, **options):
        self.did |= {"repo": name} | options
        return SimpleNamespace(repo_id=f"user/{name}")

    def upload_folder(self, **options):
        self.did |= options


def test_estimates_with_an_interval_are_found_wherever_they_are():
    assert list(publish.scores_of(REPORT)) == [("patched/greedy/share", 0.25, 0.1, 0.4)]
    assert list(publish.scores_of({"value": 1, "low": 0, "high": 2, "x": [1]})) == [("", 1, 0, 2)]


def test_the_card_names_base_data_licence_and_scores_and_is_pushed_under_the_runs_name(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = run.folder / "model"
    for _ in range(2):  # again after a resumed report
        said = publish.finish(run, model, REPORT, push=True)
    card = ModelCard.load(model / "README.md")
    own = card.data
    assert (own.base_model, own.datasets, own.license) == (
        "Qwen/Qwen3-0.6B",
        ["HuggingFaceH4/ultrachat_200k"],
        "apache-2.0",
    )
    (score,) = own.eval_results
    assert own.model_name == "敬語" and score.metric_type == "patched/greedy/share" and score.metric_value == 0.25
    assert score.metric_args == {"low": 0.1, "high": 0.4} and "licence" not in own.to_dict()
    assert card.text.count("| patched/greedy/share | 0.25 | 0.1 to 0.4 |") == 1 and "少なくなった" in card.text
    assert "None" not in card.text.partition("## Training procedure")[0]
    did = Hub.last.did
    assert (did["repo"], did["repo_id"], did["folder_path"], did["private"]) == ("敬語", "user/敬語", model, True)
    assert "https://huggingface.co/user/敬語" in said
    run.config.hub_model_id = "org/name"
    publish.finish(run, model, {}, push=True)
    assert Hub.last.did["repo"] == "org/name"


def test_nothing_is_sent_unless_it_is_asked_for_and_the_lines_fit_the_model(run, monkeypatch):
    monkeypatch.setattr(Hub, "create_repo", pytest.fail)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = run.folder / "model"
    whole = publish.finish(run, model, {}).splitlines()
    assert [line.split(":")[0] for line in whole] == ["ask", "serve", "push"] and f"vllm serve {model}" in whole[1]
    (model / "adapter_config.json").write_text("{}")
    adapter = publish.finish(run, model, {}).splitlines()
    assert [line.split(":")[0] for line in adapter] == ["ask", "serve", "merge", "push"]
    assert f"vllm serve Qwen/Qwen3-0.6B --enable-lora --lora-modules 敬語={model}" in adapter[1]
    assert [line.split(":")[0] for line in publish.finish(run, model, {}, generates=False).splitlines()] == ["push"]
    for line in (*whole[:1], *adapter[:1], adapter[2]):  # Python that compiles
        compile(line.partition('"')[2].rstrip('"'), "line", "exec")


def test_an_adapter_names_the_embedded_model_as_the_hub_does_and_is_loaded_on_the_one_that_is_here(
    tmp_path, monkeypatch
):
    base, adapter = tmp_path / "cache" / "smollm2", tmp_path / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "embedded.json").write_text("{}")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8}))
    assert (public_name(EMBEDDED_ALIAS), public_name(str(base)), public_name("a/b")) == (HUB_ID, HUB_ID, "a/b")
    publish_base(adapter)
    assert json.loads(config.read_text()) == {"base_model_name_or_path": HUB_ID, "r": 8}
    monkeypatch.setattr("trl_extensions.embedded.ensure_embedded_model", lambda: base)
    assert adapter_base(adapter) == str(base)
    config.write_text(json.dumps({"base_model_name_or_path": "a/b"}))
    (adapter / "embedded_base.txt").unlink()
    publish_base(adapter)
    assert adapter_base(adapter) == "a/b" and not (adapter / "embedded_base.txt").exists()
