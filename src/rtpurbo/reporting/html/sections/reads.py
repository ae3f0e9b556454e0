"""What a retrieval head reads in a decoding step: how much, of what mass, by task and length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length, suite_at, suite_title
from rtpurbo.reporting.entries import policy_order
from rtpurbo.reporting.html.axes import length_axis, linear_axis, log_axis
from rtpurbo.reporting.html.markup import Content, Markup, join, tag
from rtpurbo.reporting.html.plots import Series, line_plot
from rtpurbo.reporting.html.policies import (
    lengths_of,
    main_policy,
    mean_of_rows,
    name_of,
    plots_of_policies,
    style_of,
)
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.tables import NOTHING, cell, folded, paragraph, table

_TITLE = "What it reads"


def reads_section(sources: Sources) -> Section | Missing:
    """Plots over lengths, and tables by task and by policy."""
    parts: list[Content] = []
    for quality in sources.quality:
        if any(map(_says_reads, quality.records)):
            if len(sources.quality) > 1:
                parts.append(tag("h3", f"Model: {quality.model}"))
            parts += _of_model(quality)
    if not parts:
        return Missing(_TITLE, "no results say how much was read.")
    said = paragraph(
        "A row is one query of one retrieval head in a decoding step (in perplexity, of the text). "
        "Far tokens are those beyond window and first tokens; mass kept is the share of the row's "
        "full attention that lies on what it read."
    )
    return Section("reads", _TITLE, join(said, parts))


def far_share(records: Sequence[Record], policy: str) -> float | None:
    """The mean share of far tokens that a policy read, over tests that have any."""
    shares = [
        record.far_tokens_read
        for record in records
        if record.policy == policy and record.far_tokens_read is not None
    ]
    return fmean(shares) if shares else None


def _of_model(quality: Quality) -> list[Content]:
    policies = policy_order(quality.records)
    plots = []
    for suite in dict.fromkeys(record.suite for record in quality.records):
        records = [record for record in quality.records if record.suite == suite]
        if len(lengths_of(records)) > 1:
            plots += _plots(suite_title(suite), records, policies)
    parts: list[Content] = [plots_of_policies(plots, policies)] if plots else []
    main = main_policy(quality.records)
    if main is not None:
        known = [r for r in quality.records if r.policy == main and _says_reads(r)]
        for suite in dict.fromkeys(record.suite for record in known):
            parts.append(_by_test([record for record in known if record.suite == suite], main))
    parts.append(folded("By policy and length", _by_policy(quality, policies)))
    return parts


def _plots(name: str, records: Sequence[Record], policies: Sequence[str]) -> list[Markup]:
    """Tokens read, or their share where only that is known, and mass kept, by length."""
    lengths = lengths_of(records)
    x = length_axis(lengths)
    plots = []
    tokens = _lines(records, policies, "tokens_read_mean", lengths)
    if tokens:
        y = log_axis("tokens read", _values(tokens), lambda value: f"{value:,.0f}")
        plots.append(line_plot(f"{name}: tokens that a row reads", tokens, x, y, legend=False))
    else:
        shares = _lines(records, policies, "far_tokens_read", lengths)
        if shares:
            y = linear_axis("far tokens read", _values(shares), _percent, include=(0,))
            plots.append(line_plot(f"{name}: far tokens read", shares, x, y, legend=False))
    mass = _lines(records, policies, "mass_kept", lengths)
    if mass:
        y = linear_axis("mass kept", _values(mass), _percent, include=(1,))
        plots.append(line_plot(f"{name}: attention mass kept", mass, x, y, legend=False))
    return plots


def _lines(
    records: Sequence[Record], policies: Sequence[str], field: str, lengths: Sequence[int]
) -> list[Series]:
    lines = []
    for policy in policies:
        points = []
        for length in lengths:
            chosen = [
                record
                for record in records
                if (record.policy, record.context_length) == (policy, length)
            ]
            share = field == "far_tokens_read"
            mean = far_share(chosen, policy) if share else mean_of_rows(chosen, field)
            if mean is not None:
                points.append((float(length), mean))
        if points:
            lines.append(Series(policy, points, style_of(policy, policies)))
    return lines


def _by_test(records: Sequence[Record], policy: str) -> Markup:
    """Tasks down, lengths across."""
    lengths = lengths_of(records)
    found = {(name_of(record, False), record.context_length): record for record in records}
    rows = [
        (task, *(_reading(found.get((task, length))) for length in lengths))
        for task in dict.fromkeys(task for task, _ in found)
    ]
    suite = suite_title(records[0].suite)
    if any(record.tokens_read_mean is not None for record in records):
        said = "mean tokens; median / 95th percentile; share of far tokens; mass kept"
    else:
        said = "share of far tokens"
    caption = f"{suite}: what a row of {policy} reads ({said})"
    columns = (short_length(length) if length else "own length" for length in lengths)
    return table(caption, ("task", *columns), rows)


def _reading(record: Record | None) -> Content:
    if record is None:
        return NOTHING
    far = None if record.far_tokens_read is None else percent(record.far_tokens_read)
    if record.tokens_read_mean is None:
        return far or NOTHING
    spread = [
        "?" if value is None else f"{value:,.0f}"
        for value in (record.tokens_read_p50, record.tokens_read_p95)
    ]
    lines = [
        " / ".join(spread),
        None if far is None else f"{far} of far",
        None if record.mass_kept is None else f"{percent(record.mass_kept)} kept",
    ]
    small = [tag("span", line, class_="interval") for line in lines if line is not None]
    return cell(tag("b", f"{record.tokens_read_mean:,.0f}"), small)


def _without_empty_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Results of format 1 lack most of what is measured row by row."""
    kept = [
        place
        for place in range(len(header))
        if place == 0 or any(row[place] != NOTHING for row in rows)
    ]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _by_policy(quality: Quality, policies: Sequence[str]) -> Markup:
    rows = []
    for suite in dict.fromkeys(record.suite for record in quality.records):
        of_suite = [record for record in quality.records if record.suite == suite]
        for length in lengths_of(of_suite):
            for policy in policies:
                chosen = [
                    record
                    for record in of_suite
                    if (record.policy, record.context_length) == (policy, length)
                ]
                if not chosen or policy == DENSE_POLICY:
                    continue
                tokens = mean_of_rows(chosen, "tokens_read_mean")
                mass = mean_of_rows(chosen, "mass_kept")
                far = far_share(chosen, policy)
                rows.append(
                    (
                        f"{suite_at(suite, length)}: {policy}",
                        NOTHING if tokens is None else f"{tokens:,.0f}",
                        NOTHING if far is None else percent(far),
                        NOTHING if mass is None else percent(mass),
                    )
                )
    header = ("suite, length, policy", "tokens, mean", "far tokens", "mass kept")
    return table("Means over tests", *_without_empty_columns(header, rows))


def _says_reads(record: Record) -> bool:
    return record.far_tokens_read is not None or record.tokens_read_mean is not None


def _values(lines: Sequence[Series]) -> list[float]:
    return [max(y, 1e-9) for each in lines for _, y in each.points]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
