"""Frequent words extraction: code words with Zipf-distributed counts."""

from __future__ import annotations

from itertools import islice

from rtpurbo.data.counting import code_text, code_words, smallest_code_text
from rtpurbo.data.wordings import CountingWording
from rtpurbo.evaluation.ruler.draft import Draft, Request

TOKENS_TO_GENERATE = 50
ALPHA = 2.0
NUM_FREQUENT = 3
TOKENS_TO_A_WORD = 50
"""Tokens of context for each word of the vocabulary."""

LEAST_VOCABULARY = 10


def draft(request: Request) -> Draft:
    """Draws the code words, the most frequent first."""
    rng = request.rng
    shuffle_seed = rng.getrandbits(64)
    room = request.context_length - TOKENS_TO_GENERATE
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
