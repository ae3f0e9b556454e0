"""A plain question about one or two of many numbered paragraphs, most of them pieces of prose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from rtpurbo.data.fitting import Stream
from rtpurbo.data.inventions import Subject, subjects
from rtpurbo.data.prompts import (
    Conversation,
    Question,
    conversation_tokens,
    decode,
    fit_units,
    placed_among,
)
from rtpurbo.data.texts import Prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TWO_HOP_SHARE = 0.4
"""How often a question leads from one paragraph to another."""

NUM_OTHERS = (0, 2, 6, 20)
"""How many pairs of paragraphs there are like those asked for, one of these, where there is room."""

TOKENS_PER_PAIR = 256
"""Of a sequence for each such pair: paragraphs must not crowd out the prose."""

WORDS_TO_A_PIECE = (40, 160)
"""Of prose, from the first to the second."""

HEADINGS = ("[{}]", "Text {}:", "Section {}", "({})")
INTRODUCTION = (
    "Several short texts follow, each under a number. Read all of them: what is asked in the end "
    "stands in one or two of them. A few words are enough for an answer."
)


def reading_example(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Conversation:
    """Numbered paragraphs about invented people and places among pieces of prose, and a question.

    Args:
        tokenizer: the model's.
        corpus: prose.
        length: the most tokens.
        rng: the source of all randomness.

    Raises:
        RTPurboError: `length` leaves no room for the question, or `corpus` is too short.
    """
    most = max(0, length // TOKENS_PER_PAIR - 1)
    num_others = rng.choice([count for count in NUM_OTHERS if count <= most])
    asked, *others = islice(subjects(rng), 1 + num_others)
    question = _question(*asked, rng)
    titled = rng.random() < 0.5
    told = [
        (rng.random(), _paragraph(subject, titled, rng))
        for pair in (asked, *others)
        for subject in pair
    ]
    told.sort()
    heading, seed = rng.choice(HEADINGS), rng.getrandbits(64)
    prose = Stream(_pieces(tokenizer, corpus, length, random.Random(seed)))

    def around(num_words: int) -> Conversation:
        texts = placed_among(_first_words(prose, num_words), told)
        numbered = (f"{heading.format(number)}\n{text}" for number, text in enumerate(texts, 1))
        return conversation_tokens(tokenizer, "\n\n".join([INTRODUCTION, *numbered]), [question])

    return fit_units(length, around, f"A question about {len(told)} paragraphs amid prose")


def _question(first: Subject, second: Subject, rng: random.Random) -> Question:
    """Asks for a fact of the first, or for one of the second, whose name only the first gives away."""
    two_hops = rng.random() < TWO_HOP_SHARE
    subject = second if two_hops else first
    name = first.paraphrase_of_other() if two_hops else first.name
    fact, value = rng.choice(subject.facts)
    return Question(fact.question.format(name=name), "The texts say:", f" {value}")


def _paragraph(subject: Subject, titled: bool, rng: random.Random) -> str:
    text = subject.paragraph(rng)
    return f"{subject.name}\n{text}" if titled else text


def _pieces(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Iterator[list[str]]:
    """The words of pieces of prose, without end; `length` tokens of it go on where they began."""
    while True:
        words = decode(tokenizer, corpus.sample_tokens(tokenizer, length, rng)).split()
        while words:
            size = rng.randint(*WORDS_TO_A_PIECE)
            yield words[:size]
            del words[:size]


def _first_words(pieces: Stream[list[str]], num_words: int) -> list[str]:
    """Pieces of so many words together, the last one cut short if need be."""
    texts: list[str] = []
    while num_words > 0:
        piece = pieces.first(len(texts) + 1)[-1][:num_words]
        num_words -= len(piece)
        texts.append(" ".join(piece))
    return texts
