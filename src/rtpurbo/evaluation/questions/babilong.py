"""BABILong: facts of bAbI tasks scattered in order through the text of a book, and a question.

The facts are inserted between sentences at random depths. Prompts are filled to the length of the case as in
RULER.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rtpurbo.data.fitting import Stream
from rtpurbo.data.prompts import hide
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.questions.suite import Row
from rtpurbo.evaluation.ruler.draft import Draft, Request, Task, spawn

SUITE = "babilong"
COLUMNS: Mapping[str, type] = {"task": str, "facts": list, "question": str, "answer": str}
TOKENS_TO_GENERATE = 16
SMALLEST = 100
"""Words of prose of the shortest prompt."""

KINDS = (
    frozenset(("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")),
    frozenset(("bill", "daniel", "fred", "jeff", "john", "julie", "mary", "sandra")),
    frozenset(("apple", "football", "milk")),
)
"""The answers of qa1 to qa5: places, people and objects."""

_INTRODUCTION = (
    "Somewhere in the book below, sentences about {about} have been inserted in chronological order. "
    "Only these sentences matter for the question after the book."
)
_EXAMPLE = 'For example, after the sentences "{facts}" the question "{question}" has the answer "{answer}".'

# Names of places, people and objects that are in no question, so that examples reveal nothing.
_TASKS: dict[str, tuple[str, str, str, str, str]] = {
    "qa1": (
        "where a person is, from one fact",
        "where people went",
        "Anna walked to the cellar. Peter walked to the attic. Anna walked to the balcony.",
        "Where is Anna?",
        "balcony",
    ),
    "qa2": (
        "where an object is, from two facts",
        "people who move around and carry things",
        "Anna walked to the cellar. Anna picked up the lamp. Anna walked to the balcony.",
        "Where is the lamp?",
        "balcony",
    ),
    "qa3": (
        "where an object was before, from three facts",
        "people who move around and carry things",
        "Anna picked up the lamp. Anna walked to the cellar. Anna walked to the balcony.",
        "Where was the lamp before the balcony?",
        "cellar",
    ),
    "qa4": (
        "a relation of two places",
        "how rooms lie to each other",
        "The cellar lies north of the attic. The balcony lies north of the cellar.",
        "What is the attic south of?",
        "cellar",
    ),
    "qa5": (
        "a relation of three things",
        "people who give things to each other",
        "Anna took the lamp. Anna gave the lamp to Peter. Peter walked to the cellar.",
        "Who did Anna give the lamp to?",
        "Peter",
    ),
}
TASKS = tuple(_TASKS)


@dataclass(frozen=True)
class BabilongTask(Task):
    """Task of BABILong with its questions.

    Attributes:
        rows: questions, in the order of the cases.
    """

    suite: str = "BABILong"
    rows: Sequence[Row] = field(default=(), repr=False)

    def score(self, generated: str, answers: Sequence[str], rejected: Sequence[str]) -> float:
        """Returns 1 if the first sentence names the answer and no rejected candidate, else 0."""
        first = re.split(r"\n|(?<=[.!?])\s", generated.strip(), maxsplit=1)[0]
        said = _words(first)
        return float(all(_words(answer) <= said for answer in answers) and not said & {*rejected})


def babilong_tasks(rows: Iterable[Row], seed: int) -> dict[str, BabilongTask]:
    """Returns the tasks that a file has questions for.

    Args:
        rows: rows of the file.
        seed: seed of the order of the questions.

    Raises:
        RTPurboError: the file has no question of a known task.
    """
    by_task: dict[str, list[Row]] = {name: [] for name in TASKS}
    for row in rows:
        if row["task"] in by_task:
            by_task[row["task"]].append(row)
    tasks = {}
    for name, own in by_task.items():
        if own:
            random.Random(f"{SUITE}-{name}-{seed}").shuffle(own)
            tasks[name] = BabilongTask(
                name,
                _TASKS[name][0],
                TOKENS_TO_GENERATE,
                _drafting(name, own),
                rows=tuple(own),
            )
    if not tasks:
        raise RTPurboError(
            f"the questions of {SUITE} are of no known task: the column 'task' must be one of "
            f"{', '.join(TASKS)}."
        )
    return tasks


def rejected_candidates(question: str, answer: str) -> tuple[str, ...]:
    """Returns the candidates of the answer's kind that a correct answer does not name.

    An answer may repeat those that the question names.
    """
    same = next((kind for kind in KINDS if answer.lower() in kind), frozenset[str]())
    return tuple(sorted(same - {answer.lower()} - _words(question)))


def _drafting(name: str, rows: Sequence[Row]) -> Callable[[Request], Draft]:
    _, about, facts, question, answer = _TASKS[name]
    introduction = " ".join(
        (
            _INTRODUCTION.format(about=about),
            _EXAMPLE.format(facts=facts, question=question, answer=answer),
        )
    )

    def draft(request: Request) -> Draft:
        row, rng = rows[request.number], request.rng
        prose = Stream(request.materials.prose(spawn(rng)))
        depths = sorted(rng.random() for _ in row["facts"])
        hidden = list(zip(depths, row["facts"], strict=True))

        def text(size: int) -> str:
            return f"{introduction}\n\n{hide(' '.join(prose.first(size)), hidden)}"

        return Draft(
            text,
            f"Question: {row['question']}\nReply with one word.",
            "Answer:",
            (row["answer"],),
            SMALLEST,
            rejected_candidates(row["question"], row["answer"]),
        )

    return draft


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))
