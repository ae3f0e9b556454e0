"""Figures drawn by matplotlib, for the HTML report and the documentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from rtpurbo.errors import RTPurboError
from rtpurbo.formats import short_bytes, short_length
from rtpurbo.reporting.palette import NUM_SERIES_COLORS, PALETTE, series_color
from rtpurbo.reporting.svg import Mark, figure_style, svg
from rtpurbo.training.curves import neighbours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

# As wide as a phone, so that text has the same size there as elsewhere on the page. In SVG units.
WIDTH, HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 20.0, 26.0, 42.0

MOST_POINTS = 300
"""Longer curves are averaged: a plot has no more pixels."""

MARKERS = ("o", "s", "^", "D")
"""Marker shapes, which distinguish series without colour."""


@dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        name: measured quantity, with its unit.
        write: text of a value; None writes it with as few digits as needed.
        scale: linear, or logarithmic to base 10 or 2.
        include: values inside the range in any case, such as 0.
        ticks: values with a label; None lets matplotlib choose.
    """

    name: str
    write: Callable[[float], str] | None = None
    scale: Literal["linear", "log", "log2"] = "linear"
    include: tuple[float, ...] = ()
    ticks: tuple[float, ...] | None = None

    def text(self, value: float) -> str:
        """Returns a value as text."""
        return self.write(value) if self.write else f"{value:,.4g}"


@dataclass(frozen=True)
class Series:
    """A line of a plot, without the points that are not finite.

    Attributes:
        name: legend entry.
        points: x and y.
        style: index of colour and marker; None is the baseline, dashed.
        hints: tooltips of the points; name and values if None.
        markers: whether points are marked.
        faint: whether this is the unsmoothed background of another line.
        intervals: lower and upper end of each point's interval; None where there is none.
    """

    name: str
    points: Sequence[Point]
    style: int | None = 0
    hints: Sequence[str] | None = None
    markers: bool = True
    faint: bool = False
    intervals: Sequence[tuple[float, float] | None] = ()

    @property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if all(map(math.isfinite, point))]


def length_axis(lengths: Sequence[float]) -> Axis:
    """Returns a logarithmic axis of context lengths, with a tick at each that has room for it."""
    ordered = sorted(set(lengths))
    room = 0.11 * math.log(ordered[-1] / ordered[0])
    ticks: list[float] = []
    for length in ordered:
        if not ticks or math.log(length / ticks[-1]) > room:
            ticks.append(length)
    return Axis(
        "context, tokens", lambda value: short_length(round(value)), "log2", ticks=tuple(ticks)
    )


def bytes_axis(name: str) -> Axis:
    """Returns a logarithmic axis of bytes, with ticks at powers of two."""
    return Axis(name, lambda value: short_bytes(value).replace(".0", ""), "log2")


def has_matplotlib() -> bool:
    """Returns whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def check_matplotlib(command: str) -> None:
    """Refuses a command that draws where matplotlib is missing.

    Args:
        command: command or option, for the message.

    Raises:
        RTPurboError: matplotlib is not installed.
    """
    if not has_matplotlib():
        raise RTPurboError(f"{command} needs matplotlib: pip install 'rtpurbo[plots]'.")


def look(style: int | None) -> tuple[str, str, Literal["-", "--"]]:
    """Returns the palette name, marker and line style of a series; None is the baseline."""
    dashed = style is None or style >= NUM_SERIES_COLORS
    return series_color(style), MARKERS[(style or 0) % len(MARKERS)], "--" if dashed else "-"


def line_plot(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Draws lines with markers and intervals.

    Args:
        title: subject of the plot, for the alternative text.
        series: the lines, the first on top.
        x: the horizontal axis.
        y: the vertical axis.

    Returns:
        An `<svg>` element.
    """
    with _figure(WIDTH, HEIGHT) as figure:
        axes = _axes(figure)
        marks = draw_lines(axes, series, x, y)
        named = [each for each in series if not each.faint]
        return svg(figure, _in_words(title, named, x, y), marks)


def draw_lines(axes: Axes, series: Sequence[Series], x: Axis, y: Axis) -> dict[str, Sequence[Mark]]:
    """Draws lines into existing axes and returns the tooltips of their markers, by element id."""
    marks: dict[str, Sequence[Mark]] = {}
    values: list[float] = []
    for number, each in reversed(list(enumerate(series))):
        points = each.finite
        if not points:
            continue
        name, marker, line = look(each.style)
        color = PALETTE[name][0]
        xs, ys = zip(*points, strict=True)
        values += ys
        axes.plot(
            xs, ys, line, color=color, linewidth=1 if each.faint else 2,
            alpha=0.35 if each.faint else None, gid="faint" if each.faint else "line",
        )  # fmt: skip
        both = zip(each.points, each.intervals, strict=False)
        intervals = [(point[0], *ends) for point, ends in both if ends is not None]
        if intervals:
            places, lows, highs = zip(*intervals, strict=True)
            values += [*lows, *highs]
            axes.vlines(places, lows, highs, colors=color, alpha=0.6, linewidth=1.5, gid="whisker")
        if each.markers:
            axes.plot(
                xs, ys, marker, markersize=6.5, color=color, gid=f"marks{number}",
                markeredgecolor=PALETTE["ground"][0], markeredgewidth=0.8,
            )  # fmt: skip
            hints = each.hints or [f"{each.name}: {y.text(b)} at {x.text(a)}" for a, b in points]
            marks[f"marks{number}"] = [Mark(hint) for hint in hints]
    _scale(axes, "x", x, [a for each in series for a, _ in each.finite])
    _scale(axes, "y", y, values)
    return marks


def legend_handles(series: Sequence[Series]) -> list[Any]:
    """Returns legend entries that show line and marker of each series."""
    from matplotlib.lines import Line2D

    looks = [(each.name, *look(each.style)) for each in series if not each.faint]
    return [
        Line2D(
            [], [], label=name, color=PALETTE[color][0], linewidth=2, linestyle=line, marker=mark
        )
        for name, color, mark, line in looks
    ]


def bar_plot(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    y: Axis,
    x_name: str,
    style: int | None = 0,
    write: Callable[[float], str] | None = None,
) -> str:
    """Draws vertical bars from 0.

    Args:
        title: subject of the plot, for the alternative text.
        names: labels of the bars; thinned where they would overlap.
        values: heights.
        y: the vertical axis.
        x_name: meaning of the labels.
        style: index of the colour.
        write: text of a value in tooltips; as on the axis if None.

    Returns:
        An `<svg>` element.
    """
    write = write or y.text
    hints = [f"{name}: {write(value)}" for name, value in zip(names, values, strict=True)]
    marks: dict[str, Sequence[Mark]] = {}
    with _figure(WIDTH, HEIGHT) as figure:
        axes = _axes(figure)
        color = PALETTE[series_color(style)][0]
        for number, (bar, hint) in enumerate(
            zip(axes.bar(range(len(values)), values, 0.92, color=color), hints, strict=True)
        ):
            bar.set_gid(f"bar{number}")
            marks[f"bar{number}"] = [Mark(hint, "mark bar")]
        # A label takes about seven units per character.
        width = (WIDTH - _LEFT - _RIGHT) / max(1, len(values))
        every = math.ceil((7 * max(map(len, names), default=1) + 4) / width)
        axes.set_xticks(range(0, len(names), every), names[::every])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(x_name)
        _scale(axes, "y", y, [0.0, *values])
        return svg(figure, f"{title}. {x_name}: {'; '.join(hints)}", marks)


def heat_map(
    levels: Sequence[Sequence[float | None]],
    marks: Sequence[Sequence[Mark]],
    marked: Sequence[tuple[int, int]],
    alternative: str,
    names: tuple[str, str],
) -> tuple[str, float]:
    """Draws a square for each entry of a matrix.

    Args:
        levels: columns of values from 0 to 1, of any lengths; None draws an empty square.
        marks: tooltip and class of each square.
        marked: column and row of the squares with a frame and a dot.
        alternative: text in place of the picture.
        names: names of the horizontal and the vertical axis.

    Returns:
        An `<svg>` element and its width in units.
    """
    columns, rows = len(levels), max(map(len, levels), default=0)
    side = 14.0  # units from one square to the next
    left, top, right, bottom = 36.0, 6.0, 8.0, 36.0
    width, height = left + columns * side + right, top + rows * side + bottom
    soft, strong, frame = PALETTE["edge"][0], PALETTE["s0"][0], PALETTE["s1"][0]
    with _figure(width, height) as figure:
        axes = _axes(figure, left, right, top, bottom, grid=False)
        places = [(column, row) for column in range(columns) for row in range(len(levels[column]))]
        framed = set(marked)
        faces: list[Any] = []
        for column, row in places:
            level = levels[column][row]
            faces.append("none" if level is None else (strong, 0.09 + 0.91 * level))
        xs, ys = ([place[axis] for place in places] for axis in (0, 1))
        axes.scatter(
            xs, ys, s=(side - 2.5) ** 2, marker="s", c=faces, gid="heads",
            linewidths=[2 if place in framed else 1 for place in places],
            edgecolors=[
                frame if place in framed else soft if levels[place[0]][place[1]] is None else "none"
                for place in places
            ],
        )  # fmt: skip
        if marked:
            axes.scatter(
                [column for column, _ in marked], [row for _, row in marked],
                s=4.5**2, marker="o", color=PALETTE["ground"][0],
                edgecolors=frame, linewidths=1, gid="dots",
            )  # fmt: skip
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_xticks(range(0, columns, max(1, round(columns / 15))))
        axes.set_yticks(range(0, rows, max(1, round(rows / 16))))
        axes.tick_params(labelsize=10)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        drawn = {
            "heads": [mark for column in marks for mark in column],
            "dots": [Mark("", "dot")] * len(marked),
        }
        return svg(figure, alternative, drawn, class_="heat"), width


def averaged(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Returns at most `most` points, each the mean of neighbours."""
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in neighbours(points, most)
    ]


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the report's style, sized in SVG units."""
    with figure_style() as new_figure:
        yield new_figure(figsize=(width / 72, height / 72))


def _axes(
    figure: Figure,
    left: float = _LEFT,
    right: float = _RIGHT,
    top: float = _TOP,
    bottom: float = _BOTTOM,
    grid: bool = True,
) -> Axes:
    """Axes with margins in SVG units."""
    width, height = (72 * size for size in figure.get_size_inches())
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        )
    )
    if grid:
        axes.grid(axis="y")
    return axes


def _scale(axes: Axes, direction: str, axis: Axis, values: Sequence[float]) -> None:
    """Sets range, ticks and name of one direction; the vertical name lies above the plot."""
    from matplotlib import ticker

    figure: Any = axes.figure
    drawn = axes.xaxis if direction == "x" else axes.yaxis
    low, high = min((*values, *axis.include)), max((*values, *axis.include))
    if axis.scale == "linear":
        locator = ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        ticks = list(axis.ticks or locator.tick_values(low, high))
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    else:
        base = 2 if axis.scale == "log2" else 10
        getattr(axes, f"set_{direction}scale")("log", base=base)
        if high / low < 1.5:
            low, high = low / 1.5, high * 1.5
        wide = math.log10(high / low) >= 2
        subs = (1.0,) if base == 2 or wide else (1.0, 2.0, 5.0)
        if axis.ticks is None and base == 2:
            low, high = 2 ** math.floor(math.log2(low)), 2 ** math.ceil(math.log2(high))
        elif axis.ticks is None:
            low, high = low / 1.1, high * 1.1
        every = ticker.LogLocator(base, subs, numticks=8).tick_values(low, high)
        ticks = list(axis.ticks or [tick for tick in every if low <= tick <= high])
    drawn.set_major_locator(ticker.FixedLocator(ticks))
    drawn.set_minor_locator(ticker.NullLocator())
    drawn.set_major_formatter(ticker.FuncFormatter(lambda value, _: axis.text(value)))
    getattr(axes, f"set_{direction}lim")(low, high)
    if direction == "x":
        axes.set_xlabel(axis.name)
    elif axis.name:
        width = 72 * figure.get_size_inches()[0]
        axes.text(2 / width, 1.0, axis.name, transform=figure.transFigure, va="top")


def _in_words(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """The alternative text of a line plot: first and last value of each line."""
    parts = []
    for each in series:
        if points := each.finite:
            (first, low), (last, high) = points[0], points[-1]
            ends = f"{y.text(low)} at {x.text(first)}"
            if len(points) > 1:
                ends += f" to {y.text(high)} at {x.text(last)}"
            parts.append(f"{each.name}: {ends}")
    return f"{title}. {y.name} against {x.name}. " + "; ".join(parts)
