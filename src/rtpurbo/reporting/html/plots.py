"""Line plots and bars, with legends and hints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rtpurbo.reporting.html.axes import Axis
from rtpurbo.reporting.html.markup import Markup, tag
from rtpurbo.reporting.html.svg import (
    Point,
    line,
    marker,
    picture,
    polyline,
    rectangle,
    series_class,
    swatch,
    text,
)

# A plot is as wide as a phone, so that its text is as large there as elsewhere on the page.
WIDTH, HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 12.0, 24.0, 38.0

MOST_POINTS = 300
"""Longer curves are averaged: more points than a plot has pixels only make the page large."""


@dataclass(frozen=True)
class Series:
    """A line of a plot.

    Attributes:
        name: for the legend.
        points: x and y; those that are not finite are left out.
        style: its colour and shape, see `rtpurbo.reporting.html.svg.series_class`.
        hints: what pointing at each point shows; name and values if None.
        markers: whether points are drawn.
        faint: whether the line is only the ground of a smoother one.
        intervals: ends of an upright stroke through each point; None where a point has none.
    """

    name: str
    points: Sequence[Point]
    style: int | None = 0
    hints: Sequence[str] | None = None
    markers: bool = True
    faint: bool = False
    intervals: Sequence[tuple[float, float] | None] = ()


def line_plot(
    title: str, series: Sequence[Series], x: Axis, y: Axis, legend: bool = True
) -> Markup:
    """A figure with lines.

    Args:
        title: above it.
        series: the lines, the first on top.
        x: the axis to the right.
        y: the axis upwards.
        legend: whether it names its lines; several plots may share one.
    """
    shapes = _grid(x, y)
    for each in reversed(series):
        points = [point for point in each.points if all(map(math.isfinite, point))]
        places = [_place(point, x, y) for point in points]
        if not places:
            continue
        color = series_class(each.style)
        if len(places) > 1:
            faint = " faint" if each.faint else ""
            shapes.append(polyline(places, f"line {color}{faint}"))
        shapes += [
            line(_place((where, low), x, y), _place((where, high), x, y), f"whisker {color}")
            for (where, _), (low, high) in _intervals(each)
        ]
        if each.markers:
            hints = each.hints or [
                f"{each.name}: {y.write(value)} at {x.write(where)}" for where, value in points
            ]
            shapes += [
                marker(place, each.style, hint) for place, hint in zip(places, hints, strict=False)
            ]
    named = [each for each in series if not each.faint]
    picture_of_it = picture(WIDTH, HEIGHT, _in_words(title, named, x, y), shapes)
    return figure(title, picture_of_it, legend_of(named) if legend and len(named) > 1 else None)


def bar_plot(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    y: Axis,
    x_name: str,
    style: int | None = 0,
    write: Callable[[float], str] | None = None,
) -> Markup:
    """A figure with upright bars.

    Args:
        title: above it.
        names: of the bars, below them; where they are many, every second one is written.
        values: how high they are.
        y: the axis upwards, from 0.
        x_name: what the names are.
        style: colour of the bars.
        write: how hints and alternative write a value; as the axis does if None.
    """
    write = write or y.write
    shapes = _grid(None, y)
    width = (WIDTH - _LEFT - _RIGHT) / max(1, len(values))
    # A name takes about seven units a letter.
    every = math.ceil((7 * max(map(len, names), default=1) + 4) / width)
    for count, (name, value) in enumerate(zip(names, values, strict=True)):
        left, top = _LEFT + count * width, _TOP + (1 - y.share(value)) * _plot_height()
        hint = tag("title", f"{name}: {write(value)}")
        size = (width - 2, HEIGHT - _BOTTOM - top)
        shapes.append(rectangle((left + 1, top), size, f"bar mark {series_class(style)}", hint))
        if count % every == 0:
            shapes.append(text((left + width / 2, HEIGHT - _BOTTOM + 14), name, "tick middle"))
    shapes.append(_x_name(x_name))
    listed = "; ".join(f"{name}: {write(value)}" for name, value in zip(names, values, strict=True))
    return figure(title, picture(WIDTH, HEIGHT, f"{title}. {x_name}: {listed}", shapes))


def figure(title: str, drawing: Markup, legend: Markup | None = None) -> Markup:
    """A drawing under its title."""
    return tag("figure", tag("figcaption", title), drawing, legend, class_="plotted")


def legend_of(series: Sequence[Series]) -> Markup:
    """Names beside pieces of their lines."""
    entries = [tag("li", swatch(each.style), each.name) for each in series]
    return tag("ul", entries, class_="legend")


def averaged(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Points, neighbours averaged where there are more than `most`."""
    count = min(most, len(points))
    edges = [len(points) * number // count for number in range(count + 1)] if count else [0]
    parts = [points[start:end] for start, end in pairwise(edges)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def _intervals(series: Series) -> list[tuple[Point, tuple[float, float]]]:
    """Points with their intervals, of those that have one."""
    both = zip(series.points, series.intervals, strict=False)
    return [(point, interval) for point, interval in both if interval is not None]


def _grid(x: Axis | None, y: Axis) -> list[Markup]:
    shapes = [text((2, 12), y.name, "axis")]
    for tick in y.ticks:
        height = _TOP + (1 - y.share(tick)) * _plot_height()
        shapes.append(line((_LEFT, height), (WIDTH - _RIGHT, height), "grid"))
        shapes.append(text((_LEFT - 6, height + 4), y.write(tick), "tick end"))
    if x is not None:
        for tick in x.ticks:
            place = _LEFT + x.share(tick) * (WIDTH - _LEFT - _RIGHT)
            bottom = HEIGHT - _BOTTOM
            shapes.append(line((place, bottom), (place, bottom + 4), "grid"))
            side = "end" if x.share(tick) > 0.95 else "middle"
            edge = WIDTH - 2 if side == "end" else place
            shapes.append(text((edge, bottom + 16), x.write(tick), f"tick {side}"))
        shapes.append(_x_name(x.name))
    return shapes


def _x_name(name: str) -> Markup:
    return text(((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5), name, "axis middle")


def _plot_height() -> float:
    return HEIGHT - _TOP - _BOTTOM


def _place(point: Point, x: Axis, y: Axis) -> Point:
    return (
        _LEFT + x.share(point[0]) * (WIDTH - _LEFT - _RIGHT),
        _TOP + (1 - y.share(point[1])) * _plot_height(),
    )


def _in_words(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    parts = []
    for each in series:
        points = [point for point in each.points if all(map(math.isfinite, point))]
        if points:
            (first, low), (last, high) = points[0], points[-1]
            ends = f"{y.write(low)} at {x.write(first)}"
            if len(points) > 1:
                ends += f" to {y.write(high)} at {x.write(last)}"
            parts.append(f"{each.name}: {ends}")
    return f"{title}. {y.name} against {x.name}. " + "; ".join(parts)
