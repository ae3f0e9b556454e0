"""Training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rtpurbo.reporting.html.axes import linear_axis
from rtpurbo.reporting.html.markup import Markup, join, tag
from rtpurbo.reporting.html.plots import MOST_POINTS, Series, averaged, line_plot
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.html.svg import Point
from rtpurbo.reporting.html.tables import paragraph

_TITLE = "How training went"

# Figures of one unit share a plot.
_PLOTS = {
    "loss": ("loss", "answer_loss"),
    "recall": ("recall", "answer_recall"),
    "tokens": ("tokens", "oracle_tokens", "tokens_read"),
}
_MEANING = {
    "loss": "mean over rows",
    "answer_loss": "of rows that answer",
    "recall": "attention mass on what is read",
    "answer_recall": "of rows that answer",
    "tokens": "far ones that the index selects",
    "oracle_tokens": "far ones that exact scores would",
    "tokens_read": "tokens read",
}
_SMOOTHED = 24
"""Pieces that a noisy curve is averaged into, drawn over it."""


def training_section(sources: Sources) -> Section | Missing:
    """A plot for each stage and unit."""
    curves: dict[str, dict[str, list[Point]]] = {}
    for entry in sources.curves:
        figures = curves.setdefault(str(entry.get("stage")), {})
        for name, value in entry.items():
            if name not in ("stage", "step") and _is_number(value):
                figures.setdefault(name, []).append((float(entry.get("step", 0)), float(value)))
    plots = [plot for stage, figures in curves.items() for plot in _plots_of_stage(stage, figures)]
    if not plots:
        which = "no artifact was given" if sources.artifact is None else "the artifact has no log"
        return Missing(_TITLE, f"{which} of its training.")
    said = paragraph(
        f"Faint: every step (averaged to {MOST_POINTS} points where there are more); strong: its "
        "mean. The loss of stage 1 moves with the length of the documents that it is shown."
    )
    return Section("training", _TITLE, join(said, tag("div", plots, class_="plots")))


def _plots_of_stage(stage: str, figures: dict[str, list[Point]]) -> list[Markup]:
    known = {name for names in _PLOTS.values() for name in names}
    groups = {**_PLOTS, **{name: (name,) for name in figures if name not in known}}
    return [
        _plot(stage, unit, {name: figures[name] for name in names if name in figures})
        for unit, names in groups.items()
        if any(name in figures for name in names)
    ]


def _plot(stage: str, unit: str, curves: dict[str, list[Point]]) -> Markup:
    lines: list[Series] = []
    for style, (name, points) in enumerate(curves.items()):
        meaning = _MEANING.get(name)
        label = f"{name.replace('_', ' ')}: {meaning}" if meaning else name
        noisy = len(points) > 2 * _SMOOTHED
        shown = averaged(points)
        strong = averaged(points, _SMOOTHED) if noisy else shown
        lines.append(Series(label, strong, style, hints=_hints(name, strong)))
        if noisy:
            lines.append(Series(label, shown, style, markers=False, faint=True))
    steps = [x for each in lines for x, _ in each.points]
    values = [y for each in lines for _, y in each.points]
    x = linear_axis("step", steps, include=(0,))
    y = linear_axis(unit, values)
    return line_plot(f"{stage}: {unit}", lines, x, y)


def _hints(name: str, points: Sequence[Point]) -> list[str]:
    return [f"{name} {y:.4g} around step {x:.0f}" for x, y in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
