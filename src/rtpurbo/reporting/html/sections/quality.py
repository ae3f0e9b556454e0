"""Scores of every policy next to the dense model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import short_length, suite_title
from rtpurbo.reporting.figures import Axis, Series, length_axis, line_plot
from rtpurbo.reporting.html.policies import by_model, described, lines_by_length, plots_of_policies
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.view import (
    NOTHING,
    Block,
    Cell,
    Folded,
    Heading,
    Missing,
    Plot,
    Section,
    Table,
    Text,
)
from rtpurbo.reporting.losses import NO_DIFFERENCE, Loss, loss_of_mean, loss_of_record
from rtpurbo.reporting.selection import (
    by_suite,
    lengths_of,
    mean_score,
    name_of,
    pick,
    policy_order,
    tasks_of,
)
from rtpurbo.reporting.tables import BY_TASK

_TITLE = "Quality"
_NEAR = 5.0
"""Points from the dense model within which policies get a plot of differences."""

LEGEND = (
    "Below each score: the difference to the dense model (full), in points, or for perplexity in "
    "percent, and 95 % intervals in brackets where the results have them. ▼ is a loss and ▲ a gain "
    "in which neither score lies in the other's interval; ▽ and △ may be chance. Scores without a "
    "recorded interval are judged by Wilson's, from the number of samples. Red marks a loss of at "
    "least 5 outside the interval; yellow a smaller one outside, or a larger one that may be chance "
    "or has no interval. The brackets of a mean hold its difference, paired by question."
)


def quality_section(sources: Sources) -> Section | Missing:
    """Returns plots over lengths and a table for each suite."""
    if not any(quality.records for quality in sources.quality):
        return Missing(_TITLE, "no results of `rtpurbo eval` were given.")
    return Section("quality", _TITLE, [Text(LEGEND), *by_model(sources, _of_model)])


def _of_model(quality: Quality) -> list[Block]:
    policies = policy_order(quality.records)
    plots = _plots(quality, policies)
    blocks: list[Block] = [plots_of_policies(plots, policies)] if plots else []
    return [
        *blocks,
        *_tables(quality, policies),
        Heading("Policies compared"),
        described(policies),
    ]


def _plots(quality: Quality, policies: Sequence[str]) -> list[Plot]:
    """Scores by length: RULER's mean and every other task, where there are several lengths."""
    plots = []
    groups: dict[str, list[Record]] = {}
    for record in quality.records:
        name = name_of(record, False)
        if record.suite in BY_TASK:
            name = f"{suite_title(record.suite)}, mean of tasks"
        groups.setdefault(name, []).append(record)
    for title, records in groups.items():
        lengths, lines = lengths_of(records), lines_by_length(records, policies, mean_score)
        if len(lengths) < 2 or not lines:
            continue
        suite, where = records[0].suite, quality.where(records)
        y = Axis("right answers, %", include=(0.0, 100.0))
        if suite == "perplexity":
            y = Axis("perplexity (lower is better)")
        x = length_axis(lengths)
        plots.append(Plot(title, where, line_plot(title, lines, x, y)))
        if suite in BY_TASK:
            tasks = len({record.task for record in records})
            averages = [average for average in quality.averages if average.suite == suite]
            plots += _differences(title, where, lines, x, averages, tasks, suite)
    return plots


def _differences(
    title: str,
    where: str,
    lines: Sequence[Series],
    x: Axis,
    averages: Sequence[Average],
    tasks: int,
    suite: str,
) -> list[Plot]:
    """Differences to the dense model, for policies so close to it that their lines overlap."""
    dense = {x: y for each in lines if each.name == DENSE_POLICY for x, y in each.points}
    near = []
    for each in lines:
        points = [(x, y - dense[x]) for x, y in each.points if x in dense]
        if points and all(abs(y) <= _NEAR for _, y in points):
            known = [find_average(averages, round(x), each.name, tasks, suite) for x, _ in points]
            intervals = [None if one is None else one.difference_ci95 for one in known]
            hints = [
                f"{each.name}: {y:+.2f} points at {short_length(round(x))}{_between(interval)}"
                for (x, y), interval in zip(points, intervals, strict=True)
            ]
            near.append(replace(each, points=points, intervals=intervals, hints=hints))
    if len(near) < 2:
        return []
    title = f"{title}: difference to full"
    y = Axis("points", lambda value: f"{value:+.3g}" if value else "0", include=(0.0,))
    return [Plot(title, f"bars: 95 % intervals; {where}", line_plot(title, near, x, y))]


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"


def _tables(quality: Quality, policies: Sequence[str]) -> list[Block]:
    tables: list[Block] = []
    suites = by_suite(quality.records)
    short = {suite: suites.pop(suite) for suite in list(suites) if suite in SHORT}
    if short:
        tables.append(_questions_table(quality, short, policies))
    for suite, records in suites.items():
        if suite in BY_TASK:
            tables += _ruler_tables(quality, records, policies)
        else:
            unit = "lower is better" if suite == "perplexity" else "% right"
            tables.append(_table(quality, f"{suite}, {unit}", records, policies))
    return tables


def _questions_table(
    quality: Quality, suites: Mapping[str, Sequence[Record]], policies: Sequence[str]
) -> Table:
    """Suites of short questions by policy, with paired differences."""
    rows: list[list[str | Cell]] = []
    for suite, own in suites.items():
        name = f"{suite_title(suite)} ({max(record.samples for record in own):,})"
        rows.append([name, *_mean_cells(quality, own, policies)])
    records = [record for own in suites.values() for record in own]
    caption = f"Questions, % right; {quality.where(records)}"
    return Table(caption, ("suite (questions)", *policies), rows)


def _ruler_tables(
    quality: Quality, records: Sequence[Record], policies: Sequence[str]
) -> list[Block]:
    """Means by length, then the tasks of each length, all but the longest folded."""
    lengths, tasks, suite = lengths_of(records), tasks_of(records), suite_title(records[0].suite)
    tables: list[Block] = []
    if len(lengths) > 1:
        rows: list[list[str | Cell]] = []
        for length in lengths:
            chosen = pick(records, context_length=length)
            rows.append([short_length(length), *_mean_cells(quality, chosen, policies)])
        caption = f"{suite}, mean of all tasks by length, % right; {quality.where(records)}"
        tables.append(Table(caption, ("length", *policies), rows))
    for length in reversed(lengths):
        chosen = sorted(pick(records, context_length=length), key=lambda r: tasks.index(r.task))
        title = f"{suite} at {short_length(length)}"
        whole = _table(quality, f"{title}, % right", chosen, policies, mean=True)
        tables.append(whole if length == lengths[-1] else Folded(title, whole))
    return tables


def _table(
    quality: Quality,
    caption: str,
    records: Sequence[Record],
    policies: Sequence[str],
    mean: bool = False,
) -> Table:
    """Tests by policy; tasks of one length have their mean at the bottom."""
    scores = {(name_of(record), record.policy): record for record in records}
    tests = list(dict.fromkeys(test for test, _ in scores))
    policies = [name for name in policies if any(record.policy == name for record in records)]
    rows: list[tuple[str | Cell, ...]] = []
    for test in tests:
        dense = scores.get((test, DENSE_POLICY))
        name = name_of(next(r for r in records if name_of(r) == test), with_length=not mean)
        rows.append((name, *(score_cell(scores.get((test, each)), dense) for each in policies)))
    if mean and len(tests) > 1:
        rows.append((Cell(f"mean of {len(tests)}"), *_mean_cells(quality, records, policies)))
    return Table(f"{caption}; {quality.where(records)}", ("test", *policies), rows)


def _mean_cells(quality: Quality, records: Sequence[Record], policies: Sequence[str]) -> list[Cell]:
    """The means of records of one length."""
    dense = mean_score(records, DENSE_POLICY)
    tasks, length = len({record.task for record in records}), records[0].context_length
    return [
        mean_cell(
            mean_score(records, each),
            None if each == DENSE_POLICY else dense,
            find_average(quality.averages, length, each, tasks, records[0].suite),
        )
        for each in policies
    ]


def score_cell(record: Record | None, dense: Record | None) -> Cell:
    """Returns a score, if there is one, with its interval and the difference to the dense model's of the same test."""
    if record is None:
        return Cell(NOTHING, tint="none", bold=False)
    perplexity = record.suite == "perplexity"
    score = f"{record.score:.2f}" if perplexity else f"{record.score:.1f}".removesuffix(".0")
    interval = ""
    if record.ci95 is not None:
        low, high = (f"{end:.2f}" if perplexity else f"{end:.0f}" for end in record.ci95)
        interval = f"[{low}, {high}]"
    if dense is None or record.policy == DENSE_POLICY:
        return Cell(score, lines=(interval,) if interval else ())
    return _cell(score, interval, loss_of_record(record, dense), perplexity)


def mean_cell(mean: float | None, dense: float | None, average: Average | None = None) -> Cell:
    """Returns a mean of scores, if the policy has all tests, with its difference to the dense model's (None for that).

    The interval of the difference is that of the same average, if recorded.
    """
    if mean is None:
        return Cell(NOTHING, tint="none", bold=False)
    if dense is None:
        return Cell(f"{mean:.1f}")
    interval = ""
    if average is not None and average.difference_ci95 is not None:
        low, high = average.difference_ci95
        interval = f"[{low:+.1f}, {high:+.1f}]"
    return _cell(f"{mean:.1f}", interval, loss_of_mean(mean, dense, average))


def _cell(score: str, interval: str, loss: Loss, perplexity: bool = False) -> Cell:
    lines = (interval,) if interval else ()
    if abs(loss.amount) < NO_DIFFERENCE:
        return Cell(score, "±0", lines)
    written = f"{loss.amount:+.1f} %" if perplexity else f"{-loss.amount:+.1f}"
    return Cell(score, f"{loss.sign}{written}", lines, loss.tint)
