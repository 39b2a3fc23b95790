"""Recipes by name, their paths, copies of them, and what of them gets into a wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trl_extensions.cli.main import main
from trl_extensions.cli.parser import read_settings
from trl_extensions.cli.recipes import beside, config_file, known_recipes


ROOT = Path(__file__).resolve().parents[2]
DEMO = "smollm2-135m/tnt/config_lora"


def test_every_recipe_is_listed_with_its_method_and_model(capsys):
    files = {str(path.relative_to(ROOT / "recipes")) for path in ROOT.glob("recipes/**/config*.yaml")}
    assert {f"{name}.yaml" for name in known_recipes()} == files
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}\n" in listed for name in known_recipes())
    assert f"{DEMO}\n    tnt, embedded:smollm2-135m-instruct" in listed


@pytest.mark.parametrize(
    "name", [DEMO, f"{DEMO}.yaml", f"recipes/{DEMO}.yaml", str(ROOT / "recipes" / f"{DEMO}.yaml")]
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_recipe_is_found_from_anywhere_and_names_its_files_from_where_it_lies(
    name, elsewhere, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path if elsewhere else ROOT)
    settings = read_settings(name)
    assert Path(settings["prompts"]).resolve() == ROOT / "recipes/smollm2-135m/sami/queries.jsonl"
    assert settings["output_dir"] == "runs/smollm2-135m-tnt"
    # From the clone the path is the same however the recipe was named: it binds a run's folder
    assert elsewhere or settings["prompts"] == "recipes/smollm2-135m/sami/queries.jsonl"


def test_an_unknown_recipe_is_one_line_with_the_likely_one(capsys, monkeypatch):
    monkeypatch.setattr("trl_extensions.cli.method.check_run_extra", lambda: None)
    assert main(["tnt", "run", "--config", "smolm2-135m/tnt/config_lora"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"did you mean {DEMO}?" in line


def test_values_that_are_no_paths_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reward", "質問.jsonl", "owner/name", "1.5"):
        (tmp_path / "own" / name).mkdir(parents=True)
    assert beside("reward", "own") == "reward"  # a word, though a folder has that name
    assert beside("質問.jsonl", "own") == "own/質問.jsonl"
    assert beside(["./reward", "gone.jsonl", 1.5, None], "own") == ["own/reward", "gone.jsonl", 1.5, None]
    assert beside({"model": "owner/name"}, "own") == {"model": "own/owner/name"}
    assert beside([".", "/", "..."], "own") == [".", "/", "..."]  # where a sampled text stops
    (tmp_path / "own" / "c.yaml").write_text("output_dir: owner/name\nprompts: owner/name\nphrases: [質問.jsonl]\n")
    known = {"output_dir": "owner/name", "prompts": "own/owner/name", "phrases": ["質問.jsonl"]}
    assert read_settings("own/c.yaml") == known


def test_a_copy_holds_what_the_recipe_names_and_replaces_nothing(tmp_path, capsys):
    folder = tmp_path / "写し"
    for name in (DEMO, "smollm2-135m/codeclm/config_lora"):
        folder = folder / "deeper"
        assert main(["recipes", "copy", name, str(folder)]) == 0
        assert f"--config {folder / 'config_lora.yaml'}" in capsys.readouterr().out
        before, after = read_settings(config_file(name)), read_settings(str(folder / "config_lora.yaml"))
        assert before.keys() == after.keys()
        named = {key for key in before if before[key] != after[key]}
        assert named == (
            {"prompts"} if name == DEMO else {"metadata", "prompt_folder", "decontaminate_against", "benchmark"}
        )
        for key in named:
            paths = after[key] if isinstance(after[key], list) else [after[key]]
            assert all(Path(path).resolve().is_relative_to(folder) and Path(path).exists() for path in paths)
    assert main(["recipes", "copy", DEMO, str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_wheel_has_every_file_of_the_recipes_and_the_metrics():
    code = """
import os, setuptools
from distutils.core import run_setup
command = run_setup("setup.py", ["build_py"], stop_after="commandline").get_command_obj("build_py")
command.ensure_finalized()
for package, folder, _, files in command.data_files:
    for file in files:
        print(os.path.join(package.replace(".", "/"), file))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {
        line for line in out.splitlines() if line.startswith(("trl_extensions/recipes", "trl_extensions/metrics"))
    }
    files = [path for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    wanted = {f"trl_extensions/recipes/{path.relative_to(ROOT / 'recipes')}" for path in files}
    wanted |= {f"trl_extensions/metrics/{name}/{name}.py" for name in ("pgr", "crr", "win_rate")}
    assert wanted == found


def test_environment_variables_of_a_recipe_are_set(tmp_path, monkeypatch):
    from trl_extensions.cli import tnt

    monkeypatch.delenv("OF_A_RECIPE", raising=False)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"env": {"OF_A_RECIPE": 1}, "logs": "x.jsonl"}))
    tnt.METHOD.parser("candidates", []).parse_args_and_config(["--config", str(tmp_path / "c.yaml")])
    assert os.environ.pop("OF_A_RECIPE") == "1"
