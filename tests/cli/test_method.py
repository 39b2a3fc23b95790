"""What the commands of all methods share, on a method made here: options by old names, `run`, its stages, settings."""

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trl_extensions.cli.main import main
from trl_extensions.cli.method import Method, Result
from trl_extensions.cli.parser import option_parser, peek
from trl_extensions.core.options import message, renamed
from trl_extensions.core.runs.run import Run, Stage


pytest.importorskip("trl")


@renamed(form="task", old_folder="folder")
@dataclass
class Options:
    task: str = field(default="classification", metadata={"help": "What."})
    folder: str = field(default="runs", metadata={"help": "Where."})
    rounds: int = field(default=2, metadata={"help": "How often."})


class CountingRun(Run):
    complete = True

    def __init__(self, args):
        self.args, self.folder = args, Path(args.folder)

    def stages(self):
        for number in range(self.args.rounds):
            yield Stage("count", number, self.folder / f"{number}.json", f"round {number}")

    def settings(self):
        return {"settings.json": ({"task": self.args.task}, (self.folder / "0.json").exists())}

    def count(self, number):
        (self.folder / f"{number}.json").write_text(json.dumps([number, type(number).__name__]))

    def write_report(self):
        (self.folder / "report.json").write_text('{"counted": 1}')
        (self.folder / "report.md").write_text("# Counting\n\nAll counted.\n\nMore.\n")
        return self.folder / "report.md"

    def is_complete(self):
        return self.complete

    def needs_processes(self):
        return False


@pytest.fixture
def method():
    return Method(
        "counting",
        "usage: count",
        lambda argv: [Options],
        CountingRun,
        {"show": lambda run: Result(str(run.args), vars(run.args))},
    )


def test_run_performs_all_stages_and_prints_what_the_report_says_first(method, tmp_path, capsys, monkeypatch):
    assert method.main(["run", "--folder", str(tmp_path), "--rounds", "1"]) == 0
    assert json.loads((tmp_path / "0.json").read_text()) == [0, "int"]
    out = capsys.readouterr().out
    assert "All counted.\n" in out and "More." not in out and f"report: {tmp_path / 'report.md'}" in out
    monkeypatch.setattr(CountingRun, "complete", False)
    assert method.main(["run", "--folder", str(tmp_path), "--rounds", "1"]) == 3


def test_a_stage_gets_what_it_is_about_as_the_run_has_it(method, tmp_path):
    method.main(["stage", "count", "1", "--folder", str(tmp_path)])
    assert json.loads((tmp_path / "1.json").read_text()) == [1, "int"]


def test_usage_and_unknown_commands(method, capsys):
    assert (method.main(["--help"]), method.main([])) == (0, 2)
    assert capsys.readouterr().out == "usage: count\nusage: count\n"
    with pytest.raises(ValueError, match="unknown command 'shown'; did you mean show"):
        method.main(["shown"])
    with pytest.raises(ValueError, match="unknown command 'x'; choose from show, run"):
        method.main(["x"])


@pytest.mark.parametrize(("package", "name"), [("scipy", "sami"), ("sklearn", "w2s"), ("matplotlib", "codeclm")])
def test_a_missing_extra_stops_a_run_before_anything_is_loaded(monkeypatch, capsys, package, name):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setattr(Method, "parse", lambda *arguments: pytest.fail("the run was made"))
    assert main([name, "run", "--output_dir", "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"trl-ext: error: {package} is needed") and "pip install 'trl-extensions[run]'" in line


def test_what_needs_no_extra_runs_without_and_evaluate_is_stopped(monkeypatch, method):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert method.main(["show"]) == 0
    with pytest.raises(ImportError, match="scipy"):
        Method("counting", "", method.options, method.make, {"evaluate": pytest.fail}).main(["evaluate"])


class TestOldNames:
    def test_options_and_keys_by_old_names_work_with_a_line_each(self, method, tmp_path, capsys):
        (tmp_path / "c.yaml").write_text("form: reward\nrounds: 5\n")
        argv = ["--config", str(tmp_path / "c.yaml"), f"--old_folder={tmp_path}"]
        run = method.parse("show", argv)
        assert (run.args.task, run.args.folder, run.args.rounds) == ("reward", str(tmp_path), 5)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and all(line.startswith("trl-ext: ") for line in lines)
        assert "`form` is now called `task`" in lines[0] and "`old_folder` is now called `folder`" in lines[1]

    @pytest.mark.parametrize("old", ["--old_folder", "--old-folder"])
    def test_an_old_name_with_dashes_works_as_the_parsers_own_do(self, method, tmp_path, capsys, old):
        assert method.parse("show", [old, str(tmp_path)]).args.folder == str(tmp_path)
        assert "`old_folder` is now called `folder`" in capsys.readouterr().err

    def test_old_names_in_files_are_told_and_deprecations_of_libraries_are_not(self, method):
        def show(run):
            warnings.warn(message("keep", "selected"), FutureWarning, stacklevel=1)
            warnings.warn("`x` is deprecated", FutureWarning, stacklevel=1)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Method("counting", "", method.options, method.make, {"show": show}).main(["show"])
        assert [str(warning.message).partition(";")[0] for warning in caught] == ["`keep` is now called `selected`"]

    def test_a_stage_says_nothing_again(self, method, tmp_path, capsys):
        method.main(["stage", "count", "0", "--old_folder", str(tmp_path)])
        assert not capsys.readouterr().err

    def test_new_names_are_silent_and_unknown_ones_refused(self, method, tmp_path, capsys):
        assert method.parse("show", ["--task", "reward"]).args.task == "reward"
        assert not capsys.readouterr().err
        with pytest.raises(ValueError, match="--tsk; did you mean --task"):
            method.parse("show", ["--tsk", "reward"])
        (tmp_path / "c.yaml").write_text("tsk: reward\n")
        with pytest.raises(ValueError, match="`tsk`; did you mean task"):
            method.parse("show", ["--config", str(tmp_path / "c.yaml")])
        with pytest.raises(ValueError, match="--目的"):
            method.parse("show", ["--目的", "報酬"])

    def test_an_old_and_the_new_name_at_once_are_refused_unless_one_is_in_the_file(self, method, tmp_path):
        with pytest.raises(ValueError, match="`form` is now called `task`: give one"):
            method.parse("show", ["--form", "a", "--task=b"])
        (tmp_path / "c.yaml").write_text("form: a\ntask: b\n")
        config = ["--config", str(tmp_path / "c.yaml")]
        with pytest.raises(ValueError, match="`form` is now called `task`: give one"):
            method.parse("show", config)
        (tmp_path / "c.yaml").write_text("form: a\n")
        assert method.parse("show", [*config, "--task", "b"]).args.task == "b"

    def test_a_file_that_is_not_yaml_is_one_line_with_its_name(self, method, tmp_path):
        (tmp_path / "c.yaml").write_text("rounds:\n\t- 3\n")
        with pytest.raises(ValueError, match=r"c\.yaml is not YAML .*line 2"):
            method.parse("show", ["--config", str(tmp_path / "c.yaml")])

    def test_a_value_that_looks_like_an_old_name_stays(self):
        parsed = option_parser("x", [Options]).parse_args_and_config(["--task", "form"])
        assert parsed[0].task == "form"


def test_peek_finds_a_setting_by_any_name_the_command_line_first(tmp_path):
    (tmp_path / "c.yaml").write_text("form: generation\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert peek(config, "task", "form") == ["generation"]
    assert peek([*config, "--task", "reward"], "task", "form") == ["reward", "generation"]
    assert peek(["--train"], "train") == ["true"]
    assert peek(["--rounds", "3"], "task", "form") == []
    (tmp_path / "c.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not YAML"):
        peek(config, "task")
