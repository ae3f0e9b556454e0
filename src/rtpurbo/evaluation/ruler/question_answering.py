"""Question answering: passages that contain the answer among distracting passages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from rtpurbo.data.fitting import Stream
from rtpurbo.evaluation.ruler.draft import Draft, Request, spawn
from rtpurbo.evaluation.ruler.materials import Materials, first_words
from rtpurbo.evaluation.ruler.questions import PassageQuestion, QuestionSet

TOKENS_TO_GENERATE = 32

# Words of a passage of prose, and the minimum of a passage that is truncated.
WORDS_TO_A_PASSAGE, LEAST_WORDS = 100, 8
SMALLEST = 30

INSTRUCTION = "Give the answer alone, without any other words."
INTRODUCTION = f"Answer a question from the documents below. {INSTRUCTION}"
OPENING = "Answer:"


def drafting(questions_of: Callable[[Materials], QuestionSet]) -> Callable[[Request], Draft]:
    """Returns the function that drafts questions of one of the sets."""

    def draft(request: Request) -> Draft:
        questions = questions_of(request.materials)
        asked = _question(questions, request)
        rng = request.rng
        placed = [(rng.random(), questions.passages[number]) for number in asked.gold]
        depths = spawn(rng)
        distractors = Stream(
            (depths.random(), passage)
            for passage in _distractors(request, questions, asked, spawn(rng))
        )
        return Draft(
            text=lambda size: _documents([*placed, *_fill(distractors, size)]),
            question=(
                f"Answer the question from the documents above. {INSTRUCTION}\n\n"
                f"Question: {asked.question}"
            ),
            opening=OPENING,
            answers=asked.answers,
            smallest=SMALLEST,
        )

    return draft


def _question(questions: QuestionSet, request: Request) -> PassageQuestion:
    """Returns a question; each is used once before any is repeated."""
    order = list(questions.questions)
    random.Random(f"ruler-questions-{request.seed}").shuffle(order)
    return order[request.number % len(order)]


def _distractors(
    request: Request, questions: QuestionSet, asked: PassageQuestion, rng: random.Random
) -> Iterator[str]:
    """Yields related passages, then the others, then pieces of prose without end."""
    for numbers in (set(asked.related), set(range(len(questions.passages))) - set(asked.related)):
        order = sorted(numbers - set(asked.gold))
        rng.shuffle(order)
        for number in order:
            yield questions.passages[number]
    yield from cycle(_prose_passages(request.materials, asked.answers, rng))


def _prose_passages(materials: Materials, answers: Sequence[str], rng: random.Random) -> list[str]:
    """Returns all of the prose in pieces, without those that contain an answer."""
    words = Stream(materials.prose(rng)).first(len(materials.essay))
    pieces = [
        " ".join(words[start : start + WORDS_TO_A_PASSAGE])
        for start in range(0, len(words), WORDS_TO_A_PASSAGE)
    ]
    without_answer = [
        piece for piece in pieces if not any(answer.lower() in piece.lower() for answer in answers)
    ]
    # Answers such as "yes" are in every piece.
    return without_answer or pieces


def _fill(distractors: Stream[tuple[float, str]], num_words: int) -> Iterator[tuple[float, str]]:
    """Yields passages of `num_words` words together; the last one may be truncated."""
    number = 0
    while num_words >= LEAST_WORDS:
        number += 1
        depth, passage = distractors.first(number)[-1]
        length = len(passage.split())
        if length > num_words:
            passage = f"{first_words(passage, num_words)} ..."
        num_words -= length
        yield depth, passage


def _documents(placed: Sequence[tuple[float, str]]) -> str:
    """Returns the passages in the order of their depths, numbered."""
    numbered = (
        f"Document {number}:\n{passage}" for number, (_, passage) in enumerate(sorted(placed), 1)
    )
    return "\n\n".join([INTRODUCTION, *numbered])
