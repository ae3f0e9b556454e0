"""The dullest haystack: the same few sentences, line after line."""

from __future__ import annotations

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
