"""Contents of a report as data, which the templates turn into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rtpurbo.reporting.figures import MARKERS, Series, look

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


class Block:
    """Part of a section, which the macro `block` of the templates renders by its kind."""

    @property
    def kind(self) -> str:
        """Name of the class in lower case."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Table(Block):
    """A table whose first column names its rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


@dataclass(frozen=True)
class Facts(Block):
    """Names and values; names in `code` have values in a monospace font."""

    caption: str
    rows: Sequence[tuple[str, str]]
    code: tuple[str, ...] = ()


@dataclass(frozen=True)
class Legend:
    """Names of series with their colours and markers."""

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
class Plots(Block):
    """Figures side by side, with a common legend."""

    plots: Sequence[Plot]
    legend: Legend | None = None


@dataclass(frozen=True)
class HeatMap(Block):
    """A drawing with a size in CSS pixels below which it scrolls."""

    name: str
    svg: str
    width: float


@dataclass(frozen=True)
class Text(Block):
    """A paragraph."""

    text: str
    class_: str = ""


@dataclass(frozen=True)
class Heading(Block):
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Code(Block):
    """Preformatted text."""

    text: str


@dataclass(frozen=True)
class Items(Block):
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Definitions(Block):
    """Names with colour, marker and description."""

    entries: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Folded(Block):
    """A block that is shown on request, and on paper."""

    summary: str
    block: Table | Code


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
    color, marker, line = look(style)
    dash = "─" if line == "-" else "╌"
    return color, f"{dash}{_SYMBOLS[marker]}{dash}"
