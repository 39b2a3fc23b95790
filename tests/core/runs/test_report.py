"""The run report's files, and the numbers in them."""

import json
import math

import pytest

from trl_extensions.core.runs.report import Markdown, RunReport, mean_and_error, quoted, replacing, write_atomically


def test_mean_and_error_by_hand():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, over n - 1 = 3, over n = 4
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx(math.sqrt(14 / 3 / 4)))
    assert math.isnan(mean_and_error([5.0])[1]) and math.isnan(mean_and_error([])[0])


def test_cells_cannot_break_the_table(tmp_path):
    report = RunReport("Title")
    report.table(["a", "b"], [["x | y", "two\nlines"], [1, 0.12345]])
    report.data = {"n": 1}
    lines = report.write(tmp_path).read_text().splitlines()
    assert lines == ["# Title", "", "| a | b |", "| --- | --- |", "| x \\| y | two<br>lines |", "| 1 | 0.123 |"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"n": 1}


HOSTILE = {
    "html": "<script>alert(1)</script> <img src=x onerror=alert(1)> &lt;b&gt; <!-- -->",
    "cells": "a \\| b | c \\",
    "headings": "# one\r\n## two\n\nthree\n===\n---",
    "links": "[me](javascript:alert(1)) ![x](http://evil.example/x.png) [a][b] [a]: http://evil.example <http://evil.example>",
    "bare links": "see https://evil.example/?q=1 or www.evil.example",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ snake_case 2*3*4",
    "fences": "```\ncode `x`\n~~~\n> quote\n- list\n1. number",
    "controls": "a\x00b\x1b[2Jc\u202ed\x85e\u2028f\ud800",
    "japanese": "**「見出し」**\n# 題 | 表 <b>太字</b> [リンク](http://evil.example) ｜ ＃",
    "long": "長い" * 5000,
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_others_wrote_is_shown_and_nothing_else(tmp_path, name):
    """Read back by another Markdown reader: the text is the whole of its cell, paragraph and heading."""
    reader = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    text = HOSTILE[name]
    report = RunReport(text)
    report.data = {"text": text}
    report.heading(text)
    report.text(f"**{quoted(text)}**")
    report.table([text, "n"], [[text, 0.5], [Markdown("**ours**"), 1]])
    tokens = reader.parse(report.write(tmp_path).read_text(encoding="utf-8"))
    shapes = [token.type for token in tokens if token.type.endswith("_open")]
    table = [
        "table_open",
        "thead_open",
        *["tr_open", "th_open", "th_open"],
        "tbody_open",
        *["tr_open", "td_open", "td_open"] * 2,
    ]
    assert shapes == ["heading_open", "heading_open", "paragraph_open", *table]
    inline = [token.children for token in tokens if token.type == "inline"]
    ours = {"text", "text_special", "strong_open", "strong_close", "html_inline"}
    assert {child.type for children in inline for child in children} <= ours
    assert {c.content for children in inline for c in children if c.type == "html_inline"} <= {"<br>"}
    shown = ["".join("\n" if c.type == "html_inline" else c.content for c in children) for children in inline]
    wanted = "\n".join(text.strip("\r\n").splitlines())
    wanted = "".join("\ufffd" if not (own.isprintable() or own == "\n") else own for own in wanted)
    wanted = wanted if len(wanted) <= 1500 else wanted[:1499] + "…"
    assert shown == [wanted, wanted, wanted, wanted, "n", wanted, "0.500", "ours", "1"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.md"
    write_atomically(path, "Grüße")
    assert path.read_bytes() == "Grüße".encode()
    with pytest.raises(ValueError, match="half way"), replacing(path) as file:
        file.write(b"new")
        raise ValueError("half way")
    assert path.read_bytes() == "Grüße".encode() and [own.name for own in tmp_path.iterdir()] == ["report.md"]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == "Grüße".encode()
    assert path.read_bytes() == b"new"
