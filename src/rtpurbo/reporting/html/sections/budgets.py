"""How many far tokens each row reads: few on most rows, many on some."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length, suite_at
from rtpurbo.reporting.entries import policy_order
from rtpurbo.reporting.html.axes import linear_axis
from rtpurbo.reporting.html.markup import Content, Markup, join, tag
from rtpurbo.reporting.html.plots import bar_plot
from rtpurbo.reporting.html.policies import lengths_of, main_policy, style_of
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.tables import paragraph

_TITLE = "Budgets, row by row"


def budgets_section(sources: Sources) -> Section | Missing:
    """A histogram for each length, and at the longest for each policy that selects."""
    parts: list[Content] = []
    for quality in sources.quality:
        plots = _plots(quality)
        if plots and len(sources.quality) > 1:
            parts.append(tag("h3", f"Model: {quality.model}"))
        if plots:
            parts.append(tag("div", plots, class_="plots"))
    if not parts:
        reason = "no results have histograms of far tokens; those of format 1 lack them."
        return Missing(_TITLE, reason)
    said = paragraph(
        "Rows by the far tokens that they read. A rule by mass spends little on most rows and much "
        "on a few; a fixed number spends the same on all."
    )
    return Section("budgets", _TITLE, join(said, parts))


def _plots(quality: Quality) -> list[Markup]:
    plots = []
    policies, main = policy_order(quality.records), main_policy(quality.records)
    for suite in dict.fromkeys(record.suite for record in quality.records):
        of_suite = [record for record in quality.records if record.suite == suite]
        lengths = lengths_of(of_suite)
        for policy in policies:
            for length in lengths:
                chosen = [
                    record
                    for record in of_suite
                    if (record.policy, record.context_length) == (policy, length)
                ]
                if _selects(chosen) and (policy == main or length == lengths[-1]):
                    title = f"{policy}: {suite_at(suite, length)}"
                    plots.append(_plot(title, chosen, style_of(policy, policies)))
    return plots


def _selects(records: Sequence[Record]) -> bool:
    """Whether these rows were free to read some far tokens and not others."""
    return any(
        record.far_tokens_histogram
        and sum(record.far_tokens_histogram)
        and record.policy != DENSE_POLICY
        and 0 < (record.far_tokens_read or 0) < 0.999
        for record in records
    )


def _plot(title: str, records: Sequence[Record], style: int | None) -> Markup:
    histograms = [record.far_tokens_histogram or () for record in records]
    size = max(map(len, histograms))
    counts = [sum(each[place] for each in histograms if place < len(each)) for place in range(size)]
    shares = [count / sum(counts) for count in counts]
    names = ["none", *(_from(place) for place in range(1, size))]
    y = linear_axis("rows", shares, lambda value: f"{100 * value:.3g} %", include=(0,))
    title += f" ({sum(counts):,} rows)"
    return bar_plot(title, names, shares, y, "far tokens read, from", style, percent)


def _from(place: int) -> str:
    """The least number of tokens of a bin."""
    return short_length(2 ** (place - 1))
