"""Suites of short questions in one table: a row for each suite, and its difference to full attention."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.reporting.entries import Entry, Grid, policy_order, score_entry
from rtpurbo.reporting.formats import suite_title
from rtpurbo.reporting.ruler import difference_entry


def questions_grid(records: Sequence[Record], averages: Sequence[Average] = ()) -> Grid:
    """The header and the rows.

    Args:
        records: of suites whose questions have their own length, at least one.
        averages: of these suites, if they are there.
    """
    policies = policy_order(records)
    scores = {(record.suite, record.policy): record for record in records}
    rows = []
    for suite in dict.fromkeys(record.suite for record in records):
        found = [scores.get((suite, policy)) for policy in policies]
        samples = max(record.samples for record in found if record is not None)
        dense = scores.get((suite, DENSE_POLICY))
        rows.append(
            [
                Entry(f"{suite_title(suite)} ({samples:,})"),
                *(score_entry(record, dense) for record in found),
            ]
        )
        pairs = [find_average(averages, 0, policy, 1, suite) for policy in policies]
        if any(pair is not None and pair.difference is not None for pair in pairs):
            title = f"  minus {DENSE_POLICY} (95 %, in pairs)"
            rows.append([Entry(title), *map(difference_entry, pairs)])
    return ["questions", *policies], rows
