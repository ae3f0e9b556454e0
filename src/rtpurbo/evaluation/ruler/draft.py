"""Definition of a task: it drafts questions whose haystack can grow, and scores answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtpurbo.evaluation.ruler.materials import Materials

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Request:
    """Asks a task for one question.

    Attributes:
        materials: what haystacks are made of.
        context_length: tokens that prompt and answer may have; some tasks change with it.
        seed: of the whole test.
        number: of the question in the test.
        rng: the source of all randomness, seeded by task, seed and number.
    """

    materials: Materials
    context_length: int
    seed: int
    number: int
    rng: random.Random


@dataclass(frozen=True)
class Draft:
    """A question with everything drawn but the size of its haystack.

    Attributes:
        text: what comes before the question, around a haystack of so many units; the unit is the
            task's. The same size gives the same text, and a larger one extends a smaller one.
        question: what is asked at the end.
        opening: the words that open the answer and give nothing away.
        answers: strings that a right answer contains.
        smallest: the least size that leaves a question worth asking.
        rejected: strings that a right answer does not contain, for tasks that look at them.
    """

    text: Callable[[int], str]
    question: str
    opening: str
    answers: tuple[str, ...]
    smallest: int
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task of RULER, or of another suite whose prompts are filled to a length.

    Attributes:
        name: the suite's.
        description: one line.
        tokens_to_generate: room kept for the answer, and the most that is generated.
        draft: makes a question.
        any_answer: one of the answers is enough, as they are ways to say the same.
        suite: the suite's name in messages.
    """

    name: str
    description: str
    tokens_to_generate: int
    draft: Callable[[Request], Draft]
    any_answer: bool = False
    suite: str = "RULER"

    def score(self, generated: str, answers: Sequence[str], rejected: Sequence[str]) -> float:
        """Returns the score of an answer, from 0 to 1.

        Args:
            generated: the model's answer.
            answers: as in `Draft`.
            rejected: as in `Draft`.
        """
        return answer_score(generated, answers, self.any_answer)


def offshoot(rng: random.Random) -> random.Random:
    """A generator of its own for something that draws at any time."""
    return random.Random(rng.getrandbits(64))


def answer_score(generated: str, answers: Sequence[str], any_answer: bool) -> float:
    """Returns RULER's metric: the share of the answers that are in the generated text.

    Args:
        generated: the model's answer.
        answers: strings to find, in upper or lower case.
        any_answer: one of the answers is sufficient for a score of 1.
    """
    text = _CONTROL_CHARACTERS.sub("\n", generated).lower()
    found = sum(answer.lower() in text for answer in answers)
    return float(found > 0) if any_answer else found / len(answers)
