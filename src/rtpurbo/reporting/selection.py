"""Selections of records and their means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from rtpurbo.evaluation.policies import POLICIES
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.formats import short_length, suite_title


def pick(records: Iterable[Record], **values: Any) -> list[Record]:
    """Returns the records whose fields have these values."""
    return [
        record
        for record in records
        if all(getattr(record, name) == value for name, value in values.items())
    ]


def policy_order(records: Iterable[Record]) -> list[str]:
    """Returns the policies of some records in display order, unknown ones last."""
    policies = list(dict.fromkeys(record.policy for record in records))
    order = list(POLICIES)
    return sorted(policies, key=lambda name: order.index(name) if name in order else len(order))


def name_of(record: Record, with_length: bool = True) -> str:
    """Returns task, metric where there are several, and length of a record."""
    name = record.task if record.metric is None else f"{record.task} {record.metric}"
    # Questions with lengths of their own have none to name.
    if record.context_length == 0:
        return suite_title(record.suite)
    return f"{name} {short_length(record.context_length)}" if with_length else name


def by_suite(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Returns the records of each suite, in the order of its first record."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.suite, []).append(record)
    return groups


def lengths_of(records: Iterable[Record]) -> list[int]:
    """Returns the context lengths of some records, ascending."""
    return sorted({record.context_length for record in records})


def tasks_of(records: Iterable[Record]) -> list[str]:
    """Returns the tasks of some records: RULER's in its order, then others by name."""
    found = {record.task for record in records}
    return [task for task in TASKS if task in found] + sorted(found - set(TASKS))


def mean_score(records: Sequence[Record], policy: str) -> float | None:
    """Returns the mean score of a policy over all tests of some records; None unless it has all."""
    tests = {
        (record.suite, record.task, record.metric, record.context_length) for record in records
    }
    scores = [record.score for record in pick(records, policy=policy)]
    return fmean(scores) if scores and len(scores) == len(tests) else None


def far_share(records: Iterable[Record], policy: str) -> float | None:
    """Returns the mean share of far tokens that a policy read, over tests that have any."""
    shares = [
        record.far_tokens_read
        for record in pick(records, policy=policy)
        if record.far_tokens_read is not None
    ]
    return fmean(shares) if shares else None


def mean_of_queries(records: Iterable[Record], policy: str, field: str) -> float | None:
    """Returns the mean of a field over measured queries, which all have the same weight."""
    known = [
        record
        for record in pick(records, policy=policy)
        if record.measured_rows and getattr(record, field) is not None
    ]
    queries = sum(record.measured_rows for record in known)
    total = sum(getattr(record, field) * record.measured_rows for record in known)
    return total / queries if queries else None
