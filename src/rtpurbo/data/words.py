"""English words for keys and needles."""

from __future__ import annotations

import json
from importlib import resources
from itertools import product
from typing import Literal

Split = Literal["train", "test"]

_WORDS = {
    name: tuple(" ".join(lines).split())
    for name, lines in json.loads(
        resources.files("rtpurbo.data").joinpath("words.json").read_text("utf-8")
    ).items()
}
ADJECTIVES, NOUNS, NAMES = (_WORDS[name] for name in ("adjectives", "nouns", "names"))

# Disjoint from the words above, half of which are used in training; for evaluations that need thousands.
MORE_ADJECTIVES, MORE_NOUNS, MORE_VERBS = (
    _WORDS[name] for name in ("more_adjectives", "more_nouns", "more_verbs")
)


def words_of(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns adjectives and nouns of a split; the splits share no word."""
    half = slice(0, None, 2) if split == "train" else slice(1, None, 2)
    return ADJECTIVES[half], NOUNS[half]


def key_names(split: Split) -> tuple[str, ...]:
    """Returns every compound key of a split, such as "amber-lantern", in a fixed order.

    The splits share neither adjectives nor nouns, so that keys of one split are unknown to a model trained
    on the other.
    """
    adjectives, nouns = words_of(split)
    return tuple(f"{adjective}-{noun}" for adjective, noun in product(adjectives, nouns))
