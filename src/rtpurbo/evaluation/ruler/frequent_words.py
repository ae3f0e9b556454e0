"""Frequent words extraction: made-up words whose counts fall off as those of a Zipf law."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from rtpurbo.evaluation.ruler.draft import Draft, Request

TOKENS_TO_GENERATE = 50
ALPHA = 2.0
NUM_FREQUENT = 3
WORD_LENGTH = 6
TOKENS_TO_A_WORD = 50
"""The vocabulary grows with the context: a word for so many tokens."""

LEAST_VOCABULARY = 10
DOTS = "..."
"""The most frequent of all, and no word."""

INTRODUCTION = (
    "The text below is written in code words. Keep count of how often each code word comes up, "
    f"and find the {NUM_FREQUENT} most frequent ones."
)
QUESTION = (
    f"Which {NUM_FREQUENT} code words come up most often in the text above? Dots ('{DOTS}') are "
    "not a code word. Give the words without any explanation."
)
OPENING = f"The {NUM_FREQUENT} code words that come up most often in the text above are:"


def draft(request: Request) -> Draft:
    """Draws the code words, the most frequent first."""
    rng = request.rng
    shuffle_seed = rng.getrandbits(64)
    room = request.context_length - TOKENS_TO_GENERATE
    ranked = _code_words(rng, max(LEAST_VOCABULARY, room // TOKENS_TO_A_WORD) - 1)

    def text(size: int) -> str:
        words = [
            word
            for word, count in zip([DOTS, *ranked], counts(size, len(ranked) + 1), strict=False)
            for _ in range(count)
        ]
        random.Random(shuffle_seed).shuffle(words)
        return f"{INTRODUCTION}\n\n{' '.join(words)}"

    return Draft(text, QUESTION, OPENING, tuple(ranked[:NUM_FREQUENT]), smallest=_smallest())


def counts(size: int, vocabulary: int, alpha: float = ALPHA) -> Sequence[int]:
    """How often each rank comes up in a text of some `size` words: size k^-alpha / zeta(alpha).

    Counts are rounded down, so the text is shorter than `size`; ranks that never come up are left
    out.
    """
    total = zeta(alpha)
    every = (int(size * rank**-alpha / total) for rank in range(1, vocabulary + 1))
    return [count for count in every if count]


def zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function, by its first terms and the Euler-Maclaurin estimate of the rest."""
    head = math.fsum(rank**-alpha for rank in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2


def _smallest() -> int:
    """From this size on, the last word asked for comes up more often than the next, rounding or not."""
    last, following = NUM_FREQUENT + 1, NUM_FREQUENT + 2
    return math.ceil(zeta(ALPHA) / (last**-ALPHA - following**-ALPHA))


def _code_words(rng: random.Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=WORD_LENGTH))] = None
    return list(words)
