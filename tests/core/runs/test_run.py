"""A run's stages, its settings and its folder."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from trl_extensions.core.runs.run import Run, Stage, check_resume, folder_lock, mark_done


def test_same_settings_resume_and_others_are_named(tmp_path):
    path = tmp_path / "settings.json"
    check_resume(path, {"a": 1, "deep": {"b": (1, 2)}}, made="rows.jsonl", started=False)
    check_resume(path, {"a": 1, "deep": {"b": (1, 2)}}, made="rows.jsonl", started=True)
    with pytest.raises(ValueError, match=r"rows.jsonl .*: a was 1, now 2; deep.b was \[1, 2\], now \[3\]"):
        check_resume(path, {"a": 2, "deep": {"b": (3,)}}, made="rows.jsonl", started=True)


def test_settings_hold_no_passwords(tmp_path):
    def settings(secret):
        extra = {"api_key": secret, "eos_token": "</s>", "max_tokens_field": "max_tokens"}
        judge = f"{{base_url: https://me:{secret}@host/v1?key={secret}&api-version=3, model: m}}"
        return {"judge": judge, "extra": extra, "text": json.dumps({"Authorization": f"Bearer {secret}", "鍵": 1})}

    path = tmp_path / "settings.json"
    check_resume(path, settings("t0psecret"), made="rows", started=False)
    kept = path.read_text(encoding="utf-8")
    assert "t0psecret" not in kept and "me" not in json.loads(kept)["judge"].split("@")[0]
    assert "@host/v1?key=***&api-version=3, model: m}" in kept and "</s>" in kept and '"max_tokens"' in kept
    check_resume(path, settings("another"), made="rows", started=True)


def test_nothing_made_yet_means_free(tmp_path):
    path = tmp_path / "new" / "settings.json"
    check_resume(path, {"a": 1}, made="rows", started=False)
    check_resume(path, {"a": 2}, made="rows", started=False)
    assert json.loads(path.read_text()) == {"a": 2}


@pytest.mark.parametrize("content", [None, "{half"])
def test_lost_or_broken_settings_are_not_guessed(tmp_path, content):
    path = tmp_path / "settings.json"
    if content:
        path.write_text(content)
    with pytest.raises(ValueError, match="missing or not JSON"):
        check_resume(path, {"a": 1}, made="rows", started=True)


@dataclass
class Report:
    path: Path
    rows: int
    summary = "3 rows"


class TwoStages(Run):
    """Writes `made` and `seen`, and refuses to go on with another seed once `made` is there."""

    def __init__(self, folder, seed=0):
        self.folder, self.seed, self.performed = folder, seed, []

    def stages(self):
        yield Stage("make", "round 1", self.folder / "made.json", "making")
        yield Stage("look", "round 1", self.folder / "seen.json", "looking")

    def settings(self):
        return {"settings.json": ({"seed": self.seed}, (self.folder / "made.json").exists())}

    def make(self, of):
        self.performed.append(("make", of))
        mark_done(self.folder / "made.json", Report(self.folder, 3))

    def look(self, of):
        self.performed.append(("look", of))
        mark_done(self.folder / "seen.json", Report(self.folder, 4))

    def write_report(self):
        (self.folder / "report.md").write_text("# Done\n")
        return self.folder / "report.md"


def test_a_run_skips_what_is_done_and_binds_its_settings(tmp_path, capsys):
    run = TwoStages(tmp_path / "run")
    assert run.execute() == tmp_path / "run" / "report.md"
    assert run.performed == [("make", "round 1"), ("look", "round 1")]
    assert json.loads((run.folder / "made.json").read_text()) == {"path": str(run.folder), "rows": 3}
    assert "[2/2] looking" in capsys.readouterr().out
    (run.folder / "seen.json").unlink()
    asked = []
    TwoStages(run.folder).execute(lambda *stage: asked.append(stage))
    assert asked == [("look", "round 1")]
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        TwoStages(run.folder, seed=1).execute()


def test_what_a_check_refuses_leaves_no_folder(tmp_path):
    class Refused(TwoStages):
        def check(self):
            raise ValueError("`prompts` is missing")

    with pytest.raises(ValueError, match="prompts"):
        Refused(tmp_path / "run").execute()
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_one_process_and_a_dead_one_gives_it_back(tmp_path):
    program = (
        "import sys\nfrom trl_extensions.core.runs.run import folder_lock\n"
        "with folder_lock(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    run = TwoStages(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", program, run.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=r"run: another process"):
            run.execute()
        assert not run.performed
        other.kill()
    run.execute()
    with folder_lock(run.folder):
        pass
