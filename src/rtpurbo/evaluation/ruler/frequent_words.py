"""Frequent words extraction: made-up words whose counts fall off as those of a Zipf law."""

from __future__ import annotations

from itertools import islice

from rtpurbo.data.counting import (
    code_introduction,
    code_question,
    code_text,
    code_words,
    smallest_code_text,
)
from rtpurbo.evaluation.ruler.draft import Draft, Request

TOKENS_TO_GENERATE = 50
ALPHA = 2.0
NUM_FREQUENT = 3
TOKENS_TO_A_WORD = 50
"""The vocabulary grows with the context: a word for so many tokens."""

LEAST_VOCABULARY = 10


def draft(request: Request) -> Draft:
    """Draws the code words, the most frequent first."""
    rng = request.rng
    shuffle_seed = rng.getrandbits(64)
    room = request.context_length - TOKENS_TO_GENERATE
    num_words = max(LEAST_VOCABULARY, room // TOKENS_TO_A_WORD) - 1
    ranked = list(islice(code_words(rng), num_words))
    frequent = ranked[:NUM_FREQUENT]
    asked = code_question(frequent)
    introduction = code_introduction(NUM_FREQUENT)
    return Draft(
        lambda size: f"{introduction}\n\n{code_text(ranked, size, ALPHA, shuffle_seed)}",
        asked.question,
        asked.opening,
        tuple(frequent),
        smallest=smallest_code_text(NUM_FREQUENT, ALPHA),
    )
