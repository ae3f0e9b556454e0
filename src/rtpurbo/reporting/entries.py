"""What stands in the places of a table of records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rtpurbo.evaluation.policies import DENSE_POLICY, POLICIES
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_bytes


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table, with its rich style."""

    text: str
    style: str = ""


Grid = tuple[list[str], list[list[Entry]]]
"""The header and the rows of a table."""


def policy_order(records: Sequence[Record]) -> list[str]:
    """The policies of some records in display order, unknown ones last."""
    policies = list(dict.fromkeys(record.policy for record in records))
    order = list(POLICIES)
    return sorted(policies, key=lambda name: order.index(name) if name in order else len(order))


def score_entry(record: Record | None, dense: Record | None) -> Entry:
    """Right answers in percent or perplexity, with the loss against the dense model as a colour."""
    if record is None:
        return Entry("-")
    if record.suite == "perplexity":
        loss = 0.0 if dense is None else 100 * (record.score / dense.score - 1)
        return Entry(f"{record.score:.2f}", loss_style(loss, slight=1))
    loss = 0.0 if dense is None else dense.score - record.score
    return Entry(f"{record.score:.0f} %", loss_style(loss, slight=0))


def loss_style(loss: float, slight: float) -> str:
    """Red from a loss of 5 (points, or percent of perplexity), yellow above a slight one."""
    if loss >= 5:
        return "bold red"
    return "yellow" if loss > slight else ""


def share_entry(record: Record | None) -> Entry:
    """The share of the far tokens that was read."""
    if record is None or record.far_tokens_read is None:
        return Entry("-")
    return Entry(percent(record.far_tokens_read))


def tokens_entry(record: Record | None) -> Entry:
    """The mean number of tokens that a row of a retrieval head read."""
    if record is None or record.tokens_read_mean is None:
        return Entry("-")
    return Entry(f"{record.tokens_read_mean:,.0f}")


def mass_entry(record: Record | None) -> Entry:
    """The share of full attention that lies on what was read."""
    if record is None or record.mass_kept is None:
        return Entry("-")
    return Entry(percent(record.mass_kept))


def cache_entry(record: Record | None, dense: Record | None) -> Entry:
    """The bytes of a cache, and how many times those of the dense model's."""
    if record is None or record.kv_bytes is None:
        return Entry("-")
    text = short_bytes(record.kv_bytes)
    if dense is not None and dense.kv_bytes and record.policy != DENSE_POLICY:
        text += f" ({record.kv_bytes / dense.kv_bytes:.2f}x)"
    return Entry(text)
