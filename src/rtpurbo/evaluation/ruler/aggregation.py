"""Aggregation tasks: the most frequent words of a list, and of a text of code words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from rtpurbo.data.counting import code_text, code_words, shuffled_list, smallest_code_text
from rtpurbo.data.fitting import Stream
from rtpurbo.data.wordings import CountingWording
from rtpurbo.evaluation.ruler.draft import Draft, Request, spawn

COMMON_WORDS_TOKENS = 120
NUM_COMMON = 10
SMALLEST_LIST = 10


LONG, SHORT = (30, 3), (6, 1)
LONG_EXAMPLE, SHORT_EXAMPLE = (10, 3), (3, 1)
"""Counts of each of the ten common words in a list, and of each other word."""

LONG_FROM = 4096
"""Shorter contexts have no room for the long lists."""

LONG_EXAMPLE_WORDS, SHORT_EXAMPLE_WORDS = 30, 10
"""Uncommon words of the worked example."""


def draft_common_words(request: Request) -> Draft:
    """Draws the words of the list, and others for the worked example before it."""
    rng, is_long = request.rng, request.context_length >= LONG_FROM
    counts = LONG if is_long else SHORT
    every = request.materials.vocabulary.words
    words = iter(rng.sample(every, len(every)))
    example_common = _apart(words, every)
    example_uncommon = list(islice(words, LONG_EXAMPLE_WORDS if is_long else SHORT_EXAMPLE_WORDS))
    common = _apart(words, every)
    wording = CountingWording.draw(rng, "test", "lists")
    example = _listed(
        wording,
        example_common,
        example_uncommon,
        LONG_EXAMPLE if is_long else SHORT_EXAMPLE,
        rng.getrandbits(64),
    )
    shown, asked = wording.ask(example_common), wording.ask(common)
    solved = shown.solved_after(example)
    shuffle_seed = rng.getrandbits(64)
    uncommon = Stream(_uncommon(request, words, common))
    return Draft(
        text=lambda size: (
            f"{solved}\n\n\n{_listed(wording, common, uncommon.first(size), counts, shuffle_seed)}"
        ),
        question=asked.question,
        opening=asked.opening,
        answers=tuple(common),
        smallest=SMALLEST_LIST,
    )


def _apart(words: Iterator[str], every: Sequence[str]) -> list[str]:
    """Returns the next words that are not part of another word, in which scoring would find them."""
    together = " ".join(every)
    return list(islice((word for word in words if together.count(word) == 1), NUM_COMMON))


def _uncommon(request: Request, words: Iterator[str], common: Sequence[str]) -> Iterator[str]:
    """Yields the other words, and then compounds that contain no common word."""
    compounds = request.materials.vocabulary.compounds(spawn(request.rng))
    return chain(words, (word for word in compounds if not any(other in word for other in common)))


def _listed(
    wording: CountingWording,
    common: Sequence[str],
    uncommon: Sequence[str],
    counts: tuple[int, int],
    seed: int,
) -> str:
    entries = shuffled_list(common, uncommon, *counts, seed)
    return wording.text(entries, NUM_COMMON)


FREQUENT_WORDS_TOKENS = 50
ALPHA = 2.0
NUM_FREQUENT = 3
TOKENS_TO_A_WORD = 50
"""Tokens of context for each word of the vocabulary."""

LEAST_VOCABULARY = 10


def draft_frequent_words(request: Request) -> Draft:
    """Draws the code words, the most frequent first."""
    rng = request.rng
    shuffle_seed = rng.getrandbits(64)
    room = request.context_length - FREQUENT_WORDS_TOKENS
    num_words = max(LEAST_VOCABULARY, room // TOKENS_TO_A_WORD) - 1
    ranked = list(islice(code_words(rng), num_words))
    frequent = ranked[:NUM_FREQUENT]
    wording = CountingWording.draw(rng, "test", "code_words")
    asked = wording.ask(frequent)
    return Draft(
        lambda size: wording.text(code_text(ranked, size, ALPHA, shuffle_seed), NUM_FREQUENT),
        asked.question,
        asked.opening,
        tuple(frequent),
        smallest=smallest_code_text(NUM_FREQUENT, ALPHA),
    )
