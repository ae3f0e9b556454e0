"""The HTML page of a report: one file that loads nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rtpurbo.files import write_text_atomically
from rtpurbo.reporting.figures import check_matplotlib
from rtpurbo.reporting.html.sections.head_map import head_map_section
from rtpurbo.reporting.html.sections.memory import memory_section
from rtpurbo.reporting.html.sections.origin import origin_section
from rtpurbo.reporting.html.sections.quality import quality_section
from rtpurbo.reporting.html.sections.reads import budgets_section, reads_section
from rtpurbo.reporting.html.sections.speed import speed_section
from rtpurbo.reporting.html.sections.summary import headlines, opening, title_of
from rtpurbo.reporting.html.sections.training import training_section
from rtpurbo.reporting.html.sources import Sources, read_sources
from rtpurbo.reporting.html.view import Missing, Section
from rtpurbo.reporting.palette import variables
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

_UNIT = re.compile(r"(?<=\d) (?=(%|[KMGT]?i?B|ms|points?)(?!\w))")


def write_report(places: Iterable[str | Path], output: str | Path) -> None:
    """Writes the report of an artifact and files of results.

    Args:
        places: see `rtpurbo.reporting.html.sources.read_sources`.
        output: the HTML file.

    Raises:
        RTPurboError: matplotlib is not installed, or a source is missing, broken or newer than this
            library.
    """
    check_matplotlib("`rtpurbo report`")
    write_text_atomically(output, page(read_sources(places)))


def page(sources: Sources, date: str | None = None) -> str:
    """Returns the report as HTML, with today's date in the footer if none is given."""
    made = [make(sources) for make in _SECTIONS]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title_of(sources),
            opening=opening(sources),
            headlines=headlines(sources),
            sections=[section for section in made if isinstance(section, Section)],
            missing=[section for section in made if isinstance(section, Missing)],
            light=variables(0),
            dark=variables(1),
            version=__version__,
            date=date or datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        )
        + "\n"
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("rtpurbo.reporting.html", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_keep_units,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _keep_units(value: Any) -> Any:
    """Joins a number and its unit by a non-breaking space."""
    # Markup has been escaped already, and holds SVG.
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _UNIT.sub("\u00a0", value)
    return value
