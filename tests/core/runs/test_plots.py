"""Figures: what is drawn is what was given."""

import pytest


pytest.importorskip("matplotlib")

from trl_extensions.core.runs.plots import COLOURS, bar_plot, line_plot, panels, save


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_bars_have_heights_intervals_and_a_place_for_what_is_unknown(tmp_path):
    figure, (axes,) = panels()
    bar_plot(axes, ["greedy", "標本"], {"before": [estimate(0.5, 0.25, 0.75), 0.2], "after": [None, 0.1]}, unit=100)
    assert [bar.get_height() for bar in axes.patches] == [50, 20, 0, 10]
    assert [text.get_text() for text in axes.texts] == ["50", "20", "n/a", "10"]
    (segment,) = [s for c in axes.collections for s in c.get_segments() if len(s) and not (s != s).any()]
    assert segment[:, 1].tolist() == [25, 75]
    save(figure, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]


def test_lines_of_two_panels_share_one_legend_below(tmp_path):
    figure, (left, right) = panels(2)
    line_plot(left, {"$1, $2": ([0, 1, 2], [0.1, estimate(0.2, 0.15, 0.3), 0.4])})
    line_plot(right, {"$1, $2": ([0], [0.5]), "other": ([0, 1], [None, 0.5])}, unit=100)
    assert left.lines[0].get_ydata().tolist() == [0.1, 0.2, 0.4]
    assert left.lines[0].get_color() == COLOURS[0]
    assert right.lines[0].get_ydata().tolist() == [50]
    save(figure, tmp_path / "two.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$1, $2", "other"]
    assert not figure.legends[0].get_texts()[0].get_parse_math()


def test_no_names_no_legend(tmp_path):
    figure, (axes,) = panels()
    bar_plot(axes, ["a"], {"": [0.5]})
    assert not save(figure, tmp_path / "plain.png").legends
