import math
import re

import pytest

from rtpurbo.reporting.html.axes import length_axis, linear_axis
from rtpurbo.reporting.html.plots import HEIGHT, WIDTH, Series, averaged, bar_plot, line_plot
from tests.reporting.html.parsed import Page

X, Y = length_axis([4096, 8192]), linear_axis("score", [0, 100])


def test_lines_with_markers_hints_legend_and_words():
    dense = Series("full", [(4096, 100.0), (8192, 50.0)], None)
    sparse = Series("sparse", [(4096, 75.0), (8192, math.nan)], 9)
    page = Page(line_plot("How well", [sparse, dense], X, Y))
    assert page.text("figcaption") == "How well"
    assert page.text("title") == "full: 100 at 4K full: 50 at 8K sparse: 75 at 4K"
    assert page.text("li") == "sparse full"
    drawing = page.attributes("svg")[0]
    assert drawing["aria-label"] == (
        "How well. score against tokens of context. sparse: 75 at 4K; full: 100 at 4K to 50 at 8K"
    )
    (line,) = page.attributes("polyline")
    assert line["class"] == "line dense"
    (x, y), (to_x, to_y) = (map(float, point.split(",")) for point in line["points"].split())
    assert 0 < x < to_x < WIDTH
    assert 0 < y < to_y < HEIGHT
    assert "mark s1 dashed" in {each["class"] for each in page.attributes("polygon")}


def test_intervals_are_strokes_through_their_points():
    series = Series("sparse", [(4096, 30.0), (8192, 50.0)], intervals=[(10.0, 60.0), None])
    page = Page(line_plot("How well", [series], X, Y))
    (stroke,) = (each for each in page.attributes("line") if each["class"] == "whisker s0")
    x, y = (float(page.attributes("circle")[0][name]) for name in ("cx", "cy"))
    assert float(stroke["x1"]) == float(stroke["x2"]) == x
    low, high = float(stroke["y1"]), float(stroke["y2"])
    assert high < y < low
    assert (low - high) / (low - y) == pytest.approx(50 / 20, abs=0.01)


def test_one_line_needs_no_legend():
    page = Page(line_plot("t", [Series("a", [(4096, 1.0)]), Series("b", [], faint=True)], X, Y))
    assert not page.attributes("ul")


def test_bars_stand_on_the_axis():
    y = linear_axis("rows", [0.5], include=(0,))
    page = Page(bar_plot("t", ["none", "1", "2"], [0.5, 0.0, 0.25], y, "far tokens"))
    bars = [each for each in page.attributes("rect") if "bar" in each["class"]]
    heights = [float(bar["height"]) for bar in bars]
    assert heights[1] == 0
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    bottoms = {round(float(bar["y"]) + float(bar["height"])) for bar in bars}
    assert len(bottoms) == 1
    assert "far tokens: none: 0.5; 1: 0; 2: 0.25" in page.attributes("svg")[0]["aria-label"]


def test_many_names_are_thinned():
    names = [str(2**place) for place in range(20)]
    y = linear_axis("rows", [1.0], include=(0,))
    written = Page(bar_plot("t", names, [1.0] * 20, y, "tokens")).text("text")
    assert len(re.findall(r"\b\d{2,}\b", written)) < 10


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (10, 10), (1000, 10)])
def test_neighbours_are_averaged(count, expected):
    points = averaged([(float(place), 2.0 * place) for place in range(count)], most=10)
    assert len(points) == expected
    assert all(y == pytest.approx(2 * x) for x, y in points)
