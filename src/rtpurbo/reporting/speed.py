"""Tables and plots of speed records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from rtpurbo.formats import percent, short_bytes, short_length
from rtpurbo.reporting.figures import (
    Axis,
    Series,
    check_matplotlib,
    draw_lines,
    legend_handles,
    length_axis,
)
from rtpurbo.reporting.model_card import markdown_rows
from rtpurbo.reporting.svg import figure_style, save_image
from rtpurbo.speed_records import SpeedRecord

BASELINES = {"sdpa-flash": "x flash", "sdpa-cudnn": "x cuDNN"}
# Mark of times that are far off the usual ones of the device.
UNUSUAL = "!"
# Bytes of an element in the half precision that is measured, and dimensions of the index.
ELEMENT = 2
INDEX_DIM = 16

HEADER = [
    "context",
    "implementation",
    "window",
    "density",
    "ms",
    *BASELINES.values(),
    "achieved",
    "scratch",
]


def speed_tables(records: Sequence[SpeedRecord]) -> list[Table]:
    """Returns a table for each phase, device and dtype, rtpurbo in bold; a ratio above 1 is faster than dense."""
    tables = []
    for title, chosen in _phases(records).items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, name in enumerate(_header(chosen)):
            table.add_column(name, justify="left" if number == 1 else "right", no_wrap=True)
        for record in chosen:
            style = "bold" if record.implementation.startswith("rtpurbo") else ""
            cells = _row(records, record)[: len(table.columns)]
            table.add_row(*(Text(cell, style) for cell in cells))
        table.caption = _caption(chosen) or None
        tables.append(table)
    return tables


def speed_markdown(records: Sequence[SpeedRecord]) -> str:
    """Returns the same tables in Markdown, for documentation."""
    parts = []
    for title, chosen in _phases(records).items():
        header = _header(chosen)
        rows = (_row(records, record)[: len(header)] for record in chosen)
        table = f"**{title}**\n\n{markdown_rows(header, rows)}"
        parts += [table, *filter(None, [_caption(chosen)])]
    return "\n\n".join(parts)


def _header(records: Sequence[SpeedRecord]) -> list[str]:
    """Titles of the columns, with tokens a second where a record has them."""
    has_tokens = any(record.tokens_per_second is not None for record in records)
    return [*HEADER, *(["tokens/s"] if has_tokens else [])]


def speedup(records: Sequence[SpeedRecord], record: SpeedRecord, baseline: str) -> float | None:
    """Returns the speedup of a record over a baseline of the same task; None without one."""
    other = _baseline(records, record, baseline)
    return None if other is None else other.milliseconds / record.milliseconds


def _baseline(
    records: Sequence[SpeedRecord], record: SpeedRecord, baseline: str
) -> SpeedRecord | None:
    """Record of a baseline for the same task as another record."""
    same = (one for one in records if one.implementation == baseline and one.task == record.task)
    return next(same, None)


def _phases(records: Sequence[SpeedRecord]) -> dict[str, list[SpeedRecord]]:
    """Records by phase, model, device and dtype, the shortest context and the slowest first."""
    phases: dict[str, list[SpeedRecord]] = {}
    for record in sorted(records, key=lambda record: (*record.task, -record.milliseconds)):
        title = record.phase if record.model is None else f"{record.phase}: {record.model}"
        title += f" ({_made_with(record)})" if _made_with(record) else ""
        phases.setdefault(title, []).append(record)
    return phases


def _made_with(record: SpeedRecord) -> str:
    """Device and dtype, as far as a record has them."""
    return ", ".join(filter(None, [record.device, record.dtype]))


def _row(records: Sequence[SpeedRecord], record: SpeedRecord) -> list[str]:
    speed = achieved(record)
    baselines = [_baseline(records, record, name) for name in BASELINES]
    context, tokens = short_length(record.context_length), record.tokens_per_second
    if record.batch_size > 1:
        context += f" x {record.batch_size}"
    if record.memory_gb is not None:
        context += f" in {record.memory_gb:g} GB"
    return [
        context,
        record.implementation,
        "-" if is_dense(record) else short_length(record.sliding_window),
        percent(record.density),
        short_time(record.milliseconds) + _mark(record),
        *(
            "-"
            if other is None
            else f"{other.milliseconds / record.milliseconds:.2f}{_mark(other) or _mark(record)}"
            for other in baselines
        ),
        "-" if speed is None else f"{speed[0]:,.0f} {speed[1]}",
        "-" if record.scratch_bytes is None else short_bytes(record.scratch_bytes),
        "-" if tokens is None else f"{tokens:,.0f}",
    ]


def _mark(record: SpeedRecord) -> str:
    """Mark of a time that is far off the usual one, and of ratios with it."""
    return "" if record.usual_milliseconds is None else UNUSUAL


def _caption(records: Sequence[SpeedRecord]) -> str:
    """Explanation of the marks in a table; empty without any."""
    usual = [
        f"{record.implementation} at {short_length(record.context_length)} usually takes "
        f"{short_time(record.usual_milliseconds)} ms"
        for record in records
        if record.usual_milliseconds is not None
    ]
    return f"{UNUSUAL} far off the usual time: {'; '.join(usual)}" if usual else ""


def is_dense(record: SpeedRecord) -> bool:
    """Returns whether every head attends to all keys, so that the window has no meaning."""
    return record.implementation in BASELINES


def save_plot(records: Sequence[SpeedRecord], path: str | Path) -> None:
    """Draws time against context length, a line for each implementation, window and density.

    Each phase, model, batch size, device and dtype gets a plot of its own. The file is .svg (which follows
    light and dark), .png or another format of matplotlib.

    Raises:
        RTPurboError: matplotlib is missing, or does not know the format.
    """
    check_matplotlib("--plot")
    pictures = list(dict.fromkeys(_picture(record) for record in records))
    columns = max(1, len(pictures))
    with figure_style() as new_figure:
        figure = new_figure(figsize=(6 * columns, 4.5), layout="constrained", facecolor="white")
        for picture, axes in zip(
            pictures, figure.subplots(1, columns, squeeze=False)[0], strict=False
        ):
            phase, batch, made_with = picture
            own = [record for record in records if _picture(record) == picture]
            lines = lines_of(own, every_window=True)
            series, unit = time_series(lines)
            lengths = [record.context_length for record in own]
            draw_lines(axes, series, length_axis(lengths), Axis("", short_time, "log"))
            title = f"{phase}, {unit}" if batch == 1 else f"{phase}, batch {batch}, {unit}"
            axes.set_title(f"{title}\n{made_with}" if made_with else title)
            axes.grid(axis="y")
            axes.legend(handles=legend_handles(series), fontsize=10, frameon=False)
        said = "; ".join(
            ", ".join(filter(None, [phase, f"batch {batch}", made_with]))
            for phase, batch, made_with in pictures
        )
        save_image(figure, path, f"Time by context length: {said}")


def _picture(record: SpeedRecord) -> tuple[str, int, str]:
    """Phase, batch size, and model, device and dtype: what one plot has in common."""
    made_with = ", ".join(filter(None, [record.model, _made_with(record)]))
    return record.phase, record.batch_size, made_with


def baselines_of(record: SpeedRecord) -> tuple[str, ...]:
    """Returns the baselines of a record: no dense kernel trains indexers."""
    return ("eager",) if record.phase.startswith("stage") else tuple(BASELINES)


def is_baseline(record: SpeedRecord) -> bool:
    """Returns whether a record is of a baseline."""
    return record.implementation in baselines_of(record)


def lines_of(
    records: Sequence[SpeedRecord], *, every_window: bool = False
) -> dict[str, list[SpeedRecord]]:
    """Returns records of one task by implementation, window and density, dense kernels first.

    The window is named if there are several, or `every_window` is.
    """
    windows = {record.sliding_window for record in records if not is_dense(record)}
    lines: dict[str, list[SpeedRecord]] = {}
    for record in sorted(records, key=lambda r: (not is_baseline(r), r.context_length)):
        label = record.implementation
        if not is_dense(record) and (every_window or len(windows) > 1):
            label += f", window {short_length(record.sliding_window)}"
        if record.density < 1:
            label += f", density {percent(record.density)}"
        lines.setdefault(label, []).append(record)
    return lines


def time_unit(lines: Mapping[str, Sequence[SpeedRecord]]) -> tuple[float, str]:
    """Returns a unit that suits the shortest time, and its number in a millisecond."""
    fastest = min(record.milliseconds for found in lines.values() for record in found)
    if fastest < 1:
        return 1000.0, "microseconds"
    return (0.001, "seconds") if fastest > 2000 else (1.0, "milliseconds")


def time_series(lines: Mapping[str, Sequence[SpeedRecord]]) -> tuple[list[Series], str]:
    """Returns time against context length and its unit; the first baseline has the dense model's colour."""
    factor, unit = time_unit(lines)
    baselines = [label for label, found in lines.items() if is_baseline(found[0])]
    others = [label for label in lines if label not in baselines]
    styles: dict[str, int | None] = {label: place for place, label in enumerate(others)}
    for place, label in enumerate(baselines):
        styles[label] = None if place == 0 else len(others) + place - 1

    def hint(label: str, record: SpeedRecord) -> str:
        times = (record.milliseconds, record.milliseconds_p10, record.milliseconds_p90)
        time, low, high = (short_time(factor * each) for each in times)
        length = short_length(record.context_length)
        return f"{label}: {time} {unit} at {length} ({low} to {high})"

    series = [
        Series(
            label,
            [(float(record.context_length), factor * record.milliseconds) for record in found],
            styles[label],
            [hint(label, record) for record in found],
        )
        for label, found in lines.items()
    ]
    return series, unit


def short_time(value: float) -> str:
    """Formats a time with three digits, or as a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def prefill_flops(record: SpeedRecord) -> float:
    """Returns the floating-point operations of attention; scoring of index keys is not counted."""
    causal = record.context_length * (record.context_length + 1) / 2
    local = window_area(record.context_length, record.sliding_window)
    retrieval, heads = record.num_retrieval_heads, record.num_attention_heads
    if record.implementation.startswith("sdpa"):
        pairs = heads * causal
    else:
        pairs = (heads - retrieval) * local + retrieval * record.density * causal
    return 4.0 * record.head_dim * pairs * record.batch_size


def window_area(length: int, window: int) -> float:
    """Returns the number of query-key pairs within a causal sliding window."""
    inside = min(length, window)
    return inside * (inside + 1) / 2 + (length - inside) * window


def decode_bytes(record: SpeedRecord) -> float:
    """Returns the bytes of keys, values and index keys that a decode step reads."""
    token = 2 * record.head_dim * ELEMENT
    if record.implementation.startswith("sdpa"):
        read = record.context_length * record.num_key_value_heads * token
    else:
        near = min(record.context_length, record.sliding_window)
        index_element = 1 if "float8" in record.implementation else ELEMENT
        index = record.num_retrieval_heads * INDEX_DIM * index_element
        selected = record.num_retrieval_heads * record.density * token
        read = near * record.num_key_value_heads * token
        read += int(record.context_length * (index + selected))
    return float(read * record.batch_size)


def achieved(record: SpeedRecord) -> tuple[float, str] | None:
    """Returns the throughput of an operator in TFLOP/s or GB/s; None for whole models."""
    seconds = record.milliseconds / 1000
    if record.phase == "prefill":
        return prefill_flops(record) / seconds / 1e12, "TFLOP/s"
    if record.phase == "decode":
        return decode_bytes(record) / seconds / 1e9, "GB/s"
    return None
