"""What the sparse model keeps: every policy beside the dense model, loss by loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.formats import short_length, suite_title
from rtpurbo.reporting.entries import policy_order
from rtpurbo.reporting.html.axes import Axis, length_axis, linear_axis
from rtpurbo.reporting.html.markup import Content, Markup, join, tag
from rtpurbo.reporting.html.plots import Series, line_plot
from rtpurbo.reporting.html.policies import (
    described,
    lengths_of,
    name_of,
    plots_of_policies,
    style_of,
)
from rtpurbo.reporting.html.sections.scores import LEGEND, mean_cell, score_cell
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.tables import folded, paragraph, table
from rtpurbo.reporting.tables import BY_TASK

_TITLE = "What it keeps"
_NEAR = 5.0
"""Points from the dense model within which policies are drawn once more, closely."""


def quality_section(sources: Sources) -> Section | Missing:
    """Plots over lengths and a table for each suite."""
    if not any(quality.records for quality in sources.quality):
        return Missing(_TITLE, "no results of `rtpurbo eval` were given.")
    parts: list[Content] = []
    for quality in sources.quality:
        policies = policy_order(quality.records)
        if len(sources.quality) > 1:
            parts.append(tag("h3", f"Model: {quality.model}"))
        plots = _plots(quality, policies)
        parts.append(plots_of_policies(plots, policies) if plots else None)
        parts += _tables(quality, policies)
        parts.append(tag("h3", "What was compared"))
        parts.append(described(policies))
    return Section("quality", _TITLE, join(paragraph(LEGEND), parts))


def mean_score(records: Sequence[Record], policy: str) -> float | None:
    """The mean score of a policy over all tests of some records; None unless it has every test."""
    tests = {(name_of(record), record.suite) for record in records}
    scores = [record.score for record in records if record.policy == policy]
    return fmean(scores) if scores and len(scores) == len(tests) else None


def _plots(quality: Quality, policies: Sequence[str]) -> list[Markup]:
    """A score by length for RULER's mean and for every other task, where lengths are several."""
    plots = []
    groups: dict[str, list[Record]] = {}
    for record in quality.records:
        name = name_of(record, False)
        if record.suite in BY_TASK:
            name = f"{suite_title(record.suite)}, mean of tasks"
        groups.setdefault(name, []).append(record)
    for title, records in groups.items():
        lengths, lines = lengths_of(records), _lines(records, policies)
        if len(lengths) < 2 or not lines:
            continue
        values = [y for each in lines for _, y in each.points]
        if records[0].suite == "perplexity":
            y = linear_axis("perplexity (lower is better)", values)
        else:
            y = linear_axis("right answers, %", values, include=(0, 100))
        plots.append(line_plot(title, lines, length_axis(lengths), y, legend=False))
        suite = records[0].suite
        if suite in BY_TASK:
            tasks = len({record.task for record in records})
            averages = [average for average in quality.averages if average.suite == suite]
            plots += _closely(title, lines, length_axis(lengths), averages, tasks, suite)
    return plots


def _lines(records: Sequence[Record], policies: Sequence[str]) -> list[Series]:
    """The mean score of every policy, by length."""
    lines = []
    for policy in policies:
        means = [
            (length, mean_score([r for r in records if r.context_length == length], policy))
            for length in lengths_of(records)
        ]
        points = [(float(length), mean) for length, mean in means if mean is not None]
        if points:
            lines.append(Series(policy, points, style_of(policy, policies)))
    return lines


def _closely(
    title: str,
    lines: Sequence[Series],
    x: Axis,
    averages: Sequence[Average],
    tasks: int,
    suite: str,
) -> list[Markup]:
    """Differences to the dense model of the policies that stay near it, which lie on each other else."""
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
    values = [y for each in near for _, y in each.points]
    values += [end for each in near for ends in each.intervals for end in ends or ()]
    y = linear_axis("points", values, lambda value: f"{value:+.3g}" if value else "0", include=(0,))
    return [line_plot(f"{title}: difference to full", near, x, y, legend=False)]


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"


def _tables(quality: Quality, policies: Sequence[str]) -> list[Markup]:
    tables = []
    short = [record for record in quality.records if record.suite in SHORT]
    if short:
        tables.append(_questions_table(short, policies, quality.averages))
    for suite in dict.fromkeys(record.suite for record in quality.records):
        records = [record for record in quality.records if record.suite == suite]
        if suite in SHORT:
            continue
        if suite in BY_TASK:
            tables += _ruler_tables(records, policies, quality.averages)
        else:
            unit = "lower is better" if suite == "perplexity" else "in %"
            tables.append(_table(f"{suite}, {unit}", records, policies))
    return tables


def _questions_table(
    records: Sequence[Record], policies: Sequence[str], averages: Sequence[Average]
) -> Markup:
    """Suites of short questions down, policies across, with paired differences."""
    rows = []
    for suite in dict.fromkeys(record.suite for record in records):
        own = [record for record in records if record.suite == suite]
        name = f"{suite_title(suite)} ({max(record.samples for record in own):,})"
        rows.append((name, *_mean_cells(own, policies, averages)))
    return table("Questions, in %", ("suite (questions)", *policies), rows, "scores")


def _ruler_tables(
    records: Sequence[Record], policies: Sequence[str], averages: Sequence[Average]
) -> list[Markup]:
    """Means by length, then the tasks of each length, all but the longest folded."""
    lengths, suite = lengths_of(records), suite_title(records[0].suite)
    tables = []
    if len(lengths) > 1:
        rows = []
        for length in lengths:
            chosen = [record for record in records if record.context_length == length]
            rows.append((short_length(length), *_mean_cells(chosen, policies, averages)))
        caption = f"{suite}, mean of all tasks by length, in %"
        tables.append(table(caption, ("length", *policies), rows, "scores"))
    for length in reversed(lengths):
        chosen = [record for record in records if record.context_length == length]
        title = f"{suite} at {short_length(length)}"
        whole = _table(f"{title}, in %", _in_task_order(chosen), policies, averages)
        tables.append(whole if length == lengths[-1] else folded(title, whole))
    return tables


def _table(
    caption: str,
    records: Sequence[Record],
    policies: Sequence[str],
    averages: Sequence[Average] | None = None,
) -> Markup:
    """Tests by policy, with their mean at the bottom if averages are given, if only none."""
    scores = {(name_of(record), record.policy): record for record in records}
    tests = list(dict.fromkeys(test for test, _ in scores))
    policies = [name for name in policies if any(record.policy == name for record in records)]
    samples = sorted({record.samples for record in records})
    counted = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    rows: list[tuple[Content, ...]] = []
    for test in tests:
        dense = scores.get((test, DENSE_POLICY))
        name = name_of(next(r for r in records if name_of(r) == test), averages is None)
        rows.append((name, *(score_cell(scores.get((test, each)), dense) for each in policies)))
    if averages is not None and len(tests) > 1:
        rows.append((tag("b", f"mean of {len(tests)}"), *_mean_cells(records, policies, averages)))
    return table(f"{caption}; {counted} samples a test", ("test", *policies), rows, "scores")


def _mean_cells(
    records: Sequence[Record], policies: Sequence[str], averages: Sequence[Average]
) -> list[Markup]:
    """The means of records of one length."""
    dense = mean_score(records, DENSE_POLICY)
    tasks, length = len({record.task for record in records}), records[0].context_length
    return [
        mean_cell(
            mean_score(records, each),
            None if each == DENSE_POLICY else dense,
            find_average(averages, length, each, tasks, records[0].suite),
        )
        for each in policies
    ]


def _in_task_order(records: Sequence[Record]) -> list[Record]:
    order = list(TASKS)
    place = {
        task: order.index(task) if task in order else len(order)
        for task in {record.task for record in records}
    }
    return sorted(records, key=lambda record: (place[record.task], record.task))
