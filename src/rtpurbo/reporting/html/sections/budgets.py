"""Histograms of the far tokens that each query reads."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length, suite_at
from rtpurbo.reporting.figures import Axis, bar_plot
from rtpurbo.reporting.html.policies import by_model, main_policy, style_of
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.view import Block, Missing, Plot, Plots, Section, Text
from rtpurbo.reporting.selection import by_suite, lengths_of, pick, policy_order

_TITLE = "Far tokens per query"


def budgets_section(sources: Sources) -> Section | Missing:
    """Returns a histogram for each length, and at the longest for each policy that selects."""
    blocks = by_model(sources, _of_model)
    if not blocks:
        reason = "no results have histograms of far tokens; those of format 1 lack them."
        return Missing(_TITLE, reason)
    said = Text(
        "Queries of retrieval heads by the number of far tokens that they read. Top-p selection reads "
        "few for most queries and many for some; a fixed budget reads the same number for all."
    )
    return Section("budgets", _TITLE, [said, *blocks])


def _of_model(quality: Quality) -> list[Block]:
    plots = []
    policies, main = policy_order(quality.records), main_policy(quality.records)
    for suite, of_suite in by_suite(quality.records).items():
        lengths = lengths_of(of_suite)
        for policy in policies:
            for length in lengths:
                chosen = pick(of_suite, policy=policy, context_length=length)
                if _selects(chosen) and (policy == main or length == lengths[-1]):
                    title = f"{policy}: {suite_at(suite, length)}"
                    style = style_of(policy, policies)
                    plots.append(_plot(title, quality.where(chosen), chosen, style))
    return [Plots(plots)] if plots else []


def _selects(records: Sequence[Record]) -> bool:
    """Returns whether these queries could read some far tokens and leave out others."""
    return any(
        record.far_tokens_histogram
        and sum(record.far_tokens_histogram)
        and record.policy != DENSE_POLICY
        and 0 < (record.far_tokens_read or 0) < 0.999
        for record in records
    )


def _plot(title: str, where: str, records: Sequence[Record], style: int | None) -> Plot:
    histograms = [record.far_tokens_histogram or () for record in records]
    size = max(map(len, histograms))
    counts = [sum(each[place] for each in histograms if place < len(each)) for place in range(size)]
    shares = [count / sum(counts) for count in counts]
    # Bins after the first start at powers of two.
    names = ["none", *(short_length(2 ** (place - 1)) for place in range(1, size))]
    y = Axis("queries", lambda value: f"{100 * value:.3g} %")
    drawing = bar_plot(title, names, shares, y, "far tokens read, from", style, percent)
    return Plot(title, f"{sum(counts):,} queries; {where}", drawing)
