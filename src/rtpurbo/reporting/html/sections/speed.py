"""Speed: time by length, beside dense kernels of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rtpurbo.formats import percent, short_bytes, short_length
from rtpurbo.reporting.html.axes import length_axis, log_axis
from rtpurbo.reporting.html.markup import Content, Markup, join, tag
from rtpurbo.reporting.html.plots import Series, line_plot
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Sources, Speed
from rtpurbo.reporting.html.tables import NOTHING, cell, folded, paragraph, table
from rtpurbo.reporting.speed import BASELINES, is_dense, speedup
from rtpurbo.speed_records import SpeedRecord

_TITLE = "Speed"
_PHASES = {
    "prefill": "Prefill of one layer",
    "decode": "One decoding step of one layer",
    "model-prefill": "Prefill of a whole model",
    "model-decode": "One decoding step of a whole model",
    "stage1": "A training step of stage 1",
    "stage2": "A training step of stage 2",
}


def speed_section(sources: Sources) -> Section | Missing:
    """For each file and task, a plot and a table."""
    parts: list[Content] = []
    for speed in sources.speed:
        for records in _tasks(speed.records):
            parts += _of_task(speed, records)
        parts += [paragraph(f"Note of {speed.origin.file}: {note}") for note in speed.notes]
    if not parts:
        return Missing(_TITLE, "no results of `rtpurbo bench` were given.")
    said = paragraph(
        "Medians of calls; x says how many times faster than the fastest dense kernel of the same "
        "run (in training, than the eager operators). Densities (the share of keys or key blocks "
        "that retrieval heads read) are forced, as random numbers have nothing to find, and say "
        "nothing of quality."
    )
    return Section("speed", _TITLE, join(said, parts))


def best_ratio(records: Sequence[SpeedRecord], record: SpeedRecord) -> float | None:
    """How many times faster than the fastest dense kernel, or in training than eager operators."""
    if _is_baseline(record):
        return None
    ratios = [speedup(records, record, name) for name in _baselines(record)]
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known, default=None)


def best_decode(sources: Sources) -> tuple[float, SpeedRecord] | None:
    """The longest decoding step of one sequence that a dense kernel was held against."""
    found = [
        (record.model is not None, record.context_length, ratio, record)
        for speed in sources.speed
        for record in speed.records
        if record.phase in ("decode", "model-decode")
        and record.implementation == "rtpurbo"
        and record.batch_size == 1
        and (ratio := best_ratio(speed.records, record)) is not None
    ]
    # A whole model tells more than a layer of it.
    best = max(found, key=lambda entry: entry[:3], default=None)
    return None if best is None else best[2:]


def _baselines(record: SpeedRecord) -> tuple[str, ...]:
    """What a record is held against: no dense kernel trains indexers."""
    return ("eager",) if record.phase.startswith("stage") else tuple(BASELINES)


def _is_baseline(record: SpeedRecord) -> bool:
    return record.implementation in _baselines(record)


def _tasks(records: Sequence[SpeedRecord]) -> list[list[SpeedRecord]]:
    """Records that differ in length and implementation alone."""
    tasks: dict[tuple[Any, ...], list[SpeedRecord]] = {}
    for record in records:
        shape = (record.num_attention_heads, record.num_key_value_heads, record.head_dim)
        tasks.setdefault((record.phase, record.model, record.batch_size, *shape), []).append(record)
    return list(tasks.values())


def _of_task(speed: Speed, records: list[SpeedRecord]) -> list[Content]:
    first = records[0]
    title = _PHASES.get(first.phase, first.phase)
    if first.batch_size > 1:
        title += f", batch {first.batch_size}"
    shape = (
        f"{first.num_attention_heads} query heads on {first.num_key_value_heads} KV heads of "
        f"{first.head_dim} dimensions, {first.num_retrieval_heads} retrieving"
    )
    where = f"{speed.origin.file}, {speed.origin.facts.get('device', 'device unknown')}"
    parts: list[Content] = [
        tag("h3", title if first.model is None else f"{title}: {first.model}"),
        paragraph(f"{shape}. {where}.", class_="where"),
    ]
    lines = _lines(records)
    lengths = sorted({record.context_length for record in records})
    if len(lengths) > 1:
        parts.append(tag("div", _plots(records, lines, lengths), class_="plots"))
    parts.append(_table(title, speed.records, lines, lengths))
    if any(record.peak_memory_bytes for record in records):
        parts.append(folded("Memory at the peak", _memory_table(lines, lengths)))
    return parts


def _lines(records: Sequence[SpeedRecord]) -> dict[str, list[SpeedRecord]]:
    """Records of each implementation, window and density, dense kernels first."""
    windows = {record.sliding_window for record in records if not is_dense(record)}
    lines: dict[str, list[SpeedRecord]] = {}
    for record in sorted(records, key=lambda r: (not _is_baseline(r), r.context_length)):
        label = record.implementation
        if not is_dense(record) and len(windows) > 1:
            label += f", window {short_length(record.sliding_window)}"
        if record.density < 1:
            label += f", density {percent(record.density)}"
        lines.setdefault(label, []).append(record)
    return lines


def _plots(
    records: Sequence[SpeedRecord], lines: dict[str, list[SpeedRecord]], lengths: Sequence[int]
) -> list[Markup]:
    factor, unit = _unit(records)
    x = length_axis(lengths)
    styles = _styles(lines)
    times = [
        Series(
            label,
            [(float(r.context_length), factor * r.milliseconds) for r in found],
            styles[label],
            [_hint(label, r, factor, unit) for r in found],
        )
        for label, found in lines.items()
    ]
    y = log_axis(unit, [time for each in times for _, time in each.points], _written)
    plots = [line_plot("Time", times, x, y)]
    ratios = []
    for label, found in lines.items():
        known = [(r, ratio) for r in found if (ratio := best_ratio(records, r)) is not None]
        if known:
            points = [(float(r.context_length), ratio) for r, ratio in known]
            hints = [f"{label}: {y:.2f}x at {short_length(round(x))}" for x, y in points]
            ratios.append(Series(label, points, styles[label], hints))
    if ratios:
        values = [ratio for each in ratios for _, ratio in each.points]
        axis = log_axis("times as fast", [*values, 1.0], _times)
        plots.append(line_plot("Ratio", [*ratios, _level(lengths)], x, axis, legend=False))
    return plots


def _level(lengths: Sequence[int]) -> Series:
    ends = [(float(lengths[0]), 1.0), (float(lengths[-1]), 1.0)]
    return Series("as fast", ends, None, markers=False)


def _styles(lines: dict[str, list[SpeedRecord]]) -> dict[str, int | None]:
    """The first of what others are held against looks as the dense model does elsewhere."""
    baselines = [label for label, found in lines.items() if _is_baseline(found[0])]
    others = [label for label in lines if label not in baselines]
    styles: dict[str, int | None] = {label: place for place, label in enumerate(others)}
    for place, label in enumerate(baselines):
        styles[label] = None if place == 0 else len(others) + place - 1
    return styles


def _table(
    title: str,
    all_records: Sequence[SpeedRecord],
    lines: dict[str, list[SpeedRecord]],
    lengths: Sequence[int],
) -> Markup:
    factor, unit = _unit([record for found in lines.values() for record in found])
    rows = []
    for label, found in lines.items():
        by_length = {record.context_length: record for record in found}
        cells = []
        for length in lengths:
            record = by_length.get(length)
            if record is None:
                cells.append(cell(NOTHING, class_="none"))
                continue
            ratio = best_ratio(all_records, record)
            slower = ratio is not None and ratio < 0.995
            said = None if ratio is None else tag("span", f"{ratio:.2f}x", class_="delta")
            time = tag("b", _written(factor * record.milliseconds))
            cells.append(cell(time, said, class_="slight" if slower else None))
        rows.append((label, *cells))
    header = ("implementation", *(short_length(length) for length in lengths))
    return table(f"{title}: {unit}; tinted where slower", header, rows, "scores")


def _memory_table(lines: dict[str, list[SpeedRecord]], lengths: Sequence[int]) -> Markup:
    rows = []
    for label, found in lines.items():
        peaks = {record.context_length: record.peak_memory_bytes for record in found}
        cells = (
            short_bytes(size) if (size := peaks.get(length)) else NOTHING for length in lengths
        )
        rows.append((label, *cells))
    header = ("implementation", *(short_length(length) for length in lengths))
    return table("Memory at the peak, inputs included", header, rows)


def _unit(records: Sequence[SpeedRecord]) -> tuple[float, str]:
    fastest = min(record.milliseconds for record in records)
    if fastest < 1:
        return 1000.0, "microseconds"
    return (0.001, "seconds") if fastest > 2000 else (1.0, "milliseconds")


def _hint(label: str, record: SpeedRecord, factor: float, unit: str) -> str:
    time = f"{_written(factor * record.milliseconds)} {unit}"
    spread = f"{_written(factor * record.milliseconds_p10)} to "
    spread += _written(factor * record.milliseconds_p90)
    return f"{label}: {time} at {short_length(record.context_length)} ({spread})"


def _written(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x"
