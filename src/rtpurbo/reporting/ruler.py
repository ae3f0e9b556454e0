"""RULER or BABILong at one length: a row for each task, a column for each policy, and the mean."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.formats import percent, short_length, suite_title
from rtpurbo.reporting.entries import (
    Entry,
    Grid,
    cache_entry,
    loss_style,
    policy_order,
    score_entry,
)


def ruler_grid(records: Sequence[Record], averages: Sequence[Average] = ()) -> Grid:
    """The header and the rows.

    Args:
        records: of one of them, all of one length and at least one.
        averages: of these tasks, if they are there; those of other lengths are passed over.
    """
    scores = {(record.task, record.policy): record for record in records}
    measured = {record.task for record in records}
    tasks = [task for task in TASKS if task in measured] + sorted(measured - set(TASKS))
    policies = policy_order(records)
    suite, length = records[0].suite, records[0].context_length
    header = [f"{suite_title(suite)} {short_length(length)}", *policies]
    rows = [
        [
            Entry(task),
            *(
                score_entry(scores.get((task, policy)), scores.get((task, DENSE_POLICY)))
                for policy in policies
            ),
        ]
        for task in tasks
    ]
    means = {policy: _mean(records, policy, len(tasks)) for policy in policies}
    rows.append(
        [
            Entry(f"mean of {len(tasks)}", "bold"),
            *(mean_entry(means[policy], means.get(DENSE_POLICY)) for policy in policies),
        ]
    )
    found = {name: find_average(averages, length, name, len(tasks), suite) for name in policies}
    if any(one is not None and one.difference is not None for one in found.values()):
        beside = f"minus {DENSE_POLICY} (95 %, in pairs)"
        rows.append([Entry(beside), *(difference_entry(found[name]) for name in policies)])
    rows.append(
        [Entry("far tokens read (mean)"), *(_far_entry(records, name) for name in policies)]
    )
    if any(record.tokens_read_mean is not None for record in records):
        rows.append(
            [Entry("tokens read (mean)"), *(_tokens_entry(records, name) for name in policies)]
        )
        rows.append([Entry("mass kept"), *(_mass_entry(records, name) for name in policies)])
    # Every task weighs the cache at the same length.
    first = {record.policy: record for record in reversed(records)}
    rows.append(
        [
            Entry("KV cache"),
            *(cache_entry(first[name], first.get(DENSE_POLICY)) for name in policies),
        ]
    )
    return header, rows


def _mean(records: Sequence[Record], policy: str, num_tasks: int) -> float | None:
    """The mean of a policy's tasks; None unless it has all of them."""
    scores = [record.score for record in records if record.policy == policy]
    return fmean(scores) if len(scores) == num_tasks else None


def _far_entry(records: Sequence[Record], policy: str) -> Entry:
    shares = [
        record.far_tokens_read
        for record in records
        if record.policy == policy and record.far_tokens_read is not None
    ]
    return Entry(percent(fmean(shares)) if shares else "-")


def _tokens_entry(records: Sequence[Record], policy: str) -> Entry:
    mean = _mean_of_rows(records, policy, "tokens_read_mean")
    return Entry("-" if mean is None else f"{mean:,.0f}")


def _mass_entry(records: Sequence[Record], policy: str) -> Entry:
    mean = _mean_of_rows(records, policy, "mass_kept")
    return Entry("-" if mean is None else percent(mean))


def _mean_of_rows(records: Sequence[Record], policy: str, field: str) -> float | None:
    """The mean of what every row counts for as much."""
    measured = [record for record in records if record.policy == policy and record.measured_rows]
    rows = sum(record.measured_rows for record in measured)
    return (
        sum(getattr(record, field) * record.measured_rows for record in measured) / rows
        if rows
        else None
    )


def mean_entry(mean: float | None, dense: float | None) -> Entry:
    """Returns a mean in percent, with the loss against the dense policy as a colour."""
    if mean is None:
        return Entry("-")
    style = "" if dense is None else loss_style(dense - mean, slight=0)
    return Entry(f"{mean:.1f} %", style)


def difference_entry(average: Average | None) -> Entry:
    """How far a mean is from the dense model's, yellow or red if that is no chance."""
    if average is None or average.difference is None or average.difference_ci95 is None:
        return Entry("-")
    low, high = average.difference_ci95
    style = loss_style(-average.difference, slight=0) if high < 0 else ""
    return Entry(f"{average.difference:+.1f} ({low:+.1f} to {high:+.1f})", style)
