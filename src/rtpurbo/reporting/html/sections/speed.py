"""Benchmarks: time by length, next to dense kernels of the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rtpurbo.formats import percent, short_bytes, short_length
from rtpurbo.reporting.figures import Axis, Series, length_axis, line_plot
from rtpurbo.reporting.html.sources import Origin, Sources, Speed
from rtpurbo.reporting.html.view import (
    NOTHING,
    Block,
    Cell,
    Folded,
    Heading,
    Legend,
    Missing,
    Plot,
    Plots,
    Section,
    Table,
    Text,
)
from rtpurbo.reporting.speed import (
    baselines_of,
    is_baseline,
    lines_of,
    short_time,
    speedup,
    time_series,
    time_unit,
)
from rtpurbo.speed_records import SpeedRecord

_TITLE = "Speed"
_PHASES = {
    "prefill": "Prefill of one layer",
    "decode": "One decode step of one layer",
    "model-prefill": "Prefill of a whole model",
    "model-decode": "One decode step of a whole model",
    "stage1": "A training step of stage 1",
    "stage2": "A training step of stage 2",
}


def speed_section(sources: Sources) -> Section | Missing:
    """Returns a plot and a table for each file and task.

    On the page of a model, benchmarks of other shapes come last, under a heading that says so.
    """
    is_own = own_shape(sources)
    own: list[Block] = []
    others: list[Block] = []
    for speed in sources.speed:
        tasks = _tasks(speed.records)
        for records in tasks:
            if is_own(records[0]):
                own += _of_task(speed, records, "")
            else:
                others += _of_task(speed, records, "Other shape: ")
        of_file = own if any(is_own(records[0]) for records in tasks) else others
        of_file += [Text(f"Note of {speed.origin.file}: {note}") for note in speed.notes]
    if not own and not others:
        return Missing(_TITLE, "no results of `rtpurbo bench` were given.")
    blocks: list[Block] = [
        Text(
            "Medians of calls; x is the speedup over the fastest dense kernel of the same run (in "
            "training, over the eager operators). Weights and inputs are random and have nothing to "
            "find, so densities (the share of keys or key blocks that retrieval heads read) are "
            "forced: these are speeds of kernels at that density, not of this or any trained model, "
            "and they say nothing about quality."
        )
    ]
    if others and not own:
        blocks.append(
            Text(
                "No benchmark here has the shape of the model of this report: none of these speeds is "
                "its own."
            )
        )
    return Section(
        "speed", _TITLE if own else f"{_TITLE} of other shapes", [*blocks, *own, *others]
    )


def own_shape(sources: Sources) -> Callable[[SpeedRecord], bool]:
    """Returns a test of whether a benchmark has the shape of the report's model.

    An artifact records query heads, KV heads and layers. Where the page is about results of a model
    without its artifact, no benchmark is known to have its shape; without results, there is no model.
    """
    if sources.artifact is None:
        return lambda record: not sources.quality
    head_map = sources.artifact.config.head_map
    heads = (head_map.num_attention_heads, head_map.num_key_value_heads)
    layers = f"{len(head_map.retrieval_heads)} layers"
    dim = sources.head_dim

    def is_own(record: SpeedRecord) -> bool:
        return (
            (record.num_attention_heads, record.num_key_value_heads) == heads
            and (record.model is not None if dim is None else record.head_dim == dim)
            and (record.model is None or record.model.endswith(f", {layers}"))
        )

    return is_own


def best_ratio(records: Sequence[SpeedRecord], record: SpeedRecord) -> float | None:
    """Returns the speedup over the fastest dense kernel, in training over eager operators."""
    if is_baseline(record):
        return None
    ratios = [speedup(records, record, name) for name in baselines_of(record)]
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known, default=None)


def best_decode(sources: Sources) -> tuple[float, SpeedRecord, Origin] | None:
    """Returns the speedup of the longest decode step of one sequence that has a dense baseline."""
    found = [
        (record.model is not None, record.context_length, ratio, record, speed.origin)
        for speed in sources.speed
        for record in speed.records
        if record.phase in ("decode", "model-decode")
        and record.implementation == "rtpurbo"
        and record.batch_size == 1
        and (ratio := best_ratio(speed.records, record)) is not None
    ]
    # A whole model is more informative than one of its layers.
    best = max(found, key=lambda entry: entry[:3], default=None)
    return None if best is None else best[2:]


def _tasks(records: Sequence[SpeedRecord]) -> list[list[SpeedRecord]]:
    """Groups of records that differ only in length, density and implementation."""
    tasks: dict[tuple[Any, ...], list[SpeedRecord]] = {}
    for record in records:
        shape = (record.num_attention_heads, record.num_key_value_heads, record.head_dim)
        task = (record.phase, record.model, record.batch_size, record.dtype, *shape)
        tasks.setdefault(task, []).append(record)
    return list(tasks.values())


def _of_task(speed: Speed, records: list[SpeedRecord], prefix: str) -> list[Block]:
    first = records[0]
    title = _PHASES.get(first.phase, first.phase)
    if first.batch_size > 1:
        title += f", batch {first.batch_size}"
    shape = (
        f"{first.num_attention_heads} query heads on {first.num_key_value_heads} KV heads of "
        f"{first.head_dim} dimensions, {first.num_retrieval_heads} retrieval heads"
    )
    origin = speed.origin
    where = f"{origin.device}, {first.dtype or origin.dtype}, {origin.file}"
    blocks: list[Block] = [
        Heading(f"{prefix}{title}" if first.model is None else f"{prefix}{title}: {first.model}"),
        Text(f"{shape}. {where}.", "where"),
    ]
    densities = sorted({record.density for record in records if record.density < 1})
    if densities:
        forced = ", ".join(map(percent, densities))
        where = f"random weights, forced density {forced}; {where}"
    lines = lines_of(records)
    lengths = sorted({record.context_length for record in records})
    if len(lengths) > 1:
        blocks.append(Plots(_plots(records, lines, lengths, where)))
    blocks.append(_table(f"{prefix}{title}", where, speed.records, lines, lengths))
    if any(record.peak_memory_bytes for record in records):
        blocks.append(Folded("Peak memory", _memory_table(where, lines, lengths)))
    return blocks


def _plots(
    records: Sequence[SpeedRecord],
    lines: dict[str, list[SpeedRecord]],
    lengths: Sequence[int],
    where: str,
) -> list[Plot]:
    times, unit = time_series(lines)
    x, styles = length_axis(lengths), {each.name: each.style for each in times}
    drawing = line_plot("Time", times, x, Axis(unit, short_time, "log"))
    plots = [Plot("Time", where, drawing, Legend.of(times))]
    ratios = []
    for label, found in lines.items():
        known = [(r, ratio) for r in found if (ratio := best_ratio(records, r)) is not None]
        if known:
            points = [(float(r.context_length), ratio) for r, ratio in known]
            hints = [f"{label}: {y:.2f}x at {short_length(round(x))}" for x, y in points]
            ratios.append(Series(label, points, styles[label], hints))
    if ratios:
        ends = [(float(lengths[0]), 1.0), (float(lengths[-1]), 1.0)]
        ratios.append(Series("baseline", ends, None, markers=False))
        axis = Axis("speedup", lambda ratio: f"{ratio:.3g}x", "log")
        plots.append(Plot("Speedup", where, line_plot("Speedup", ratios, x, axis)))
    return plots


def _table(
    title: str,
    where: str,
    all_records: Sequence[SpeedRecord],
    lines: dict[str, list[SpeedRecord]],
    lengths: Sequence[int],
) -> Table:
    factor, unit = time_unit(lines)
    rows: list[list[str | Cell]] = []
    for label, found in lines.items():
        by_length = {record.context_length: record for record in found}
        cells = []
        for length in lengths:
            record = by_length.get(length)
            if record is None:
                cells.append(Cell(NOTHING, tint="none", bold=False))
                continue
            ratio = best_ratio(all_records, record)
            slower = ratio is not None and ratio < 0.995
            written = "" if ratio is None else f"{ratio:.2f}x"
            time = short_time(factor * record.milliseconds)
            cells.append(Cell(time, written, tint="slight" if slower else ""))
        rows.append([label, *cells])
    header = ("implementation", *(short_length(length) for length in lengths))
    return Table(f"{title}: {unit}; tinted where slower; {where}", header, rows)


def _memory_table(where: str, lines: dict[str, list[SpeedRecord]], lengths: Sequence[int]) -> Table:
    rows = []
    for label, found in lines.items():
        peaks = {record.context_length: record.peak_memory_bytes for record in found}
        cells = (
            short_bytes(size) if (size := peaks.get(length)) else NOTHING for length in lengths
        )
        rows.append((label, *cells))
    header = ("implementation", *(short_length(length) for length in lengths))
    return Table(f"Peak memory, inputs included; {where}", header, rows)
