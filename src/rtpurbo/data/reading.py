"""A plain question about one or two of many numbered paragraphs, most of them pieces of prose."""

from __future__ import annotations

import random
import re
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
from rtpurbo.data.texts import Prose, encode
from rtpurbo.data.wordings import fill, pose, templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TWO_HOP_SHARE = 0.4
"""How often a question leads from one paragraph to another."""

NUM_OTHERS = (0, 2, 6, 20)
"""How many pairs of paragraphs there are like those asked for, one of these, where there is room."""

TOLD_ROOM = 0.4
"""The share of a sequence that paragraphs may take: they must not crowd out the prose."""

WORDS_TO_A_PIECE = (40, 160)
"""Of prose, from the first to the second."""

WORD = re.compile(r" ?\S{1,24}")
"""With the space before it; where none are written, so many characters stand for a word."""


def reading_example(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    most_questions: int = 1,
) -> Conversation:
    """Numbered paragraphs about invented people and places among pieces of prose, and questions.

    Args:
        tokenizer: the model's.
        corpus: prose.
        length: the most tokens.
        rng: the source of all randomness.
        most_questions: at most so many questions, about different pairs of paragraphs.

    Raises:
        RTPurboError: `length` leaves no room for the question, or `corpus` is too short.
    """
    pairs = subjects(rng)
    titled = rng.random() < 0.5
    asked = next(pairs)
    questions = [_question(*asked, rng)]
    told = _told(asked, titled, rng)
    tokens = sum(len(encode(tokenizer, paragraph)) for _, paragraph in told)
    most = max(0, int(TOLD_ROOM * length / tokens) - 1)
    num_others = rng.choice([count for count in NUM_OTHERS if count <= most])
    for pair in islice(pairs, num_others):
        told += _told(pair, titled, rng)
        if len(questions) < most_questions:
            questions.append(_question(*pair, rng))
    told.sort()
    worded = templates("train")["reading"]
    heading, introduction = rng.choice(worded["headings"]), rng.choice(worded["introductions"])
    seed = rng.getrandbits(64)
    prose = Stream(_pieces(tokenizer, corpus, length, random.Random(seed)))

    def around(num_words: int) -> Conversation:
        texts = placed_among(_first_words(prose, num_words), told)
        numbered = (
            f"{fill(heading, number=number)}\n{text}" for number, text in enumerate(texts, 1)
        )
        return conversation_tokens(tokenizer, "\n\n".join([introduction, *numbered]), questions)

    return fit_units(length, around, f"A question about {len(told)} paragraphs amid prose")


def _question(first: Subject, second: Subject, rng: random.Random) -> Question:
    """Asks for a fact of the first, or for one of the second, whose name only the first gives away."""
    two_hops = rng.random() < TWO_HOP_SHARE
    subject = second if two_hops else first
    name = first.paraphrase_of_other() if two_hops else first.name
    fact, value = rng.choice(subject.facts)
    worded = templates("train")["reading"]
    return pose(
        rng.choice(worded["questions"]),
        rng.choice(worded["openings"]),
        value,
        question=fact.question.format(name=name),
    )


def _told(
    pair: tuple[Subject, Subject], titled: bool, rng: random.Random
) -> list[tuple[float, str]]:
    """A paragraph about each of a pair, and its depth."""
    paragraphs = [subject.paragraph(rng) for subject in pair]
    if titled:
        paragraphs = [
            f"{subject.name}\n{text}" for subject, text in zip(pair, paragraphs, strict=True)
        ]
    return [(rng.random(), text) for text in paragraphs]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Iterator[list[str]]:
    """The words of pieces of prose, without end; `length` tokens of it go on where they began."""
    while True:
        prose = decode(tokenizer, corpus.sample_tokens(tokenizer, length, rng))
        words = WORD.findall(" ".join(prose.split()))
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
        texts.append("".join(piece).strip())
    return texts
