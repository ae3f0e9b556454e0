"""Tokens that a retrieval head reads in a decode step, their attention recall, and histograms."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length, suite_at, suite_title
from rtpurbo.reporting.figures import Axis, bar_plot, length_axis, line_plot
from rtpurbo.reporting.html.policies import (
    by_model,
    lines_by_length,
    main_policy,
    plots_of_policies,
    style_of,
)
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.view import (
    NOTHING,
    Block,
    Cell,
    Folded,
    Missing,
    Plot,
    Plots,
    Section,
    Table,
    Text,
)
from rtpurbo.reporting.selection import (
    by_suite,
    far_share,
    lengths_of,
    mean_of_queries,
    name_of,
    pick,
    policy_order,
)

_TITLE = "Tokens read"
_BUDGETS_TITLE = "Far tokens per query"


def reads_section(sources: Sources) -> Section | Missing:
    """Returns plots over lengths, and tables by task and by policy."""
    blocks = by_model(sources, _of_model)
    if not blocks:
        return Missing(_TITLE, "no results record the tokens that were read.")
    said = Text(
        "Figures are per query of a retrieval head in a decode step (in perplexity, of the text). "
        "Far tokens are those beyond window and sinks; attention recall is the share of the query's "
        "full attention that lies on the tokens that it read."
    )
    return Section("reads", _TITLE, [said, *blocks])


def _of_model(quality: Quality) -> list[Block]:
    if not any(map(_has_reads, quality.records)):
        return []
    policies = policy_order(quality.records)
    plots = []
    for suite, records in by_suite(quality.records).items():
        if len(lengths_of(records)) > 1:
            plots += _plots(quality, suite_title(suite), records, policies)
    blocks: list[Block] = [plots_of_policies(plots, policies)] if plots else []
    main = main_policy(quality.records)
    if main is not None:
        known = filter(_has_reads, pick(quality.records, policy=main))
        blocks += [_by_test(quality, records, main) for records in by_suite(known).values()]
    blocks.append(Folded("By policy and length", _by_policy(quality, policies)))
    return blocks


def _plots(
    quality: Quality, name: str, records: Sequence[Record], policies: Sequence[str]
) -> list[Plot]:
    """Tokens read, or their share where only that is known, and attention recall, by length."""
    where, x = quality.where(records), length_axis(lengths_of(records))
    plots = []

    def plot(field: str, title: str, y: Axis) -> None:
        def mean(chosen: Sequence[Record], policy: str) -> float | None:
            share = field == "far_tokens_read"
            found = far_share(chosen, policy) if share else mean_of_queries(chosen, policy, field)
            return None if found is None else max(found, 1e-9)

        lines = lines_by_length(records, policies, mean)
        if lines:
            whole = f"{name}: {title}"
            plots.append(Plot(whole, where, line_plot(whole, lines, x, y)))

    tokens = Axis("tokens read", lambda value: f"{value:,.0f}", "log")
    plot("tokens_read_mean", "tokens read per query", tokens)
    if not plots:
        far = Axis("far tokens read", _percent, include=(0.0,))
        plot("far_tokens_read", "far tokens read", far)
    recall = Axis("attention recall", _percent, include=(1.0,))
    plot("mass_kept", "attention recall", recall)
    return plots


def _by_test(quality: Quality, records: Sequence[Record], policy: str) -> Table:
    """Tasks by length."""
    lengths = lengths_of(records)
    found = {(name_of(record, False), record.context_length): record for record in records}
    rows = [
        (task, *(_reading(found.get((task, length))) for length in lengths))
        for task in dict.fromkeys(task for task, _ in found)
    ]
    suite = suite_title(records[0].suite)
    if any(record.tokens_read_mean is not None for record in records):
        said = "mean tokens; median / 95th percentile; share of far tokens; attention recall"
    else:
        said = "share of far tokens"
    caption = f"{suite}: tokens read per query by {policy} ({said}); {quality.where(records)}"
    columns = (short_length(length) if length else "own length" for length in lengths)
    return Table(caption, ("task", *columns), rows)


def _reading(record: Record | None) -> str | Cell:
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
        None if record.mass_kept is None else f"{percent(record.mass_kept)} recall",
    ]
    small = tuple(line for line in lines if line is not None)
    return Cell(f"{record.tokens_read_mean:,.0f}", lines=small)


def _without_empty_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Drops columns without measurements: results of format 1 lack most of them."""
    first, *others = zip(header, *rows, strict=True)
    kept = [first, *(column for column in others if set(column[1:]) - {NOTHING})]
    shortened, *body = zip(*kept, strict=True)
    return shortened, body


def _by_policy(quality: Quality, policies: Sequence[str]) -> Table:
    rows = []
    for suite, of_suite in by_suite(quality.records).items():
        for length in lengths_of(of_suite):
            for policy in policies:
                chosen = pick(of_suite, policy=policy, context_length=length)
                if not chosen or policy == DENSE_POLICY:
                    continue
                tokens = mean_of_queries(chosen, policy, "tokens_read_mean")
                mass = mean_of_queries(chosen, policy, "mass_kept")
                far = far_share(chosen, policy)
                rows.append(
                    (
                        f"{suite_at(suite, length)}: {policy}",
                        NOTHING if tokens is None else f"{tokens:,.0f}",
                        NOTHING if far is None else percent(far),
                        NOTHING if mass is None else percent(mass),
                    )
                )
    header = ("suite, length, policy", "tokens, mean", "far tokens", "attention recall")
    caption = f"Means over tests; {quality.where(quality.records)}"
    return Table(caption, *_without_empty_columns(header, rows))


def _has_reads(record: Record) -> bool:
    return record.far_tokens_read is not None or record.tokens_read_mean is not None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def budgets_section(sources: Sources) -> Section | Missing:
    """Returns a histogram for each length, and at the longest for each policy that selects."""
    blocks = by_model(sources, _histograms)
    if not blocks:
        reason = "no results have histograms of far tokens; those of format 1 lack them."
        return Missing(_BUDGETS_TITLE, reason)
    said = Text(
        "Queries of retrieval heads by the number of far tokens that they read. Top-p selection reads "
        "few for most queries and many for some; a fixed budget reads the same number for all."
    )
    return Section("budgets", _BUDGETS_TITLE, [said, *blocks])


def _histograms(quality: Quality) -> list[Block]:
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
                    plots.append(_histogram(title, quality.where(chosen), chosen, style))
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


def _histogram(title: str, where: str, records: Sequence[Record], style: int | None) -> Plot:
    histograms = [record.far_tokens_histogram or () for record in records]
    size = max(map(len, histograms))
    counts = [sum(each[place] for each in histograms if place < len(each)) for place in range(size)]
    shares = [count / sum(counts) for count in counts]
    # Bins after the first start at powers of two.
    names = ["none", *(short_length(2 ** (place - 1)) for place in range(1, size))]
    y = Axis("queries", _percent)
    drawing = bar_plot(title, names, shares, y, "far tokens read, from", style, percent)
    return Plot(title, f"{sum(counts):,} queries; {where}", drawing)
