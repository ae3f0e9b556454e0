"""The page: sections in order, with all that they need inside."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from rtpurbo.files import write_text_atomically
from rtpurbo.reporting.html.markup import Markup, join, tag
from rtpurbo.reporting.html.sections.budgets import budgets_section
from rtpurbo.reporting.html.sections.head_map import head_map_section
from rtpurbo.reporting.html.sections.memory import memory_section
from rtpurbo.reporting.html.sections.origin import origin_section
from rtpurbo.reporting.html.sections.quality import quality_section
from rtpurbo.reporting.html.sections.reads import reads_section
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sections.speed import speed_section
from rtpurbo.reporting.html.sections.summary import summary, title_of
from rtpurbo.reporting.html.sections.training import training_section
from rtpurbo.reporting.html.sources import Sources, read_sources
from rtpurbo.reporting.html.tables import paragraph
from rtpurbo.version import __version__

_SECTIONS = (
    quality_section,
    head_map_section,
    reads_section,
    budgets_section,
    memory_section,
    speed_section,
    training_section,
    origin_section,
)

# Nothing may be fetched, whatever text of a result file found its way into the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(places: Iterable[str | Path], output: str | Path) -> None:
    """Writes the report of an artifact and files of results.

    Args:
        places: see `rtpurbo.reporting.html.sources.read_sources`.
        output: the HTML file.

    Raises:
        RTPurboError: something is missing, broken or newer than this library.
    """
    write_text_atomically(output, page(read_sources(places)))


def page(sources: Sources, date: str | None = None) -> str:
    """The report as HTML.

    Args:
        sources: what it shows.
        date: when it was written; now if None.
    """
    made = [make(sources) for make in _SECTIONS]
    sections = [section for section in made if isinstance(section, Section)]
    missing = [section for section in made if isinstance(section, Missing)]
    title = title_of(sources)
    date = date or datetime.now(timezone.utc).strftime("%Y-%m-%d")
    body = join(
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag("header", tag("h1", title), summary(sources)),
        tag("nav", tag("ul", [_link(section) for section in sections]), aria_label="Sections"),
        tag(
            "main", [_section(section) for section in sections], _what_is_not(missing), id="content"
        ),
        tag("footer", paragraph(f"Written by rtpurbo {__version__} on {date}.")),
        tag("div", id="hint", role="status"),
        tag("script", Markup(_resource("hints.js"))),
    )
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: report"),
        # Else a browser asks for a picture of its own.
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(_resource("style.css"))),
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _section(section: Section) -> Markup:
    heading = tag("h2", section.title, id=f"{section.anchor}-title")
    return tag(
        "section",
        heading,
        section.body,
        id=section.anchor,
        aria_labelledby=f"{section.anchor}-title",
    )


def _link(section: Section) -> Markup:
    return tag("li", tag("a", section.title, href=f"#{section.anchor}"))


def _what_is_not(missing: Iterable[Missing]) -> Markup | None:
    entries = [tag("li", tag("b", each.title), f": {each.reason}") for each in missing]
    if not entries:
        return None
    return tag("section", tag("h2", "What is not here"), tag("ul", entries), id="missing")


def _resource(name: str) -> str:
    return files("rtpurbo.reporting.html").joinpath(name).read_text(encoding="utf-8")
