"""The dullest haystack: the same few sentences, line after line."""

from __future__ import annotations

from collections.abc import Sequence

NOISE = (
    "The pond is still.",
    "The path is long.",
    "The bread is warm.",
    "Off we go.",
    "And home again we come.",
)
"""A line of noise, sentence by sentence. RULER's own has five short sentences too."""


def noise_lines(num_sentences: int) -> list[str]:
    """Lines of noise, the last of which may be cut after any of its sentences."""
    whole, rest = divmod(num_sentences, len(NOISE))
    return [" ".join(NOISE)] * whole + [" ".join(NOISE[:rest])] * bool(rest)


def insert_lines(lines: Sequence[str], hidden: Sequence[tuple[float, str]]) -> list[str]:
    """Puts lines between others, each at its depth from 0 to 1; depths must rise."""
    filled = list(lines)
    for depth, line in reversed(hidden):
        filled.insert(round(depth * len(lines)), line)
    return filled
