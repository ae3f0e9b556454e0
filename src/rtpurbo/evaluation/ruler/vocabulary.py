"""The English words of keys and lists: from the package `wonderwords`, else our own."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from types import ModuleType

from rtpurbo.data.words import MORE_ADJECTIVES, MORE_NOUNS, MORE_VERBS, words_of
from rtpurbo.errors import RTPurboError


@dataclass(frozen=True)
class Vocabulary:
    """Words by their part of speech, none of which training on needles sees.

    Attributes:
        name: where they come from, for results: other words make other samples.
        adjectives: in alphabetical order, as are the others.
        nouns: for keys.
        verbs: only for lists.
    """

    name: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(sorted({*self.adjectives, *self.nouns, *self.verbs}))

    def compounds(self, rng: random.Random) -> Iterator[str]:
        """Keys such as "quaint-teapot", no two the same."""
        given: set[str] = set()
        # Drawing until something new comes gets slow where little is left.
        while len(given) < len(self.adjectives) * len(self.nouns) / 2:
            compound = f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"
            if compound not in given:
                given.add(compound)
                yield compound
        raise RTPurboError(
            f"{self.name} has no more than {len(given):,} compounds to give; "
            "ask for a shorter context."
        )


@cache
def load_vocabulary() -> Vocabulary:
    """The words of RULER, which are those of `wonderwords` 3, if that is installed; else our own."""
    try:
        wonderwords = importlib.import_module("wonderwords")
    except ImportError:
        return own_vocabulary()
    return wonderwords_vocabulary(wonderwords)


def own_vocabulary() -> Vocabulary:
    """Words that the project brings along, enough for lists of some 50,000 tokens.

    Longer lists go on with compounds.
    """
    adjectives, nouns = words_of("test")
    return Vocabulary(
        "rtpurbo",
        _unseen([*adjectives, *MORE_ADJECTIVES]),
        _unseen([*nouns, *MORE_NOUNS]),
        _unseen(MORE_VERBS),
    )


def wonderwords_vocabulary(wonderwords: ModuleType) -> Vocabulary:
    """The plain words among those of the package."""
    words = wonderwords.RandomWord()
    adjectives, nouns, verbs = (
        _unseen(words.filter(include_categories=[category]))
        for category in ("adjective", "noun", "verb")
    )
    return Vocabulary(f"wonderwords {version('wonderwords')}", adjectives, nouns, verbs)


def _unseen(words: Iterable[str]) -> tuple[str, ...]:
    """Words in lower case and without hyphens that no needle of a training has."""
    seen = {word for part in words_of("train") for word in part}
    return tuple(sorted({word for word in words if word.isalpha() and word.islower()} - seen))
