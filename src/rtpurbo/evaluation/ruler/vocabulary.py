"""English words of keys and lists: those of the package `wonderwords` if it is installed, else built-in ones."""

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
    """Words by part of speech, none of which is in training needles.

    Attributes:
        name: source, recorded in results because other words give other samples.
        adjectives: adjectives in alphabetical order.
        nouns: nouns in alphabetical order.
        verbs: verbs in alphabetical order, for lists only.
    """

    name: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All distinct words."""
        return tuple(sorted({*self.adjectives, *self.nouns, *self.verbs}))

    def compounds(self, rng: random.Random) -> Iterator[str]:
        """Yields distinct keys such as "quaint-teapot"."""
        given: set[str] = set()
        # Rejection sampling is slow when few compounds are left.
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
    """Returns the words of RULER (`wonderwords` 3) if the package is installed, else the built-in ones."""
    try:
        wonderwords = importlib.import_module("wonderwords")
    except ImportError:
        return own_vocabulary()
    return wonderwords_vocabulary(wonderwords)


def own_vocabulary() -> Vocabulary:
    """Returns the built-in words, sufficient for lists of about 50,000 tokens; longer lists add compounds."""
    adjectives, nouns = words_of("test")
    return Vocabulary(
        "rtpurbo",
        _unseen([*adjectives, *MORE_ADJECTIVES]),
        _unseen([*nouns, *MORE_NOUNS]),
        _unseen(MORE_VERBS),
    )


def wonderwords_vocabulary(wonderwords: ModuleType) -> Vocabulary:
    """Returns the words of the package without hyphens and capitals."""
    words = wonderwords.RandomWord()
    adjectives, nouns, verbs = (
        _unseen(words.filter(include_categories=[category]))
        for category in ("adjective", "noun", "verb")
    )
    return Vocabulary(f"wonderwords {version('wonderwords')}", adjectives, nouns, verbs)


def _unseen(words: Iterable[str]) -> tuple[str, ...]:
    """Returns words in lower case and without hyphens that are not in training needles."""
    seen = {word for part in words_of("train") for word in part}
    return tuple(sorted({word for word in words if word.isalpha() and word.islower()} - seen))
