"""What others wrote runs nothing and does not run for ever."""

import json

import pytest

from trl_extensions.cli import main as cli
from trl_extensions.core.generation import EngineArguments, create_engine
from trl_extensions.core.text import TextClassifier
from trl_extensions.sami.checks import Check
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator
from trl_extensions.tnt.report import _marked
from trl_extensions.weak_to_strong.generation.scorers import phrases_scorer


@pytest.mark.parametrize("load", [lambda name: create_engine(EngineArguments(), name), TextClassifier])
def test_code_that_lies_with_a_model_is_not_run(tmp_path, monkeypatch, capsys, load):
    folder, trace = tmp_path / "strange", tmp_path / "run"
    folder.mkdir()
    names = {
        "AutoConfig": "code.Own",
        "AutoModelForCausalLM": "code.Own",
        "AutoModelForSequenceClassification": "code.Own",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": names}))
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    monkeypatch.setitem(cli.COMMANDS, "embedded", ("main:load", ""))
    monkeypatch.setattr(cli, "load", lambda argv: load(str(folder)), raising=False)
    assert cli.main(["embedded"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-ext: error: ") and str(folder) in error and "trust_remote_code" in error
    assert not trace.exists()


@pytest.mark.parametrize("text", ["x" * 4000, "の" * 4000])
def test_patterns_that_try_every_way_are_stopped(monkeypatch, text):
    monkeypatch.setattr("trl_extensions.core.text._LONGEST_SEARCH", 0.1)
    pattern = f"({text[0]}+{text[0]}+)+!"
    for use in (
        lambda: Check(regex=pattern).holds(text),
        lambda: PhraseAnnotator(patterns=[pattern]).annotate([text], [""]),
        lambda: phrases_scorer(patterns=[pattern]).score([""], [text]),
    ):
        with pytest.raises(ValueError, match=r"takes more than 0.1 seconds for a text of 4000 characters"):
            use()


def test_only_our_own_marks_are_bold():
    reader = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    text = "**a** <b>ひどい</b> [x](http://evil.example) `y`"
    start = text.index("ひどい")
    marked = _marked({"completion": text, "negative_spans": [[start, start + 3]]})
    children = next(token.children for token in reader.parse(marked) if token.type == "inline")
    assert "".join(child.content for child in children) == text
    bold = [child.type for child in children].index("strong_open")
    assert children[bold + 1].content == "ひどい" and [child.type for child in children].count("strong_open") == 1
