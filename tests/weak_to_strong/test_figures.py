"""What the pictures show: every number where it belongs."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from trl_extensions.weak_to_strong.figures import draw_pgr, draw_scores, draw_toxicity


def estimate(value, low=None, high=None, per_seed=()):
    return {"value": value, "low": low, "high": high, "per_seed": list(per_seed)}


def gap(value, low=None, high=None, undefined_share=0.0, reliable=True):
    return {
        "value": value, "low": low, "high": high, "undefined_share": undefined_share, "reliable": reliable,
        "reason": None if value is not None else "no gap",
    }  # fmt: skip


def task(values, gaps=None):
    names = list(values)
    return {
        "models": names,
        "strong": [name for name in names if name not in ("weak", "ceiling")],
        "scores": {name: {"accuracy": own, "nll": own} for name, own in values.items()},
        "pgr": {"accuracy": gaps or {}},
    }


VALUES = {
    "weak": estimate(0.6, 0.55, 0.65, [0.58, 0.62]),
    "soft_ce": estimate(0.7, 0.66, 0.74, [0.7, 0.7]),
    "ceiling": estimate(0.8, 0.77, 0.83, [0.78, 0.82]),
}


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def error_bars(axes):
    """Low and high ends of the vertical intervals."""
    return [sorted(y for _, y in s) for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()]


class TestScores:
    def test_bars_intervals_seeds_and_lines_in_percent(self, tmp_path):
        (axes,) = draw_scores({"task": task(VALUES)}, tmp_path / "scores.png").axes
        assert is_png(tmp_path / "scores.png")
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([60, 70, 80])
        np.testing.assert_allclose(error_bars(axes), [[55, 65], [66, 74], [77, 83]])
        dots = [c.get_offsets() for c in axes.collections if not hasattr(c, "get_segments")]
        np.testing.assert_allclose([own[:, 1] for own in dots], [[58, 62], [70, 70], [78, 82]])
        assert dots[1][0, 0] != dots[1][1, 0]  # equal seeds do not hide each other
        lines = {line.get_linestyle(): line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
        assert lines[":"] == pytest.approx(60) and lines["--"] == pytest.approx(80)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["weak", "soft_ce", "ceiling"]

    def test_a_cut_axis_is_said(self, tmp_path):
        (axes,) = draw_scores({"task": task(VALUES)}, tmp_path / "scores.png").axes
        assert 0 < axes.get_ylim()[0] < 55
        assert f"axis starts at {axes.get_ylim()[0]:.3g}" in axes.get_ylabel()
        wide = {"weak": estimate(0.1), "soft_ce": estimate(0.5), "ceiling": estimate(0.9)}
        (axes,) = draw_scores({"task": task(wide)}, tmp_path / "scores.png").axes
        assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "accuracy (%)"

    def test_nats_are_not_in_percent(self, tmp_path):
        (axes,) = draw_scores({"task": task(VALUES)}, tmp_path / "scores.png", score="nll").axes
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.6, 0.7, 0.8])

    def test_a_panel_for_each_task(self, tmp_path):
        tasks = {f"task {i}": task(VALUES) for i in range(4)}
        figure = draw_scores(tasks, tmp_path / "scores.png")
        assert [axes.get_title() for axes in figure.axes] == list(tasks)

    def test_no_two_of_ten_models_look_alike(self, tmp_path):
        losses = ["soft_ce", "confidence", "product", "reverse_kl"]
        names = [*losses, *(f"{name}+weights" for name in losses), "w2s", "distilled"]
        (axes,) = draw_scores({"": task({name: estimate(0.5) for name in names})}, tmp_path / "scores.png").axes
        looks = {
            name: (to_hex(bar.get_facecolor()), bar.get_hatch()) for name, bar in zip(names, axes.patches, strict=True)
        }
        assert len(set(looks.values())) == 10
        assert all(looks[name][0] == looks[f"{name}+weights"][0] for name in losses)

    def test_a_loss_keeps_its_colour_between_figures(self, tmp_path):
        few, many = (
            draw_scores({"": task({name: estimate(0.5) for name in names})}, tmp_path / "scores.png")
            .axes[0]
            .patches[-1]
            for names in (["weak", "product"], ["weak", "weak:a", "soft_ce", "w2s", "product"])
        )
        assert few.get_facecolor() == many.get_facecolor()

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(ValueError, match="no tasks to draw"):
            draw_scores({}, tmp_path / "scores.png")


class TestPGR:
    def draw(self, gaps, tmp_path):
        values = {"weak": estimate(0.6), **{name: estimate(0.7) for name in gaps}, "ceiling": estimate(0.8)}
        (axes,) = draw_pgr({"task": task(values, gaps)}, tmp_path / "pgr.png").axes
        assert is_png(tmp_path / "pgr.png")
        return axes

    def test_values_and_intervals(self, tmp_path):
        axes = self.draw({"soft_ce": gap(0.4, 0.1, 0.7), "product": gap(-0.2, -0.5, 0.1)}, tmp_path)
        points = [line for line in axes.lines if line.get_marker() == "o"]
        np.testing.assert_allclose([line.get_xydata()[0] for line in points], [[0.4, 0], [-0.2, 1]])
        spans = [
            line.get_xdata() for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
        ]
        np.testing.assert_allclose(spans, [[0.1, 0.7], [-0.5, 0.1]])
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() in (":", "--")]
        assert sorted(marks) == [0, 1]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["soft_ce", "product"]

    def test_undefined_is_written_not_drawn(self, tmp_path):
        axes = self.draw({"soft_ce": gap(None), "product": gap(None, undefined_share=None)}, tmp_path)
        texts = [text.get_text() for text in axes.texts]
        assert "undefined: no gap" in texts and "undefined: no ceiling model" in texts
        assert not [line for line in axes.lines if line.get_marker() == "o"]

    def test_unreliable_is_open_and_far_out_is_an_arrow(self, tmp_path):
        axes = self.draw({"soft_ce": gap(0.4, -7, 9, 0.1, reliable=False), "product": gap(0.5, 0.3, 0.6)}, tmp_path)
        (unsure, sure) = (line for line in axes.lines if line.get_marker() == "o")
        assert unsure.get_markerfacecolor() == "white" and sure.get_markerfacecolor() != "white"
        arrows = {line.get_marker(): line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("<", ">")}
        assert arrows == {"<": axes.get_xlim()[0], ">": axes.get_xlim()[1]} == {"<": -1.0, ">": 2.0}

    def test_no_strong_model(self, tmp_path):
        with pytest.raises(ValueError, match="no model trained on weak labels"):
            draw_pgr({"task": task({"weak": estimate(0.6)})}, tmp_path / "pgr.png")


class TestToxicity:
    def test_both_panels(self, tmp_path):
        def own(*values):
            return {
                name: {"expected_maximum": estimate(v, v - 0.05, v + 0.05), "probability": estimate(v / 2, 0, v)}
                for name, v in zip(("original", "w2s"), values, strict=False)
            }

        evaluation = {
            "models": ["original", "w2s"],
            "kinds": {
                "greedy": {"samples": 1, "models": own(0.4)},
                "sampled": {"samples": 8, "models": own(0.6, 0.5)},
            },
        }
        left, right = draw_toxicity(evaluation, tmp_path / "toxicity.png").axes
        assert is_png(tmp_path / "toxicity.png")
        assert [bar.get_height() for bar in left.patches] == pytest.approx([0.4, 0.6, 0.5])
        assert [bar.get_height() for bar in right.patches] == pytest.approx([0.2, 0.3, 0.25])
        np.testing.assert_allclose(error_bars(left), [[0.35, 0.45], [0.55, 0.65], [0.45, 0.55]])
        # Greedy has one model, the second place has a sampled bar only
        centres = [bar.get_x() + bar.get_width() / 2 for bar in left.patches]
        assert centres == pytest.approx([-0.2, 0.2, 1.2])
        assert left.get_legend_handles_labels()[1] == ["greedy, 1 a prompt", "sampled, 8 a prompt"]
