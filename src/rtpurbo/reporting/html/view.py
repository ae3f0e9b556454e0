"""Contents of a report as data, which the templates turn into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rtpurbo.reporting.figures import MARKERS, Series
from rtpurbo.reporting.palette import NUM_SERIES_COLORS, series_color

NOTHING = "-"
"""Text of a cell without a measurement."""

_SYMBOLS = dict(zip(MARKERS, "●■▲◆", strict=True))


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: the value.
        delta: difference to the dense model, below it.
        lines: further small lines.
        tint: `slight`, `heavy` or empty.
        bold: whether the value is bold.
    """

    text: str
    delta: str = ""
    lines: tuple[str, ...] = ()
    tint: str = ""
    bold: bool = True


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


@dataclass(frozen=True)
class Facts:
    """Names and values; names in `code` have values in a monospace font."""

    kind: ClassVar[str] = "facts"
    caption: str
    rows: Sequence[tuple[str, str]]
    code: tuple[str, ...] = ()


@dataclass(frozen=True)
class Legend:
    """Names of series with their colours and markers."""

    kind: ClassVar[str] = "legend"
    entries: Sequence[tuple[str, str, str]]

    @classmethod
    def of(cls, series: Sequence[Series]) -> Legend:
        """Returns the legend of the lines of a plot."""
        return cls([(each.name, *swatch(each.style)) for each in series if not each.faint])


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        title: subject.
        where: conditions of the measurement: samples, device, dtype.
        svg: the drawing.
        legend: names of the series; None where several plots share one.
    """

    title: str
    where: str
    svg: str
    legend: Legend | None = None


@dataclass(frozen=True)
class Plots:
    """Figures side by side, with a common legend."""

    kind: ClassVar[str] = "plots"
    plots: Sequence[Plot]
    legend: Legend | None = None


@dataclass(frozen=True)
class HeatMap:
    """A drawing with a size in CSS pixels below which it scrolls."""

    kind: ClassVar[str] = "heat"
    name: str
    svg: str
    width: float


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    class_: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Definitions:
    """Names with colour, marker and description."""

    kind: ClassVar[str] = "definitions"
    entries: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Folded:
    """A block that is shown on request, and on paper."""

    kind: ClassVar[str] = "folded"
    summary: str
    block: Table | Code


Block = (
    Table | Facts | Legend | Plots | HeatMap | Text | Heading | Code | Items | Definitions | Folded
)


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        anchor: target of links.
        title: heading.
        blocks: its content.
    """

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Missing:
    """A part without data, with the reason."""

    title: str
    reason: str


def swatch(style: int | None) -> tuple[str, str]:
    """Returns the palette name and a symbol of a series, for legends."""
    symbol = _SYMBOLS[MARKERS[0 if style is None else style % len(MARKERS)]]
    line = "╌" if style is None or style >= NUM_SERIES_COLORS else "─"
    return series_color(style), f"{line}{symbol}{line}"
