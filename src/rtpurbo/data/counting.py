"""Which words come up most often? Numbered lists, and texts of code words with counts of a Zipf law."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence

from rtpurbo.data.prompts import Question

LIST_INTRODUCTION = (
    "The numbered list below repeats its words, some of them far more often than the others. "
    "Keep in mind which ones come up most."
)

DOTS = "..."
"""The most frequent of all in a text of code words, and none of them."""

CODE_WORD_LENGTH = 6


def numbered(words: Sequence[str]) -> str:
    """A list on one line."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def shuffled_list(
    common: Sequence[str],
    uncommon: Sequence[str],
    common_count: int,
    uncommon_count: int,
    seed: int,
) -> list[str]:
    """Every common word so many times, and every other, in a random order."""
    entries = [*common] * common_count + [*uncommon] * uncommon_count
    random.Random(seed).shuffle(entries)
    return entries


def list_question(common: Sequence[str]) -> Question:
    """Asks for the common words of a list, of which there are several."""
    return Question(
        f"Which {len(common)} words come up most often in the list above?",
        f"The {len(common)} words that come up most often in the list are:",
        f" {numbered(common)}",
    )


def code_introduction(num_frequent: int) -> str:
    """What comes before a text of code words."""
    return (
        "The text below is written in code words. Keep count of how often each code word comes up, "
        f"and find the {num_frequent} most frequent ones."
    )


def code_question(frequent: Sequence[str]) -> Question:
    """Asks for the most frequent code words, of which there are several."""
    return Question(
        f"Which {len(frequent)} code words come up most often in the text above? Dots ('{DOTS}') are "
        "not a code word. Give the words without any explanation.",
        f"The {len(frequent)} code words that come up most often in the text above are:",
        f" {' '.join(frequent)}",
    )


def code_words(rng: random.Random) -> Iterator[str]:
    """Code words without end, none twice."""
    given: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=CODE_WORD_LENGTH))
        if word not in given:
            given.add(word)
            yield word


def code_text(ranked: Sequence[str], size: int, alpha: float, seed: int) -> str:
    """Some `size` words in a random order: dots most often, then the code words by their rank."""
    counts = zipf_counts(size, len(ranked) + 1, alpha)
    words = [
        word for word, count in zip([DOTS, *ranked], counts, strict=False) for _ in range(count)
    ]
    random.Random(seed).shuffle(words)
    return " ".join(words)


def zipf_counts(size: int, vocabulary: int, alpha: float) -> Sequence[int]:
    """How often each rank comes up in a text of some `size` words: size k^-alpha / zeta(alpha).

    Counts are rounded down, so the text is shorter than `size`; ranks that never come up are left
    out.
    """
    total = zeta(alpha)
    every = (int(size * rank**-alpha / total) for rank in range(1, vocabulary + 1))
    return [count for count in every if count]


def smallest_code_text(num_frequent: int, alpha: float) -> int:
    """From this size on, the last word asked for comes up more often than the next, rounding or not."""
    last, following = num_frequent + 1, num_frequent + 2
    return math.ceil(zeta(alpha) / (last**-alpha - following**-alpha))


def zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function, by its first terms and the Euler-Maclaurin estimate of the rest."""
    head = math.fsum(rank**-alpha for rank in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2
