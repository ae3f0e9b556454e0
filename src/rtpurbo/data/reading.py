"""Reading comprehension: questions about one or two of many numbered paragraphs amid prose."""

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
"""Share of questions that need two paragraphs."""

NUM_OTHERS = (0, 2, 6, 20)
"""Choices of the number of distracting pairs of paragraphs, where there is room."""

PARAGRAPH_ROOM = 0.4
"""Maximum share of a sequence for these paragraphs; the rest is prose."""

WORDS_TO_A_PIECE = (40, 160)
"""Minimum and maximum number of words of a piece of prose."""

WORD = re.compile(r" ?\S{1,24}")
"""Word with the space before it; in text without spaces, 24 characters."""


def reading_example(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    most_questions: int = 1,
) -> Conversation:
    """Returns numbered paragraphs about invented people and places among pieces of prose, with questions.

    Args:
        tokenizer: the model's.
        corpus: prose.
        length: maximum number of tokens.
        rng: source of all randomness.
        most_questions: maximum number of questions, about different pairs of paragraphs.

    Raises:
        RTPurboError: `length` leaves no room for the question, or `corpus` is too short.
    """
    pairs = subjects(rng)
    titled = rng.random() < 0.5
    asked = next(pairs)
    questions = [_question(*asked, rng)]
    paragraphs = _paragraphs(asked, titled, rng)
    tokens = sum(len(encode(tokenizer, paragraph)) for _, paragraph in paragraphs)
    most = max(0, int(PARAGRAPH_ROOM * length / tokens) - 1)
    num_others = rng.choice([count for count in NUM_OTHERS if count <= most])
    for pair in islice(pairs, num_others):
        paragraphs += _paragraphs(pair, titled, rng)
        if len(questions) < most_questions:
            questions.append(_question(*pair, rng))
    paragraphs.sort()
    worded = templates("train")["reading"]
    heading, introduction = rng.choice(worded["headings"]), rng.choice(worded["introductions"])
    seed = rng.getrandbits(64)
    prose = Stream(_pieces(tokenizer, corpus, length, random.Random(seed)))

    def around(num_words: int) -> Conversation:
        texts = placed_among(_first_words(prose, num_words), paragraphs)
        numbered = (
            f"{fill(heading, number=number)}\n{text}" for number, text in enumerate(texts, 1)
        )
        return conversation_tokens(tokenizer, "\n\n".join([introduction, *numbered]), questions)

    return fit_units(length, around, f"a question about {len(paragraphs)} paragraphs amid prose")


def _question(first: Subject, second: Subject, rng: random.Random) -> Question:
    """Asks for a fact of the first subject, or of the second, which is named by its connection with the first."""
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


def _paragraphs(
    pair: tuple[Subject, Subject], titled: bool, rng: random.Random
) -> list[tuple[float, str]]:
    """Returns a depth and a paragraph for each subject of a pair."""
    texts = [subject.paragraph(rng) for subject in pair]
    if titled:
        texts = [f"{subject.name}\n{text}" for subject, text in zip(pair, texts, strict=True)]
    return [(rng.random(), text) for text in texts]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Iterator[list[str]]:
    """Yields the words of pieces of prose without end, cut from samples of `length` tokens."""
    while True:
        prose = decode(tokenizer, corpus.sample_tokens(tokenizer, length, rng))
        words = WORD.findall(" ".join(prose.split()))
        while words:
            size = rng.randint(*WORDS_TO_A_PIECE)
            yield words[:size]
            del words[:size]


def _first_words(pieces: Stream[list[str]], num_words: int) -> list[str]:
    """Returns pieces of prose of `num_words` words together; the last one may be truncated."""
    texts: list[str] = []
    while num_words > 0:
        piece = pieces.first(len(texts) + 1)[-1][:num_words]
        num_words -= len(piece)
        texts.append("".join(piece).strip())
    return texts
