"""Tables of records: policies by tests; suites of many tasks are transposed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.questions import babilong
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length
from rtpurbo.reporting.entries import (
    Entry,
    Grid,
    cache_entry,
    policy_order,
    score_entry,
    value_entry,
)
from rtpurbo.reporting.model_card import markdown_rows
from rtpurbo.reporting.selection import lengths_of, pick
from rtpurbo.reporting.suite_tables import questions_grid, ruler_grid

BY_TASK = ("ruler", babilong.SUITE)
"""Suites with a table for each length."""

PER_QUERY = [
    ("tokens read", "tokens_read_mean", "{:,.0f}".format),
    ("attention recall", "mass_kept", percent),
]
"""Title, field and format of figures that are measured at the same test as the far tokens."""


def results_tables(
    records: Sequence[Record],
    cache_length: int | None = None,
    averages: Sequence[Average] = (),
) -> list[Table]:
    """Returns tables for the terminal, with losses to the dense policy in yellow and red.

    Args:
        records: measurements of one or more policies.
        cache_length: tokens at which every cache size was measured; None for each record's length.
        averages: of suites, if there are any.
    """
    tables = []
    for header, rows in _grids(records, cache_length, averages):
        table = Table()
        for number, title in enumerate(header):
            table.add_column(title, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(Text(entry.text, entry.style) for entry in row))
        tables.append(table)
    return tables


def markdown_tables(
    records: Sequence[Record],
    cache_length: int | None = None,
    averages: Sequence[Average] = (),
) -> str:
    """Returns the same tables in Markdown, for model cards and documentation."""
    return "\n\n".join(
        markdown_rows(header, ([entry.text for entry in row] for row in rows))
        for header, rows in _grids(records, cache_length, averages)
    )


def _grids(
    records: Sequence[Record], cache_length: int | None, averages: Sequence[Average]
) -> list[Grid]:
    """Grids of suites with few tasks, of short questions, and of each long suite and length."""
    questions = [record for record in records if record.suite in SHORT]
    others = [record for record in records if record.suite not in (*SHORT, *BY_TASK)]
    grids = [_grid(others, cache_length)] if others else []
    if questions:
        grids.append(questions_grid(questions, averages))
    for suite in BY_TASK:
        own = pick(records, suite=suite)
        for length in lengths_of(own):
            grids.append(ruler_grid(pick(own, context_length=length), averages))
    return grids


def _grid(records: Sequence[Record], cache_length: int | None) -> Grid:
    """The header and the rows of the table."""
    scores = {(_test(record), record.policy): record for record in records}
    tests = list(dict.fromkeys(test for test, _ in scores))
    longest = max((record.context_length for record in records), default=0)
    # Prose shows what is read on the average; needle questions only what the answer reads.
    reads = max(tests, key=lambda test: (test[0] == "perplexity", test[2]), default=None)
    header = ["policy", *(f"{task} {short_length(length)}" for _, task, length in tests)]
    if reads is not None:
        header.append(f"far tokens read ({reads[1]} {short_length(reads[2])})")
    # Results of format 1 lack figures per query.
    per_query = [] if all(item.tokens_read_mean is None for item in records) else PER_QUERY
    header += [title for title, _, _ in per_query]
    header.append(f"KV cache at {short_length(cache_length or longest)}")

    rows = []
    for policy in policy_order(records):
        row = [Entry(policy, "bold" if policy == DENSE_POLICY else "")]
        row += [
            score_entry(scores.get((test, policy)), scores.get((test, DENSE_POLICY)))
            for test in tests
        ]
        if reads is not None:
            fields = [("far_tokens_read", percent), *(each[1:] for each in per_query)]
            record = scores.get((reads, policy))
            row += [value_entry(getattr(record, field, None), write) for field, write in fields]
        found = (
            next(iter(pick(records, policy=name, context_length=longest)), None)
            for name in (policy, DENSE_POLICY)
        )
        row.append(cache_entry(*found))
        rows.append(row)
    return header, rows


def _test(record: Record) -> tuple[str, str, int]:
    task = record.task if record.metric is None else f"{record.task} {record.metric}"
    return record.suite, task, record.context_length
