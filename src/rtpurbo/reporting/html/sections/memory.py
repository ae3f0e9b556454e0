"""Size of the KV cache by policy and length."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import short_bytes, short_length
from rtpurbo.reporting.figures import Series, bytes_axis, length_axis, line_plot
from rtpurbo.reporting.html.policies import by_model, plots_of_policies, style_of
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.view import Block, Missing, Plot, Section, Table, Text
from rtpurbo.reporting.selection import policy_order
from rtpurbo.reporting.tables import cache_text

_TITLE = "KV cache"

Sizes = dict[tuple[str, int], Record]


def memory_section(sources: Sources) -> Section | Missing:
    """Returns cache sizes as a plot and a table."""
    blocks = by_model(sources, _of_model)
    if not blocks:
        return Missing(_TITLE, "no results record the size of a cache.")
    said = Text(
        "Size of the KV cache of one sequence, index keys included where a policy needs them. "
        "Windowed KV heads keep only sinks and window, so longer contexts save more."
    )
    return Section("memory", _TITLE, [said, *blocks])


def cache_ratio(quality: Quality, policy: str) -> tuple[float, int] | None:
    """Returns the size of a policy's cache relative to the dense one, at the longest common length."""
    sizes = _sizes(quality)
    for length in sorted({length for _, length in sizes}, reverse=True):
        sparse, dense = sizes.get((policy, length)), sizes.get((DENSE_POLICY, length))
        if sparse and dense and sparse.kv_bytes and dense.kv_bytes:
            return sparse.kv_bytes / dense.kv_bytes, length
    return None


def _sizes(quality: Quality) -> Sizes:
    return {
        (record.policy, quality.cache_length or record.context_length): record
        for record in quality.records
        if record.kv_bytes
    }


def _of_model(quality: Quality) -> list[Block]:
    sizes = _sizes(quality)
    if not sizes:
        return []
    policies = [name for name in policy_order(quality.records) if _lengths(sizes, name)]
    lengths = _lengths(sizes)
    where = quality.where(list(sizes.values()), samples=False)
    blocks: list[Block] = []
    if len(lengths) > 1:
        blocks.append(plots_of_policies([_plot(sizes, policies, lengths, where)], policies))
    rows = []
    for policy in policies:
        cells = (
            cache_text(sizes.get((policy, length)), sizes.get((DENSE_POLICY, length)))
            for length in lengths
        )
        rows.append((policy, *cells))
    header = ("policy", *(short_length(length) for length in lengths))
    caption = f"KV cache by length, and relative to the dense one; one sequence; {where}"
    blocks.append(Table(caption, header, rows))
    return blocks


def _plot(sizes: Sizes, policies: Sequence[str], lengths: Sequence[int], where: str) -> Plot:
    lines = []
    for policy in policies:
        own = {length: sizes[policy, length].kv_bytes or 0 for length in _lengths(sizes, policy)}
        hints = [
            f"{policy}: {short_bytes(size)} at {short_length(length)}"
            for length, size in own.items()
        ]
        points = [(float(length), float(size)) for length, size in own.items()]
        lines.append(Series(policy, points, style_of(policy, policies), hints))
    title = "KV cache of one sequence"
    drawing = line_plot(title, lines, length_axis(lengths), bytes_axis("cache"))
    return Plot(title, where, drawing)


def _lengths(sizes: Sizes, policy: str | None = None) -> list[int]:
    return sorted({length for name, length in sizes if policy in (None, name)})
