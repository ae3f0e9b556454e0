"""Training curves as sparklines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
T = TypeVar("T")

_FIGURES = ("loss", "answer_loss", "recall", "answer_recall", "tokens_read")


def training_curves(entries: Iterable[dict[str, Any]]) -> Table:
    """Returns a line for each stage and figure of a log: its curve, first and last value."""
    curves: dict[tuple[str, str], list[float]] = {}
    for entry in entries:
        for figure in _FIGURES:
            if entry.get(figure) is not None:
                curves.setdefault((entry["stage"], figure), []).append(entry[figure])
    table = Table.grid(padding=(0, 2))
    for (stage, figure), values in curves.items():
        table.add_row(f"{stage} {figure}", sparkline(values), f"{values[0]:.4g} → {values[-1]:.4g}")
    return table


def curves_as_text(entries: Iterable[dict[str, Any]]) -> str:
    """Returns the same as plain text; empty without entries."""
    console = Console(width=100, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(training_curves(entries))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def neighbours(values: Sequence[T], most: int) -> list[Sequence[T]]:
    """Returns consecutive parts of values, at most so many and of about equal length."""
    count = min(most, len(values))
    return [
        values[len(values) * number // count : len(values) * (number + 1) // count]
        for number in range(count)
    ]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Returns values as bars of eight heights, at most `width`, each the mean of neighbours."""
    means = [sum(part) / len(part) for part in neighbours(values, width)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
