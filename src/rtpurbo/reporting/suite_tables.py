"""Tables of suites of many tasks (RULER, BABILong) and of suites of short questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length, suite_title
from rtpurbo.reporting.entries import (
    Entry,
    Grid,
    cache_entry,
    policy_order,
    score_entry,
    style_of,
    value_entry,
)
from rtpurbo.reporting.losses import Loss, loss_of_mean
from rtpurbo.reporting.selection import (
    by_suite,
    far_share,
    mean_of_queries,
    mean_score,
    tasks_of,
)

PER_QUERY = [
    ("tokens read", "tokens_read_mean", "{:,.0f}".format),
    ("attention recall", "mass_kept", percent),
]
"""Title, field and format of figures per query."""


def score_rows(
    records: Sequence[Record], tests: Sequence[str], name_of: Callable[[Record], str]
) -> list[list[Entry]]:
    """Returns a row for each test, with the score of every policy.

    Args:
        records: measurements.
        tests: names of the tests, in the order of the rows.
        name_of: returns the name of a record's test.
    """
    policies = policy_order(records)
    found = {(name_of(record), record.policy): record for record in records}
    return [
        [
            Entry(test),
            *(
                score_entry(found.get((test, policy)), found.get((test, DENSE_POLICY)))
                for policy in policies
            ),
        ]
        for test in tests
    ]


def cache_row(title: str, records: Sequence[Record], policies: Sequence[str]) -> list[Entry]:
    """Returns a row with the cache size of every policy, from its first record."""
    first = {record.policy: record for record in reversed(records)}
    dense = first.get(DENSE_POLICY)
    return [Entry(title), *(cache_entry(first.get(name), dense) for name in policies)]


def questions_grid(records: Sequence[Record], averages: Sequence[Average] = ()) -> Grid:
    """Returns a row for each suite of short questions, and its difference to the dense model.

    Args:
        records: of suites whose questions have their own length, at least one.
        averages: of these suites, if there are any.
    """
    policies = policy_order(records)
    scores = {(record.suite, record.policy): record.score for record in records}
    rows = []
    for suite, own in by_suite(records).items():
        samples = max(record.samples for record in own)
        dense = scores.get((suite, DENSE_POLICY))
        pairs = [find_average(averages, 0, policy, 1, suite) for policy in policies]
        means = [
            mean_entry(scores.get((suite, policy)), dense, pair)
            for policy, pair in zip(policies, pairs, strict=True)
        ]
        rows.append([Entry(f"{suite_title(suite)} ({samples:,})"), *means])
        if any(pair is not None and pair.difference is not None for pair in pairs):
            title = f"  minus {DENSE_POLICY} (95 %, in pairs)"
            rows.append([Entry(title), *map(difference_entry, pairs)])
    return ["questions", *policies], rows


def ruler_grid(records: Sequence[Record], averages: Sequence[Average] = ()) -> Grid:
    """Returns a row for each task of a suite at one length, their mean, and what was read.

    Args:
        records: of one suite and one length, at least one.
        averages: of these tasks, if there are any; those of other lengths are ignored.
    """
    tasks, policies = tasks_of(records), policy_order(records)
    suite, length = records[0].suite, records[0].context_length
    header = [f"{suite_title(suite)} {short_length(length)}", *policies]
    rows = score_rows(records, tasks, lambda record: record.task)
    means = {policy: mean_score(records, policy) for policy in policies}
    found = {name: find_average(averages, length, name, len(tasks), suite) for name in policies}
    rows.append(
        [
            Entry(f"mean of {len(tasks)}", "bold"),
            *(mean_entry(means[name], means.get(DENSE_POLICY), found[name]) for name in policies),
        ]
    )
    if any(one is not None and one.difference is not None for one in found.values()):
        title = f"minus {DENSE_POLICY} (95 %, in pairs)"
        rows.append([Entry(title), *(difference_entry(found[name]) for name in policies)])
    shares = (value_entry(far_share(records, name), percent) for name in policies)
    rows.append([Entry("far tokens read (mean)"), *shares])
    if any(record.tokens_read_mean is not None for record in records):
        for title, field, write in PER_QUERY:
            values = (mean_of_queries(records, name, field) for name in policies)
            entries = (value_entry(value, write) for value in values)
            rows.append([Entry(f"{title} (mean)"), *entries])
    # The cache has the same length for every task.
    rows.append(cache_row("KV cache", records, policies))
    return header, rows


def mean_entry(mean: float | None, dense: float | None, average: Average | None = None) -> Entry:
    """Returns a mean in percent, coloured by the loss to the dense policy and its interval."""
    if mean is None:
        return Entry("-")
    style = "" if dense is None else style_of(loss_of_mean(mean, dense, average))
    return Entry(f"{mean:.1f} %", style)


def difference_entry(average: Average | None) -> Entry:
    """Returns the difference of a mean to the dense model's, coloured if it is significant."""
    if average is None or average.difference is None or average.difference_ci95 is None:
        return Entry("-")
    low, high = average.difference_ci95
    style = style_of(Loss(-average.difference, is_chance=False)) if high < 0 else ""
    return Entry(f"{average.difference:+.1f} ({low:+.1f} to {high:+.1f})", style)
