import os
import subprocess
import sys
import types

import pytest

from trl_extensions import __version__
from trl_extensions.cli import main as cli


HEAVY = {"torch", "transformers", "trl", "datasets", "matplotlib"}


def command(monkeypatch, action):
    """Make `trl-ext sami` run `action(argv)`, raised or returned from code that counts as this package's."""
    module = types.ModuleType("trl_extensions.cli.sami")
    module.main = action
    monkeypatch.setitem(sys.modules, "trl_extensions.cli.sami", module)
    monkeypatch.delenv("TRL_EXT_DEBUG", raising=False)


def raiser(error, module="trl_extensions.cli.sami"):
    namespace = {"__name__": module, "error": error}
    exec("def main(argv):\n    raise error", namespace)
    return namespace["main"]


def test_arguments_reach_the_command_untouched(monkeypatch):
    seen = []
    command(monkeypatch, lambda argv: seen.append(argv) or 5)
    assert cli.main(["sami", "--help", "--debug", "--version", "--", "x", "--config=a b"]) == 5
    assert seen == [["--help", "--debug", "--version", "--", "x", "--config=a b"]]


def test_a_command_that_returns_nothing_succeeds(monkeypatch):
    command(monkeypatch, lambda argv: None)
    assert cli.main(["sami", "run"]) == 0


@pytest.mark.parametrize("module", ["trl_extensions.cli.main", "trl_extensions"])
def test_help_lists_the_commands_and_loads_nothing_heavy(module):
    code = f"""
import sys, runpy
sys.argv = ["trl-ext", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as end:
    print("code", end.code)
print("heavy", sorted({HEAVY!r} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("principles", "sami", "recipes", "env", "embedded"):
        assert f"\n  {name} " in out
    assert out.splitlines()[-2:] == ["code 0", "heavy []"]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-ext {__version__}\n"


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys):
    assert cli.main(["samii"]) == 2
    assert "'samii'; did you mean sami?" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "choose from principles, sami" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, FileNotFoundError])
def test_our_errors_are_one_line(monkeypatch, capsys, kind):
    command(monkeypatch, raiser(kind("row 3: `prompts` is empty;\n   drop the row")))
    assert cli.main(["sami", "train"]) == 2
    assert capsys.readouterr().err == "trl-ext: error: row 3: `prompts` is empty; drop the row\n"


def test_missing_file_is_named(monkeypatch, capsys, tmp_path):
    command(monkeypatch, lambda argv: (tmp_path / "none.yaml").read_text())
    assert cli.main(["sami", "train"]) == 2
    assert capsys.readouterr().err == f"trl-ext: error: No such file or directory: {tmp_path / 'none.yaml'}\n"


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(monkeypatch, how):
    command(monkeypatch, raiser(ValueError("bad row")))
    if how == "environment":
        monkeypatch.setenv("TRL_EXT_DEBUG", "1")
    with pytest.raises(ValueError, match="bad row"):
        cli.main((["--debug"] if how == "flag" else []) + ["sami", "train"])


def test_errors_in_the_middle_of_work_keep_their_traceback(monkeypatch):
    command(monkeypatch, raiser(RuntimeError("shapes do not match"), module="torch.nn.functional"))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["sami", "train"])


def test_unknown_yaml_key_is_one_line(monkeypatch, capsys, tmp_path):
    """TRL's parser raises from its own module; the user still sees one line."""
    pytest.importorskip("trl")
    from dataclasses import dataclass

    @dataclass
    class Arguments:
        steps: int = 1

    config = tmp_path / "config.yaml"
    config.write_text("stepz: 3\n")

    def train(argv):
        from trl import TrlParser

        TrlParser((Arguments,)).parse_args_and_config(args=argv)

    command(monkeypatch, train)
    assert cli.main(["sami", "--config", str(config)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trl-ext: error: ") and "stepz" in err and err.count("\n") == 1


def test_interrupt_says_that_work_is_kept(monkeypatch, capsys):
    command(monkeypatch, raiser(KeyboardInterrupt()))
    assert cli.main(["sami", "run"]) == 130
    err = capsys.readouterr().err
    assert "resume" in err and err.count("\n") == 1


def test_embedded_prints_the_path_alone(tmp_path):
    pytest.importorskip("gguf")
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    environment.pop("TRL_EXT_DEBUG", None)
    arguments = [sys.executable, "-m", "trl_extensions", "embedded", "--cache_dir", str(tmp_path)]
    failed = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.splitlines()[-1].startswith("trl-ext: error: ")
    assert "Traceback" not in failed.stderr
