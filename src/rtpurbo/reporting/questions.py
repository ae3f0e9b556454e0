"""Suites of short questions in one table: a row for each suite, and its difference to full attention."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import suite_title
from rtpurbo.reporting.entries import Entry, Grid, policy_order
from rtpurbo.reporting.ruler import difference_entry, mean_entry


def questions_grid(records: Sequence[Record], averages: Sequence[Average] = ()) -> Grid:
    """The header and the rows.

    Args:
        records: of suites whose questions have their own length, at least one.
        averages: of these suites, if they are there.
    """
    policies = policy_order(records)
    scores = {(record.suite, record.policy): record.score for record in records}
    rows = []
    for suite in dict.fromkeys(record.suite for record in records):
        samples = max(record.samples for record in records if record.suite == suite)
        dense = scores.get((suite, DENSE_POLICY))
        means = [mean_entry(scores.get((suite, policy)), dense) for policy in policies]
        rows.append([Entry(f"{suite_title(suite)} ({samples:,})"), *means])
        pairs = [find_average(averages, 0, policy, 1, suite) for policy in policies]
        if any(pair is not None and pair.difference is not None for pair in pairs):
            title = f"  minus {DENSE_POLICY} (95 %, in pairs)"
            rows.append([Entry(title), *map(difference_entry, pairs)])
    return ["questions", *policies], rows
