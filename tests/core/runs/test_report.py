"""The run report's files, and the numbers in them."""

import json
import math

import pytest

from trl_extensions.core.runs.report import RunReport, mean_and_error, replacing, write_atomically


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
