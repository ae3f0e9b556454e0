"""Speed records as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rtpurbo.errors import RTPurboError
from rtpurbo.files import whole_file
from rtpurbo.formats import percent, short_bytes, short_length
from rtpurbo.reporting.roofline import achieved
from rtpurbo.reporting.tables import markdown_rows
from rtpurbo.speed_records import SpeedRecord

BASELINES = {"sdpa-flash": "x flash", "sdpa-cudnn": "x cuDNN"}
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
    """A table for each phase, ours in bold; above 1 it is faster than the dense kernel."""
    tables = []
    for title, chosen in _phases(records).items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, name in enumerate(HEADER):
            table.add_column(name, justify="left" if number == 1 else "right", no_wrap=True)
        for record in chosen:
            style = "bold" if record.implementation.startswith("rtpurbo") else ""
            table.add_row(*(Text(cell, style) for cell in _row(records, record)))
        tables.append(table)
    return tables


def speed_markdown(records: Sequence[SpeedRecord]) -> str:
    """The same tables in Markdown, for documentation."""
    parts = []
    for title, chosen in _phases(records).items():
        rows = (_row(records, record) for record in chosen)
        parts.append(f"**{title}**\n\n{markdown_rows(HEADER, rows)}")
    return "\n\n".join(parts)


def speedup(records: Sequence[SpeedRecord], record: SpeedRecord, baseline: str) -> float | None:
    """How many times faster a record is than a baseline at the same task; None if there is none."""
    for other in records:
        if other.implementation == baseline and _task(other) == _task(record):
            return other.milliseconds / record.milliseconds
    return None


def _task(record: SpeedRecord) -> tuple[Any, ...]:
    return (
        record.phase,
        record.model or "",
        record.batch_size,
        record.context_length,
        record.num_attention_heads,
        record.num_key_value_heads,
        record.head_dim,
    )


def _phases(records: Sequence[SpeedRecord]) -> dict[str, list[SpeedRecord]]:
    """The records of each phase and model, the shortest context and the slowest first."""
    phases: dict[str, list[SpeedRecord]] = {}
    for record in sorted(records, key=lambda record: (*_task(record), -record.milliseconds)):
        title = record.phase if record.model is None else f"{record.phase}: {record.model}"
        phases.setdefault(title, []).append(record)
    return phases


def _row(records: Sequence[SpeedRecord], record: SpeedRecord) -> list[str]:
    speed = achieved(record)
    ratios = [speedup(records, record, baseline) for baseline in BASELINES]
    context = short_length(record.context_length)
    return [
        context if record.batch_size == 1 else f"{context} x {record.batch_size}",
        record.implementation,
        "-" if is_dense(record) else short_length(record.sliding_window),
        percent(record.density),
        _short(record.milliseconds),
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        "-" if speed is None else f"{speed[0]:,.0f} {speed[1]}",
        "-" if record.scratch_bytes is None else short_bytes(record.scratch_bytes),
    ]


def is_dense(record: SpeedRecord) -> bool:
    """Whether every head reads everything, so that windows mean nothing."""
    return record.implementation in BASELINES


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def check_plots() -> None:
    """Says, before anything is measured, if there is nothing to draw with.

    Raises:
        RTPurboError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise RTPurboError("--plot needs matplotlib: pip install 'rtpurbo[plots]'.")


def save_plot(records: Sequence[SpeedRecord], path: str | Path) -> None:
    """Draws milliseconds against tokens, a line for every implementation and density.

    Args:
        records: measurements of one or more phases, each of which gets a picture of its own.
        path: the file, .png or another form that matplotlib writes.

    Raises:
        RTPurboError: matplotlib is missing, or does not know the form.
    """
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    pictures = list(dict.fromkeys((record.phase, record.batch_size) for record in records))
    figure, axes = pyplot.subplots(
        1, max(1, len(pictures)), figsize=(6 * max(1, len(pictures)), 4.5), squeeze=False
    )
    for (phase, batch), ax in zip(pictures, axes[0], strict=False):
        lines = _lines(records, phase, batch)
        fastest = min(time for points in lines.values() for _, time in points)
        unit, factor = ("microseconds", 1000) if fastest < 1 else ("milliseconds", 1)
        for label, points in lines.items():
            lengths, times = zip(*sorted(points), strict=True)
            times = tuple(factor * time for time in times)
            style = "-" if label.startswith("rtpurbo") else "--"
            ax.plot(lengths, times, style, marker="o", label=label)
        ticks = sorted({record.context_length for record in records if record.phase == phase})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(ticks, [short_length(tick) for tick in ticks])
        ax.set_title(phase if batch == 1 else f"{phase}, batch {batch}")
        ax.set_xlabel("tokens")
        ax.set_ylabel(unit)
        ax.yaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.tight_layout()
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)
    except ValueError as error:
        raise RTPurboError(f"the picture {path} cannot be drawn: {error}.") from error
    finally:
        pyplot.close(figure)


def _lines(
    records: Sequence[SpeedRecord], phase: str, batch: int
) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if (record.phase, record.batch_size) == (phase, batch):
            label = record.implementation
            if not is_dense(record):
                label += f", window {short_length(record.sliding_window)}"
            if record.density < 1:
                label += f", {percent(record.density)}"
            lines.setdefault(label, []).append((record.context_length, record.milliseconds))
    return lines
