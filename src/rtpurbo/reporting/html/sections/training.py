"""Training curves."""

from __future__ import annotations

from rtpurbo.reporting.figures import MOST_POINTS, Axis, Point, Series, averaged, line_plot
from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.html.view import Legend, Missing, Plot, Plots, Section, Text

_TITLE = "Training"

# Figures of one unit share a plot.
_PLOTS = {
    "loss": ("loss", "answer_loss"),
    "recall": ("recall", "answer_recall"),
    "tokens": ("tokens", "oracle_tokens", "tokens_read"),
}
_MEANING = {
    "loss": "mean over queries",
    "answer_loss": "answer queries only",
    "recall": "attention recall of the selection",
    "answer_recall": "answer queries only",
    "tokens": "far tokens selected by the index",
    "oracle_tokens": "far tokens selected by exact scores",
    "tokens_read": "tokens read",
}
_SMOOTHED = 24
"""Pieces that a noisy curve is averaged into, drawn over it."""


def training_section(sources: Sources) -> Section | Missing:
    """Returns a plot for each stage and unit."""
    curves: dict[str, dict[str, list[Point]]] = {}
    for entry in sources.curves:
        figures = curves.setdefault(str(entry.get("stage")), {})
        for name, value in entry.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name not in ("stage", "step") and is_number:
                figures.setdefault(name, []).append((float(entry.get("step", 0)), float(value)))
    plots = [plot for stage, figures in curves.items() for plot in _plots_of_stage(stage, figures)]
    if not plots:
        if sources.artifact is None:
            return Missing(_TITLE, "no artifact was given.")
        return Missing(_TITLE, "the artifact has no training log.")
    said = Text(
        f"Faint: every step (averaged to {MOST_POINTS} points if there are more); strong: its "
        "mean. The loss of stage 1 depends on the length of each step's documents. The log records "
        "neither device nor dtype."
    )
    return Section("training", _TITLE, [said, Plots(plots)])


def _plots_of_stage(stage: str, figures: dict[str, list[Point]]) -> list[Plot]:
    known = {name for names in _PLOTS.values() for name in names}
    groups = {**_PLOTS, **{name: (name,) for name in figures if name not in known}}
    return [
        _plot(stage, unit, {name: figures[name] for name in names if name in figures})
        for unit, names in groups.items()
        if any(name in figures for name in names)
    ]


def _plot(stage: str, unit: str, curves: dict[str, list[Point]]) -> Plot:
    lines: list[Series] = []
    for style, (name, points) in enumerate(curves.items()):
        meaning = _MEANING.get(name)
        label = f"{name.replace('_', ' ')}: {meaning}" if meaning else name
        noisy = len(points) > 2 * _SMOOTHED
        shown = averaged(points)
        strong = averaged(points, _SMOOTHED) if noisy else shown
        hints = [f"{name} {y:.4g} around step {x:.0f}" for x, y in strong]
        lines.append(Series(label, strong, style, hints))
        if noisy:
            lines.append(Series(label, shown, style, markers=False, faint=True))
    title = f"{stage}: {unit}"
    steps = max(len(points) for points in curves.values())
    drawing = line_plot(title, lines, Axis("step", include=(0.0,)), Axis(unit))
    legend = Legend.of(lines)
    return Plot(title, f"{steps:,} logged steps", drawing, legend if len(curves) > 1 else None)
