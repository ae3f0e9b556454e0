"""Definition of a task: drafts of questions whose haystack can grow, and scores of answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtpurbo.evaluation.ruler.materials import Materials

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Request:
    """Request for one question of a task.

    Attributes:
        materials: materials of haystacks.
        context_length: maximum number of tokens of prompt and answer.
        seed: seed of the case.
        number: number of the question in the case.
        rng: the source of all randomness, seeded by task, seed and number.
    """

    materials: Materials
    context_length: int
    seed: int
    number: int
    rng: random.Random


@dataclass(frozen=True)
class Draft:
    """Question without the size of its haystack.

    Attributes:
        text: returns the text before the question for a size of the haystack, in units of the task. The
            same size gives the same text, and a larger one extends a smaller one.
        question: question after the text.
        opening: opening words of the answer, which reveal nothing.
        answers: strings that a correct answer contains.
        smallest: smallest size that is allowed.
        rejected: strings that a correct answer does not contain, for tasks that check them.
    """

    text: Callable[[int], str]
    question: str
    opening: str
    answers: tuple[str, ...]
    smallest: int
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Task of RULER, or of another suite whose prompts are filled to a length.

    Attributes:
        name: name in the suite.
        description: one line.
        tokens_to_generate: maximum number of tokens of the answer, for which room is kept.
        draft: returns a question.
        any_answer: one of the answers is sufficient, because they are synonyms.
        suite: name of the suite in messages.
    """

    name: str
    description: str
    tokens_to_generate: int
    draft: Callable[[Request], Draft]
    any_answer: bool = False
    suite: str = "RULER"

    def score(self, generated: str, answers: Sequence[str], rejected: Sequence[str]) -> float:
        """Returns RULER's metric: the share of the answers, in upper or lower case, that are in the generated text."""
        text = _CONTROL_CHARACTERS.sub("\n", generated).lower()
        found = sum(answer.lower() in text for answer in answers)
        return float(found > 0) if self.any_answer else found / len(answers)


def spawn(rng: random.Random) -> random.Random:
    """Returns a separate generator, for draws whose number is not known."""
    return random.Random(rng.getrandbits(64))
