"""What the commands of all methods share, on a method made here: options by old names, `run`, its stages, settings."""

import importlib
import io
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tqdm import tqdm

from trl_extensions.cli.main import main
from trl_extensions.cli.method import Method, Result, _honest_bars, tell
from trl_extensions.cli.parser import option_parser, peek
from trl_extensions.cli.recipes import known_recipes
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
    assert line.startswith(f"trl-ext: error: {package} is needed") and line.endswith(
        f"pip install {'scikit-learn' if package == 'sklearn' else package}"
    )


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


class TestOutput:
    def test_json_is_all_there_is_on_stdout(self, method, tmp_path, capsys):
        given = ["--folder", str(tmp_path / "語"), "--rounds", "1", "--json"]
        assert method.main(["run", *given]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == {"report": str(tmp_path / "語" / "report.md"), "complete": True, "counted": 1}
        assert "[1/1] round 0" in err and "語" in out
        assert method.main(["show", *given]) == 0
        assert json.loads(capsys.readouterr().out)["rounds"] == 1

    def test_quiet_prints_the_result_alone(self, method, tmp_path, capsys, monkeypatch):
        for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            monkeypatch.setenv(name, "0")
        assert method.main(["run", "--folder", str(tmp_path), "--quiet"]) == 0
        out, err = capsys.readouterr()
        assert (out.split(), err) == (["All", "counted.", "report:", str(tmp_path / "report.md")], "")

    def test_processes_started_meanwhile_write_to_stderr_too(self, capfd):
        def command():
            subprocess.run([sys.executable, "-c", "print('of a stage')"], check=True)
            return Result("", {"a": 1})

        assert tell(["--json"], command) == 0
        out, err = capfd.readouterr()
        assert json.loads(out) == {"a": 1} and "of a stage" in err

    def test_bars_in_a_log_are_lines(self, monkeypatch):
        log, times, display = io.StringIO(), iter(range(0, 1000, 12)), tqdm.display
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
        with _honest_bars(False):
            monkeypatch.setattr("trl_extensions.cli.method.time.monotonic", lambda: next(times))
            with tqdm(total=6, file=log, mininterval=0, desc="答え", disable=False) as bar:
                for _ in range(6):
                    bar.update()
                    bar.clear()
                    bar.refresh()
        text = log.getvalue()
        assert "\r" not in text and text.endswith("\n") and all(line.startswith("答え") for line in text.splitlines())
        assert 3 <= len(text.splitlines()) < 8 and "6/6" in text.splitlines()[-1]
        assert tqdm.display is display


class TestHelp:
    def test_it_needs_no_library_and_lists_the_methods_own_options(self):
        code = """
import sys
from trl_extensions.cli.main import main
for name in ("sami", "tnt", "w2s", "codeclm"):
    main([name, "run", "--help"])
main(["w2s", "run", "--task", "generation", "--help"])
main(["principles", "--help"])
print(sorted({"torch", "transformers", "trl", "datasets", "numpy"} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith("trl_extensions.tnt")))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        *text, loaded, after = done.stdout.splitlines()
        assert (loaded, after) == ("[]", "[]")  # what was made with stand-ins is not there for others to import
        for option in ("--principles", "--phrases", "--weak_models", "--strong", "--writer_dataset_name", "--task"):
            assert any(line.startswith(f"  {option} ") for line in text), option
        assert any(line.startswith("  --variant ff|rr|rf") for line in text)
        assert any("--config smollm2-135m/tnt/config_lora" in line for line in text)
        assert not any("--adam_beta1" in line for line in text) and len(text) < 1000

    def test_the_rest_is_listed_behind_it(self, capsys):
        assert main(["tnt", "run", "--help-all"]) == 0
        text = capsys.readouterr().out
        assert "--adam_beta1" in text and text.index("--phrases") < text.index("--adam_beta1") < text.index("--lora_r")
        assert main(["tnt", "run", "--help"]) == 0
        assert "--adam_beta1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("tnt", ["sample", "candidates", "annotate"]),
        ("sami", ["sample"]),
        ("w2s", ["evaluate"]),
        ("codeclm", ["metadata"]),
    ],
)
def test_commands_that_only_move_data_take_every_recipe_and_build_no_trainers_settings(
    name, commands, monkeypatch, tmp_path
):
    from transformers import TrainingArguments

    monkeypatch.setattr(
        TrainingArguments, "__post_init__", lambda self: pytest.fail("settings of a trainer were built")
    )
    method = importlib.import_module(f"trl_extensions.cli.{name}").METHOD
    recipes = [recipe for recipe in known_recipes() if recipe.split("/")[1] == name]
    assert recipes
    for command in commands:
        for recipe in recipes:
            argv = ["--config", recipe, "--output_dir", str(tmp_path)]
            parsed = method.parser(command, argv).parse_args_and_config(argv)
            (config,) = [own for own in parsed if hasattr(own, "warmup_steps")]
            assert (config.output_dir, config.seed, config.trust_remote_code) == (str(tmp_path), 42, False)
        (tmp_path / "c.yaml").write_text("lerning_rate: 1.0e-4\n")
        argv = ["--config", str(tmp_path / "c.yaml")]
        with pytest.raises(ValueError, match="`lerning_rate`; did you mean learning_rate"):
            method.parser(command, argv).parse_args_and_config(argv)


def test_a_run_is_pushed_once_and_its_trainers_push_nothing(monkeypatch):
    from trl_extensions.cli import tnt

    given = ["--use_cpu", "true", "--output_dir", "x", "--push_to_hub", "true", "--hub_model_id", "org/name"]
    run = tnt.METHOD.parse("train", given)
    assert run.pushes and not run.config.push_to_hub and run.config.hub_model_id == "org/name"
    assert not tnt.METHOD.parse("train", given[:4]).pushes
