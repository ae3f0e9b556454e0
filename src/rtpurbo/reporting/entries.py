"""Entries of tables of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtpurbo.evaluation.policies import DENSE_POLICY, POLICIES
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import short_bytes
from rtpurbo.reporting.losses import Loss, loss_of_record


@dataclass(frozen=True)
class Entry:
    """Text of a table cell, with its rich style."""

    text: str
    style: str = ""


Grid = tuple[list[str], list[list[Entry]]]
"""The header and the rows of a table."""


def policy_order(records: Sequence[Record]) -> list[str]:
    """Returns the policies of some records in display order, unknown ones last."""
    policies = list(dict.fromkeys(record.policy for record in records))
    order = list(POLICIES)
    return sorted(policies, key=lambda name: order.index(name) if name in order else len(order))


def score_entry(record: Record | None, dense: Record | None) -> Entry:
    """Returns right answers in percent, or perplexity, coloured by the loss to the dense model."""
    if record is None:
        return Entry("-")
    style = "" if dense is None else style_of(loss_of_record(record, dense))
    if record.suite == "perplexity":
        return Entry(f"{record.score:.2f}", style)
    return Entry(f"{record.score:.0f} %", style)


def style_of(loss: Loss) -> str:
    """Returns the rich style of a loss: red for a heavy, significant one, yellow for a slight one."""
    return {"heavy": "bold red", "slight": "yellow", "": ""}[loss.tint]


def value_entry(value: float | None, write: Callable[[float], str]) -> Entry:
    """Returns a value as text, or a dash where it was not measured."""
    return Entry("-" if value is None else write(value))


def cache_entry(record: Record | None, dense: Record | None) -> Entry:
    """Returns the size of a cache, and its ratio to the dense model's."""
    if record is None or record.kv_bytes is None:
        return Entry("-")
    text = short_bytes(record.kv_bytes)
    if dense is not None and dense.kv_bytes and record.policy != DENSE_POLICY:
        text += f" ({record.kv_bytes / dense.kv_bytes:.2f}x)"
    return Entry(text)
