import math
import re
from importlib.util import find_spec

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.reporting import figures
from rtpurbo.reporting.figures import (
    HEIGHT,
    WIDTH,
    Axis,
    Series,
    averaged,
    bar_plot,
    heat_map,
    length_axis,
    line_plot,
)
from rtpurbo.reporting.html.view import Legend
from rtpurbo.reporting.svg import Mark, svg_document
from tests.reporting.html.parsed import Page

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra `plots`")
X, Y = length_axis([4096, 8192]), Axis("score", include=(0.0, 100.0))


def ends(path):
    """Numbers of a path's data."""
    return [float(number) for number in re.findall(r"-?[\d.]+", path["d"])]


def test_lines_with_markers_hints_and_words():
    dense = Series("full", [(4096, 100.0), (8192, 50.0)], None)
    sparse = Series("sparse", [(4096, 75.0), (8192, math.nan)], 9)
    page = Page(line_plot("How well", [sparse, dense], X, Y))
    assert page.text("title") == "full: 100 at 4K full: 50 at 8K sparse: 75 at 4K"
    drawing = page.attributes("svg")[0]
    assert drawing["aria-label"] == (
        "How well. score against context, tokens. sparse: 75 at 4K; full: 100 at 4K to 50 at 8K"
    )
    line = page.of_class("line")[0]
    assert "var(--ink)" in line["style"]
    assert "stroke-dasharray" in line["style"]
    x, y, to_x, to_y = ends(line)
    assert 0 < x < to_x < WIDTH
    assert 0 < y < to_y < HEIGHT
    marks = page.of_class("mark")
    assert [(float(mark["x"]), float(mark["y"])) for mark in marks[:2]] == [(x, y), (to_x, to_y)]
    assert "var(--s1)" in marks[2]["style"]
    assert page.text("text").split()[:2] == ["4K", "8K"]


def test_intervals_are_strokes_through_their_points():
    series = Series("sparse", [(4096, 30.0), (8192, 50.0)], intervals=[(10.0, 60.0), None])
    page = Page(line_plot("How well", [series], X, Y))
    (stroke,) = page.of_class("whisker")
    mark = page.of_class("mark")[0]
    x, y = float(mark["x"]), float(mark["y"])
    from_x, low, to_x, high = ends(stroke)
    assert from_x == to_x == x
    assert high < y < low
    assert (low - high) / (low - y) == pytest.approx(50 / 20, abs=0.01)


def test_a_legend_leaves_out_faint_lines():
    entries = Legend.of(
        [Series("a", []), Series("b", [], faint=True), Series("c", [], None)]
    ).entries
    assert entries == [("a", "s0", "─●─"), ("c", "ink", "╌●╌")]


def test_bars_start_at_the_axis():
    page = Page(bar_plot("t", ["none", "1", "2"], [0.5, 0.0, 0.25], Axis("queries"), "far tokens"))
    bars = [ends(bar) for bar in page.of_class("bar")]
    heights = [max(bar[1::2]) - min(bar[1::2]) for bar in bars]
    assert heights[1] == 0
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    assert len({max(bar[1::2]) for bar in bars}) == 1
    assert "far tokens: none: 0.5; 1: 0; 2: 0.25" in page.attributes("svg")[0]["aria-label"]


def test_many_names_are_thinned():
    names = [str(2**place) for place in range(20)]
    written = Page(bar_plot("t", names, [1.0] * 20, Axis("queries"), "tokens")).text("text")
    assert len(re.findall(r"\b\d{2,}\b", written)) < 10


def test_a_heat_map_has_a_square_for_each_entry():
    marks = [[Mark(f"column {x}, row {y}", "mark head") for y in range(2)] for x in range(3)]
    drawing, width = heat_map(
        [[0.0, 1.0], [None, None], [0.5, 0.2]], marks, [(0, 1)], "w", ("a", "b")
    )
    page = Page(drawing)
    heads = page.of_class("head")
    assert len(heads) == 6
    assert "stroke:var(--s1)" in heads[1]["style"]
    assert "fill:none" in heads[2]["style"]
    assert page.text("title").startswith("column 0, row 0 column 0, row 1 column 1")
    assert len(page.of_class("dot")) == 1
    assert float(page.attributes("svg")[0]["viewbox"].split()[2]) == pytest.approx(width, abs=0.1)


def test_the_same_data_gives_the_same_drawing_with_ids_of_its_own():
    series = [Series("a", [(4096, 1.0), (8192, 2.0)])]
    first, again = (line_plot("t", series, X, Y) for _ in range(2))
    other = line_plot("t", [Series("a", [(4096, 1.0), (8192, 3.0)])], X, Y)
    assert first == again
    ids = [set(re.findall(r' id="([^"]+)"', drawing)) for drawing in (first, other)]
    assert all(ids)
    assert not ids[0] & ids[1]


def test_a_file_of_its_own_has_both_palettes():
    document = svg_document(
        line_plot("t", [Series("a", [(4096, 1.0), (8192, 2.0)])], X, Y), "Title"
    )
    assert document.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "prefers-color-scheme: dark" in document
    assert not re.search(r"<style[^>]*>[^<]*\*\{", document)


def test_a_missing_matplotlib_is_explained(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(RTPurboError, match=r"needs matplotlib: pip install 'rtpurbo\[plots\]'"):
        figures.check_matplotlib("`rtpurbo report`")


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (10, 10), (1000, 10)])
def test_neighbours_are_averaged(count, expected):
    points = averaged([(float(place), 2.0 * place) for place in range(count)], most=10)
    assert len(points) == expected
    assert all(y == pytest.approx(2 * x) for x, y in points)
