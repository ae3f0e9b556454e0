"""Tables, and what surrounds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rtpurbo.reporting.html.markup import Content, Markup, tag

NOTHING = "-"
"""What stands in a cell that was not measured."""


def cell(*content: Content | Iterable[Content], class_: str | None = None) -> Markup:
    """A cell of data."""
    return tag("td", *content, class_=class_)


def table(
    caption: str, header: Sequence[Content], rows: Iterable[Sequence[Content]], class_: str = ""
) -> Markup:
    """A table whose first column names its rows; wide ones scroll within themselves.

    Args:
        caption: what it shows.
        header: names of the columns.
        rows: the name of each row and its cells, made by `cell` or plain text.
        class_: of the style sheet.
    """
    body = [
        tag("tr", tag("th", first, scope="row"), [_as_cell(each) for each in rest])
        for first, *rest in rows
    ]
    head = tag("tr", [tag("th", name, scope="col") for name in header])
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", head),
        tag("tbody", body),
        class_=class_ or None,
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(caption: str, rows: Iterable[tuple[str, Content]]) -> Markup:
    """Names and values, as a table of two columns with wrapping text."""
    body = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in rows]
    return tag("table", tag("caption", caption), tag("tbody", body), class_="facts")


def paragraph(*content: Content, class_: str | None = None) -> Markup:
    """Running text."""
    return tag("p", *content, class_=class_)


def folded(summary: str, *content: Content) -> Markup:
    """What most readers can do without; paper shows it."""
    return tag("details", tag("summary", summary), *content)


def _as_cell(content: Content) -> Content:
    return content if isinstance(content, Markup) and content.startswith("<td") else cell(content)
