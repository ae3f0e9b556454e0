"""What a key-value cache weighs, and what benchmarks needed at their peak."""

from __future__ import annotations

from collections.abc import Sequence

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import short_bytes, short_length
from rtpurbo.reporting.entries import cache_entry, policy_order
from rtpurbo.reporting.html.axes import bytes_axis, length_axis
from rtpurbo.reporting.html.markup import Content, Markup, join, tag
from rtpurbo.reporting.html.plots import Series, line_plot
from rtpurbo.reporting.html.policies import plots_of_policies, style_of
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.tables import paragraph, table

_TITLE = "Memory"

Weights = dict[tuple[str, int], Record]


def memory_section(sources: Sources) -> Section | Missing:
    """The cache by policy and length."""
    parts: list[Content] = []
    for quality in sources.quality:
        weights = _weights(quality)
        if weights:
            if len(sources.quality) > 1:
                parts.append(tag("h3", f"Model: {quality.model}"))
            parts += _of_model(quality, weights)
    if not parts:
        return Missing(_TITLE, "no results say what a cache weighs.")
    said = paragraph(
        "The key-value cache of one sequence, with index keys where a policy needs them. Bounded "
        "heads keep their window alone, so the longer the context, the more is saved."
    )
    return Section("memory", _TITLE, join(said, parts))


def cache_ratio(quality: Quality, policy: str) -> tuple[float, int] | None:
    """How large a policy's cache is beside the dense one, at the longest context that has both."""
    weights = _weights(quality)
    for length in sorted({length for _, length in weights}, reverse=True):
        sparse, dense = weights.get((policy, length)), weights.get((DENSE_POLICY, length))
        if sparse and dense and sparse.kv_bytes and dense.kv_bytes:
            return sparse.kv_bytes / dense.kv_bytes, length
    return None


def _weights(quality: Quality) -> Weights:
    return {
        (record.policy, quality.cache_length or record.context_length): record
        for record in quality.records
        if record.kv_bytes
    }


def _of_model(quality: Quality, weights: Weights) -> list[Content]:
    policies = [name for name in policy_order(quality.records) if _lengths(weights, name)]
    lengths = _lengths(weights)
    parts: list[Content] = []
    if len(lengths) > 1:
        parts.append(plots_of_policies([_plot(weights, policies, lengths)], policies))
    rows: list[tuple[Content, ...]] = []
    for policy in policies:
        cells = (
            cache_entry(weights.get((policy, length)), weights.get((DENSE_POLICY, length))).text
            for length in lengths
        )
        rows.append((policy, *cells))
    header = ("policy", *(short_length(length) for length in lengths))
    parts.append(table("Key-value cache by length, and how many times the dense one", header, rows))
    return parts


def _plot(weights: Weights, policies: Sequence[str], lengths: Sequence[int]) -> Markup:
    lines = []
    for policy in policies:
        sizes = {
            length: weights[policy, length].kv_bytes or 0 for length in _lengths(weights, policy)
        }
        lines.append(
            Series(
                policy,
                [(float(length), float(size)) for length, size in sizes.items()],
                style_of(policy, policies),
                [
                    f"{policy}: {short_bytes(size)} at {short_length(length)}"
                    for length, size in sizes.items()
                ],
            )
        )
    y = bytes_axis("cache", [size for each in lines for _, size in each.points])
    return line_plot("Key-value cache", lines, length_axis(lengths), y, legend=False)


def _lengths(weights: Weights, policy: str | None = None) -> list[int]:
    return sorted({length for name, length in weights if policy in (None, name)})
