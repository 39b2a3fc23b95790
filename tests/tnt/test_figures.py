"""What the pictures show: every number where it belongs."""

import numpy as np
import pytest

from trl_extensions.tnt.figures import BASELINES, STYLES, draw_tradeoff, draw_two_axes
from trl_extensions.tnt.loss import VARIANTS


def point(variant, alpha, reduction, preservation, **more):
    return {"variant": variant, "alpha": alpha, "reduction": reduction, "preservation": preservation} | more


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class TestTradeoff:
    def test_a_line_per_variant_in_percent_over_alpha(self, tmp_path):
        points = [
            point("ff", 5, 0.9, 0.5),
            point("ul", 1, 0.8, 0.1),
            point("ff", 1, 0.5, 0.75),
            point("ff", 2, 0.7, 0.6),
        ]
        (axes,) = draw_tradeoff(points, tmp_path / "tradeoff.png").axes
        assert is_png(tmp_path / "tradeoff.png")
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"ff", "ul (baseline)"}
        np.testing.assert_allclose(lines["ff"].get_xydata(), [[50, 75], [70, 60], [90, 50]])  # by alpha, not as given
        np.testing.assert_allclose(lines["ul (baseline)"].get_xydata(), [[80, 10]])

    def test_baselines_are_dashed_and_no_two_lines_look_alike(self, tmp_path):
        points = [point(variant, 1, 0.1 * i, 0.5) for i, variant in enumerate(STYLES)]
        (axes,) = draw_tradeoff(points, tmp_path / "tradeoff.png").axes
        assert len(axes.lines) == 8
        styles = {line.get_label().removesuffix(" (baseline)"): line.get_linestyle() for line in axes.lines}
        assert {variant for variant, style in styles.items() if style == "--"} == set(BASELINES)
        assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 8

    def test_every_loss_has_a_style(self):
        assert set(STYLES) == {*VARIANTS, "sft"}

    def test_alphas_stand_at_their_points(self, tmp_path):
        points = [point("rr", 0.5, 0.2, 0.9), point("rr", 10.0, 0.8, 0.4), point("sft", 1.0, 0.3, 0.3)]
        (axes,) = draw_tradeoff(points, tmp_path / "tradeoff.png").axes
        labels = {text.get_text(): text.xy for text in axes.texts}
        assert set(labels) == {"0.5", "10"}  # plain SFT has no alpha
        assert labels["0.5"] == pytest.approx((20, 90)) and labels["10"] == pytest.approx((80, 40))

    def test_alphas_of_close_points_do_not_cover_each_other(self, tmp_path):
        points = [point(v, 1, 0.9 + 0.004 * i, 0.5) for i, v in enumerate(("ff", "rr", "rf", "fll"))]
        points.append(point("ul", 1, 0.0, 0.0))
        figure = draw_tradeoff(points, tmp_path / "tradeoff.png")
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        assert len(boxes) == 5
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_error_bars_only_where_there_are_intervals(self, tmp_path):
        points = [
            point("ff", 1, 0.5, 0.75, preservation_interval=[0.7, 0.85], reduction_interval=[0.4, 0.55]),
            point("ff", 2, 0.6, 0.7),
        ]
        (axes,) = draw_tradeoff(points, tmp_path / "tradeoff.png").axes
        bars = [s for bars in axes.collections for s in bars.get_segments() if len(s) and np.isfinite(s).all()]
        np.testing.assert_allclose(sorted(bar.tolist() for bar in bars), [[[40, 75], [55, 75]], [[50, 70], [50, 85]]])

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ([], "no points to draw"),
            ([point("ff", 1, 0.5, 0.5), point("dpo", 1, 0.5, 0.5)], "point 1: variant 'dpo' is not one of ff, rr"),
            ([point("ff", 1, 90, 0.5)], "point 0: reduction = 90 is no share"),
            ([point("ff", 1, 0.9, -0.5)], "point 0: preservation = -0.5 is no share"),
            ([point("ff", 1, None, 0.5)], "point 0: reduction = None is no share"),
        ],
    )
    def test_points_that_cannot_be_drawn(self, tmp_path, points, message):
        with pytest.raises(ValueError, match=message):
            draw_tradeoff(points, tmp_path / "tradeoff.png")
        assert not (tmp_path / "tradeoff.png").exists()


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


@pytest.fixture
def evaluation():
    return {
        "original": {
            "greedy": {"n": 50, "share": estimate(0.24, 0.14, 0.37)},
            "sampled": {"n": 200, "share": estimate(0.3, 0.19, 0.44)},
        },
        "patched": {
            "greedy": {"n": 50, "share": estimate(0.02, 0.0, 0.1)},
            "sampled": {"n": 199, "share": estimate(0.0, 0.0, 0.07)},
        },
        "preservation": {
            "clean": {
                "n": 38, "exact_match": estimate(0.5, 0.35, 0.65), "bleu": 80.0, "rouge_l": 0.9,
                "first_difference": 0.7,
            },
        },
    }  # fmt: skip


class TestTwoAxes:
    def test_both_panels_in_percent(self, tmp_path, evaluation):
        left, right = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        assert is_png(tmp_path / "two_axes.png")
        heights = {
            name: [bar.get_height() for bar in series]
            for series, name in zip(*left.get_legend_handles_labels(), strict=True)
        }
        assert heights == {"original": pytest.approx([24, 30]), "patched": pytest.approx([2, 0])}
        assert [tick.get_text() for tick in left.get_xticklabels()] == ["greedy\n(n = 50)", "sampled\n(n = 200, 199)"]
        assert [bar.get_height() for bar in right.patches] == pytest.approx([50, 80, 90, 70])
        assert "38" in right.get_xlabel()

    def test_intervals_end_where_they_should(self, tmp_path, evaluation):
        left, right = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        ends = [
            sorted(y for _, y in segment)
            for axes in (left, right)
            for bars in axes.collections
            for segment in bars.get_segments()
        ]
        np.testing.assert_allclose(ends, [[14, 37], [19, 44], [0, 10], [0, 7], [35, 65]], atol=1e-9)
        assert left.get_ylim()[1] > 44

    def test_one_kind_of_sampling(self, tmp_path, evaluation):
        del evaluation["original"]["sampled"], evaluation["patched"]["sampled"]
        left, _ = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        assert [bar.get_height() for bar in left.patches] == pytest.approx([24, 2])

    def test_nothing_clean_is_written_not_drawn_as_zero(self, tmp_path, evaluation):
        evaluation["preservation"]["clean"] = {
            "n": 0, "exact_match": estimate(None), "bleu": None, "rouge_l": None, "first_difference": None
        }  # fmt: skip
        _, right = draw_two_axes(evaluation, tmp_path / "two_axes.png").axes
        assert [text.get_text() for text in right.texts] == ["n/a"] * 4

    def test_nothing_in_common(self, tmp_path, evaluation):
        evaluation["patched"] = {}
        with pytest.raises(ValueError, match="both need an entry `greedy` or `sampled`"):
            draw_two_axes(evaluation, tmp_path / "two_axes.png")
