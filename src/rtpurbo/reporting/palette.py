"""Colours of figures and reports, for light and dark backgrounds."""

from __future__ import annotations

# Okabe and Ito's colours, which remain distinguishable under colour blindness: darkened on white
# and lightened on black so that lines have a contrast of at least 3 to the background, text of 4.5.
PALETTE: dict[str, tuple[str, str]] = {
    "ground": ("#ffffff", "#14171a"),
    "raised": ("#f5f6f8", "#1f2429"),
    "edge": ("#d4d8de", "#3a424b"),
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#57606a", "#a5afba"),
    "accent": ("#0067a3", "#62b5ee"),
    "heavy": ("#fbd9c4", "#5c2a10"),
    "heavy-ink": ("#7a2a00", "#ffd0b5"),
    "slight": ("#fdf0d8", "#40331a"),
    "slight-ink": ("#6b4700", "#f6dca6"),
    "s0": ("#0072b2", "#56b4e9"),
    "s1": ("#d55e00", "#ff8a3d"),
    "s2": ("#00805c", "#2fc79c"),
    "s3": ("#b2558c", "#e29ac4"),
    "s4": ("#a36a00", "#e6a817"),
    "s5": ("#2f86b8", "#8fc7f0"),
    "s6": ("#7a5cc7", "#b39ef0"),
    "s7": ("#6b6b00", "#cfcf3a"),
}
"""Light and dark value of each CSS variable."""

NUM_SERIES_COLORS = 8


def series_color(style: int | None) -> str:
    """Returns the palette name of a series; None is the baseline of a figure."""
    return "ink" if style is None else f"s{style % NUM_SERIES_COLORS}"


def variables(scheme: int) -> str:
    """Returns the palette as CSS declarations: scheme 0 is light, 1 is dark."""
    return " ".join(f"--{name}: {values[scheme]};" for name, values in PALETTE.items())
