"""Tables of records: a row for each test and figure, a column for each policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from rtpurbo.evaluation.averages import Average, find_average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.questions import babilong
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record
from rtpurbo.files import write_text_atomically
from rtpurbo.formats import percent, short_bytes, short_length, suite_title
from rtpurbo.models.artifact_config import CARD_FILE, LOG_FILE, ArtifactConfig
from rtpurbo.reporting.losses import Loss, loss_of_mean, loss_of_record
from rtpurbo.reporting.model_card import markdown_rows, model_card
from rtpurbo.reporting.selection import (
    by_suite,
    far_share,
    lengths_of,
    mean_of_queries,
    mean_score,
    name_of,
    pick,
    policy_order,
    tasks_of,
)
from rtpurbo.training.curves import curves_as_text
from rtpurbo.training.log import TrainingLog

BY_TASK = ("ruler", babilong.SUITE)
"""Suites with a table for each length."""

MOST_POLICIES = 4
"""Policies besides the first in a table of the terminal, so that it fits 80 columns."""

_PER_QUERY = [
    ("tokens read", "tokens_read_mean", "{:,.0f}".format),
    ("attention recall", "mass_kept", percent),
]
"""Title, field and format of figures per query."""

_STYLES = {"heavy": "bold red", "slight": "yellow", "": ""}
"""Rich style of a loss: red for a heavy, significant one, yellow for a slight one."""


class Entry(NamedTuple):
    """Text of a table cell, with its rich style."""

    text: str
    style: str = ""


_NOTHING = Entry("-")

Grid = tuple[list[str], list[list[Entry]]]
"""The header and the rows of a table."""


def results_tables(
    records: Sequence[Record],
    cache_length: int | None = None,
    averages: Sequence[Average] = (),
) -> list[Table]:
    """Returns tables for the terminal, with losses to the dense policy in yellow and red.

    If `cache_length` is given, every cache size is that at this length, not at the record's.
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
                table.add_row(*(Text(*row[column]) for column in columns))
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


def rewrite_card(folder: Path, records: Sequence[Record]) -> None:
    """Writes the card of the artifact in `folder` again, with results."""
    curves = curves_as_text(TrainingLog(folder / LOG_FILE).entries())
    card = model_card(ArtifactConfig.read(folder), markdown_tables(records), curves=curves)
    write_text_atomically(folder / CARD_FILE, card)


def cache_text(record: Record | None, dense: Record | None) -> str:
    """Returns the size of a cache, and its ratio to the dense model's."""
    if record is None or record.kv_bytes is None:
        return _NOTHING.text
    text = short_bytes(record.kv_bytes)
    if dense is not None and dense.kv_bytes and record.policy != DENSE_POLICY:
        text += f" ({record.kv_bytes / dense.kv_bytes:.2f}x)"
    return text


def _grids(
    records: Sequence[Record], cache_length: int | None, averages: Sequence[Average]
) -> list[Grid]:
    """Grids of suites with few tasks, of short questions, and of each long suite and length."""
    questions = [record for record in records if record.suite in SHORT]
    others = [record for record in records if record.suite not in (*SHORT, *BY_TASK)]
    grids = [_tests_grid(others, cache_length)] if others else []
    if questions:
        grids.append(_questions_grid(questions, averages))
    for suite in BY_TASK:
        own = pick(records, suite=suite)
        for length in lengths_of(own):
            grids.append(_tasks_grid(pick(own, context_length=length), averages))
    return grids


def _tests_grid(records: Sequence[Record], cache_length: int | None) -> Grid:
    """Tests of suites with few tasks; figures of reads are those of one test, as suites are not comparable."""
    policies = policy_order(records)
    # Prose shows what is read on average; needle questions only what the answer reads.
    shown = max(records, key=lambda record: (record.suite == "perplexity", record.context_length))
    measured = {record.policy: record for record in records if name_of(record) == name_of(shown)}
    fields = [("far tokens read", "far_tokens_read", percent)]
    # Results of format 1 lack figures per query.
    if any(record.tokens_read_mean is not None for record in records):
        fields += _PER_QUERY
    rows = _score_rows(records, dict.fromkeys(map(name_of, records)), name_of)
    for title, field, write in fields:
        values = (getattr(measured.get(policy), field, None) for policy in policies)
        rows.append([Entry(f"{title} ({name_of(shown)})"), *_entries(values, write)])
    longest = max(record.context_length for record in records)
    title = f"KV cache at {short_length(cache_length or longest)}"
    rows.append(_cache_row(title, pick(records, context_length=longest), policies))
    return ["test", *policies], rows


def _questions_grid(records: Sequence[Record], averages: Sequence[Average]) -> Grid:
    """A row for each suite of short questions, and its difference to the dense model."""
    policies = policy_order(records)
    rows: list[list[Entry]] = []
    for suite, own in by_suite(records).items():
        title = f"{suite_title(suite)} ({max(record.samples for record in own):,})"
        pairs = [find_average(averages, 0, policy, 1, suite) for policy in policies]
        rows += _mean_rows(Entry(title), "  ", own, policies, pairs)
    return ["questions", *policies], rows


def _tasks_grid(records: Sequence[Record], averages: Sequence[Average]) -> Grid:
    """A row for each task of a suite at one length, their mean, and what was read."""
    tasks, policies = tasks_of(records), policy_order(records)
    suite, length = records[0].suite, records[0].context_length
    rows = _score_rows(records, tasks, lambda record: record.task)
    pairs = [find_average(averages, length, name, len(tasks), suite) for name in policies]
    rows += _mean_rows(Entry(f"mean of {len(tasks)}", "bold"), "", records, policies, pairs)
    shares = (far_share(records, name) for name in policies)
    rows.append([Entry("far tokens read (mean)"), *_entries(shares, percent)])
    if any(record.tokens_read_mean is not None for record in records):
        for title, field, write in _PER_QUERY:
            values = (mean_of_queries(records, name, field) for name in policies)
            rows.append([Entry(f"{title} (mean)"), *_entries(values, write)])
    # The cache has the same length for every task.
    rows.append(_cache_row("KV cache", records, policies))
    return [f"{suite_title(suite)} {short_length(length)}", *policies], rows


def _score_rows(
    records: Sequence[Record], tests: Iterable[str], name_of: Callable[[Record], str]
) -> list[list[Entry]]:
    """A row for each test, with the score of every policy."""
    policies = policy_order(records)
    found = {(name_of(record), record.policy): record for record in records}
    return [
        [
            Entry(test),
            *(
                _score(found.get((test, policy)), found.get((test, DENSE_POLICY)))
                for policy in policies
            ),
        ]
        for test in tests
    ]


def _score(record: Record | None, dense: Record | None) -> Entry:
    """Right answers in percent, or perplexity, coloured by the loss to the dense model."""
    if record is None:
        return _NOTHING
    style = "" if dense is None else _STYLES[loss_of_record(record, dense).tint]
    written = f"{record.score:.2f}" if record.suite == "perplexity" else f"{record.score:.0f} %"
    return Entry(written, style)


def _mean_rows(
    title: Entry,
    indent: str,
    records: Sequence[Record],
    policies: Sequence[str],
    pairs: Sequence[Average | None],
) -> list[list[Entry]]:
    """A row of means in percent, and one of their paired differences if there are any."""
    means = [mean_score(records, policy) for policy in policies]
    dense = mean_score(records, DENSE_POLICY)

    def mean_entry(mean: float | None, pair: Average | None) -> Entry:
        if mean is None:
            return _NOTHING
        style = "" if dense is None else _STYLES[loss_of_mean(mean, dense, pair).tint]
        return Entry(f"{mean:.1f} %", style)

    rows = [[title, *map(mean_entry, means, pairs)]]
    if any(pair is not None and pair.difference is not None for pair in pairs):
        name = Entry(f"{indent}minus {DENSE_POLICY} (95 %, in pairs)")
        rows.append([name, *map(_difference, pairs)])
    return rows


def _difference(average: Average | None) -> Entry:
    """Difference of a mean to the dense model's, coloured if it is significant."""
    if average is None or average.difference is None or average.difference_ci95 is None:
        return _NOTHING
    low, high = average.difference_ci95
    style = _STYLES[Loss(-average.difference, is_chance=False).tint] if high < 0 else ""
    return Entry(f"{average.difference:+.1f} ({low:+.1f} to {high:+.1f})", style)


def _cache_row(title: str, records: Sequence[Record], policies: Sequence[str]) -> list[Entry]:
    """Cache size of every policy, from its first record."""
    first = {record.policy: record for record in reversed(records)}
    dense = first.get(DENSE_POLICY)
    return [Entry(title), *(Entry(cache_text(first.get(name), dense)) for name in policies)]


def _entries(values: Iterable[float | None], write: Callable[[float], str]) -> Iterable[Entry]:
    """Values as text, with a dash where one was not measured."""
    return (_NOTHING if value is None else Entry(write(value)) for value in values)
