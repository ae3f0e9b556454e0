"""What a section is."""

from __future__ import annotations

from dataclasses import dataclass

from rtpurbo.reporting.html.markup import Markup


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading.

    Attributes:
        anchor: for links.
        title: its heading.
        body: what follows.
    """

    anchor: str
    title: str
    body: Markup


@dataclass(frozen=True)
class Missing:
    """A part that cannot be shown.

    Attributes:
        title: what the heading would be.
        reason: a sentence that says what would have to be measured.
    """

    title: str
    reason: str
