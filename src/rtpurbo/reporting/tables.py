"""Tables of records: a row for each test and figure, a column for each policy."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.questions import babilong
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length
from rtpurbo.reporting.entries import Entry, Grid, policy_order, value_entry
from rtpurbo.reporting.model_card import markdown_rows
from rtpurbo.reporting.selection import lengths_of, name_of, pick
from rtpurbo.reporting.suite_tables import (
    PER_QUERY,
    cache_row,
    questions_grid,
    ruler_grid,
    score_rows,
)

BY_TASK = ("ruler", babilong.SUITE)
"""Suites with a table for each length."""

MOST_POLICIES = 4
"""Policies besides the first in a table of the terminal, so that it fits 80 columns."""


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
        for first in range(2, max(3, len(header)), MOST_POLICIES):
            # Each part has the names of the rows and the first policy.
            columns = [0, 1, *range(first, min(first + MOST_POLICIES, len(header)))]
            table = Table()
            for column in columns:
                table.add_column(
                    header[column], justify="right" if column else "left", overflow="fold"
                )
            for row in rows:
                table.add_row(*(Text(row[column].text, row[column].style) for column in columns))
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
    """Tests of suites with few tasks; figures of reads are those of one test, as suites are not comparable."""
    policies = policy_order(records)
    tests = list(dict.fromkeys(map(name_of, records)))
    # Prose shows what is read on average; needle questions only what the answer reads.
    shown = max(records, key=lambda record: (record.suite == "perplexity", record.context_length))
    measured = {record.policy: record for record in records if name_of(record) == name_of(shown)}
    fields = [("far tokens read", "far_tokens_read", percent)]
    # Results of format 1 lack figures per query.
    if any(record.tokens_read_mean is not None for record in records):
        fields += PER_QUERY
    rows = score_rows(records, tests, name_of)
    for title, field, write in fields:
        values = (getattr(measured.get(policy), field, None) for policy in policies)
        entries = (value_entry(value, write) for value in values)
        rows.append([Entry(f"{title} ({name_of(shown)})"), *entries])
    longest = max(record.context_length for record in records)
    title = f"KV cache at {short_length(cache_length or longest)}"
    rows.append(cache_row(title, pick(records, context_length=longest), policies))
    return ["test", *policies], rows
