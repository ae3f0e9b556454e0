import pytest

from rtpurbo.reporting.html.markup import Markup, join, number, tag


def test_text_is_escaped_and_markup_is_not():
    assert (
        tag("p", "a < b", Markup("<b>c</b>"), None, ["d & e"]) == "<p>a &lt; b<b>c</b>d &amp; e</p>"
    )
    assert join("<", [tag("i", ">")]) == "&lt;<i>&gt;</i>"


def test_attributes():
    assert tag("svg", view_box="0 0 1 1", aria_label='"', class_="a") == (
        '<svg viewBox="0 0 1 1" aria-label="&quot;" class="a"></svg>'
    )
    assert tag("meta", name="x", content=None) == '<meta name="x">'
    assert tag("rect", x=1.26, y=2) == '<rect x="1.3" y="2"></rect>'


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (-0.01, "0"), (10, "10"), (-3.14, "-3.1"), (0.96, "1")]
)
def test_coordinates_are_short(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_coordinate(value):
    with pytest.raises(ValueError, match="is no coordinate"):
        number(value)
