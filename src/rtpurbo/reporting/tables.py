"""Records as a table: a row for each policy, a column for each test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from rtpurbo.evaluation.policies import POLICIES
from rtpurbo.evaluation.records import Record
from rtpurbo.reporting.formats import percent, short_bytes, short_length

DENSE = "full"


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table, with its rich style."""

    text: str
    style: str = ""


def results_table(records: Sequence[Record], cache_length: int | None = None) -> Table:
    """A table for the terminal; the dense row first, losses against it in yellow and red.

    Args:
        records: measurements of one or more policies.
        cache_length: tokens at which every record's cache was weighed; None if each at its own.
    """
    header, rows = _grid(records, cache_length)
    table = Table()
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(entry.text, entry.style) for entry in row))
    return table


def markdown_table(records: Sequence[Record], cache_length: int | None = None) -> str:
    """The same table in Markdown, for model cards and documentation."""
    header, rows = _grid(records, cache_length)
    return markdown_rows(header, ([entry.text for entry in row] for row in rows))


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, numbers to the right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))


def _grid(
    records: Sequence[Record], cache_length: int | None
) -> tuple[list[str], list[list[Entry]]]:
    """The header and the rows of the table."""
    scores = {(_test(record), record.policy): record for record in records}
    tests = list(dict.fromkeys(test for test, _ in scores))
    policies = list(dict.fromkeys(record.policy for record in records))
    order = list(POLICIES)
    policies.sort(key=lambda name: order.index(name) if name in order else len(order))

    longest = max((record.context_length for record in records), default=0)
    # Prose shows what is read on the average; needle questions only what the answer reads.
    reads = max(tests, key=lambda test: (test[0] == "perplexity", test[2]), default=None)
    header = ["policy", *(f"{task} {short_length(length)}" for _, task, length in tests)]
    if reads is not None:
        header.append(f"far tokens read ({reads[1]} {short_length(reads[2])})")
    header.append(f"KV cache at {short_length(cache_length or longest)}")

    rows = []
    for policy in policies:
        row = [Entry(policy, "bold" if policy == DENSE else "")]
        row += [_score(scores.get((test, policy)), scores.get((test, DENSE))) for test in tests]
        if reads is not None:
            row.append(_share(scores.get((reads, policy))))
        row.append(_cache(_longest(records, policy, longest), _longest(records, DENSE, longest)))
        rows.append(row)
    return header, rows


def _test(record: Record) -> tuple[str, str, int]:
    return record.suite, record.task, record.context_length


def _longest(records: Sequence[Record], policy: str, length: int) -> Record | None:
    found = (item for item in records if (item.policy, item.context_length) == (policy, length))
    return next(found, None)


def _score(record: Record | None, dense: Record | None) -> Entry:
    if record is None:
        return Entry("-")
    if record.suite == "perplexity":
        loss = 0.0 if dense is None else 100 * (record.score / dense.score - 1)
        return Entry(f"{record.score:.2f}", _loss_style(loss, slight=1))
    loss = 0.0 if dense is None else dense.score - record.score
    return Entry(f"{record.score:.0f} %", _loss_style(loss, slight=0))


def _loss_style(loss: float, slight: float) -> str:
    """Red from a loss of 5 (points, or percent of perplexity), yellow above a slight one."""
    if loss >= 5:
        return "bold red"
    return "yellow" if loss > slight else ""


def _share(record: Record | None) -> Entry:
    if record is None or record.far_tokens_read is None:
        return Entry("-")
    return Entry(percent(record.far_tokens_read))


def _cache(record: Record | None, dense: Record | None) -> Entry:
    if record is None or record.kv_bytes is None:
        return Entry("-")
    text = short_bytes(record.kv_bytes)
    if dense is not None and dense.kv_bytes and record.policy != DENSE:
        text += f" ({record.kv_bytes / dense.kv_bytes:.2f}x)"
    return Entry(text)
