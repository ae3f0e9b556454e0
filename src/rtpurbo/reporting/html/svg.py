"""Pictures: a few shapes in SVG, whose colours come from the page's style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rtpurbo.reporting.html.markup import Content, Markup, number, tag

Point = tuple[float, float]

NUM_COLORS = 8
"""Colours of series; after these, lines are dashed. The style sheet has as many."""

# Shapes tell series apart where colours do not. Each is about as large as a circle of radius 3.5.
_SHAPES = (
    None,
    ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
    ((0.0, -4.2), (4.0, 3.0), (-4.0, 3.0)),
    ((0.0, -4.4), (4.4, 0.0), (0.0, 4.4), (-4.4, 0.0)),
)


def picture(
    width: float,
    height: float,
    alternative: str,
    *children: Content | Iterable[Content],
    class_: str = "plot",
) -> Markup:
    """A picture that scales with the page.

    Args:
        width: units of the drawing.
        height: likewise.
        alternative: what it shows, in words, for those who do not see it.
        children: its shapes.
        class_: of the style sheet.
    """
    return tag(
        "svg",
        *children,
        view_box=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=alternative,
        class_=class_,
    )


def line(start: Point, end: Point, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


def polyline(points: Sequence[Point], class_: str) -> Markup:
    """A line through points."""
    written = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return tag("polyline", points=written, class_=class_)


def rectangle(corner: Point, size: Point, class_: str, *children: Content) -> Markup:
    """A rectangle from its upper left corner."""
    (x, y), (width, height) = corner, size
    return tag("rect", *children, x=x, y=y, width=width, height=height, class_=class_)


def text(place: Point, content: str, class_: str) -> Markup:
    """A line of text; the class says on which side of `place` it lies."""
    return tag("text", content, x=place[0], y=place[1], class_=class_)


def marker(place: Point, series: int | None, hint: str = "") -> Markup:
    """A point of a series, in the series' shape; pointing at it shows `hint`."""
    x, y = place
    class_ = f"mark {series_class(series)}"
    title = tag("title", hint) if hint else None
    shape = _SHAPES[(series or 0) % len(_SHAPES)] if series is not None else _SHAPES[1]
    if shape is None:
        return tag("circle", title, cx=x, cy=y, r=3.5, class_=class_)
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in shape)
    return tag("polygon", title, points=points, class_=class_)


def series_class(series: int | None) -> str:
    """The class of a series by its number; None is what all others are held against."""
    if series is None:
        return "dense"
    dashed = " dashed" if series >= NUM_COLORS else ""
    return f"s{series % NUM_COLORS}{dashed}"


def swatch(series: int | None) -> Markup:
    """A piece of a series' line, for legends."""
    return tag(
        "svg",
        line((0, 6), (24, 6), f"line {series_class(series)}"),
        marker((12, 6), series),
        view_box="0 0 24 12",
        class_="swatch",
        aria_hidden="true",
    )
