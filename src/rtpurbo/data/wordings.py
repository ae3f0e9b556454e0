"""Wordings of the synthetic tasks: many for training, drawn at random, and one for evaluation.

The files `training_wordings.json` and `benchmark_wordings.json` share no six consecutive words. An
evaluation has a single wording of each kind, for which no random number is drawn.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeVar

from rtpurbo.data.prompts import Question
from rtpurbo.data.words import Split

T = TypeVar("T")

_FILES = {"train": "training_wordings.json", "test": "benchmark_wordings.json"}
_FIELD = re.compile(r"\{(\w+)\}")


@cache
def templates(split: Split) -> dict[str, Any]:
    """Returns all templates of a split by section of its file."""
    text = resources.files("rtpurbo.data").joinpath(_FILES[split]).read_text("utf-8")
    return dict(json.loads(text))


def pick(options: Sequence[T], rng: random.Random) -> T:
    """Returns one of the options; a single option does not advance the random generator."""
    return options[0] if len(options) == 1 else rng.choice(options)


def fill(template: str, **values: object) -> str:
    """Fills the fields of a template; other braces, as in JSON, are kept."""
    return _FIELD.sub(lambda field: str(values.get(field[1], field[0])), template)


def join(values: Sequence[str], separators: Sequence[str]) -> str:
    """Joins values by the first separator, and the last one by the second."""
    between, before_last = separators
    if len(values) == 1:
        return values[0]
    return f"{between.join(values[:-1])}{before_last}{values[-1]}"


def lay_out(words: Sequence[str], layout: Sequence[str]) -> str:
    """Formats words as a list, given the template of an entry and the text between entries."""
    entry, between = layout
    return between.join(
        fill(entry, number=number, word=word) for number, word in enumerate(words, 1)
    )


def pose(question: str, opening: str, answer: str, /, **values: object) -> Question:
    """Builds a question from its templates; an answer without opening words begins without a space."""
    opening = fill(opening, **values)
    return Question(fill(question, **values), opening, f" {answer}" if opening else answer)


@dataclass(frozen=True)
class NeedleWording:
    """Wording of the needles and questions of one sequence.

    Attributes:
        split: split of the templates.
        kind: kind of the values, "number" or "uuid".
        statement: template of a needle.
        noun: name of the values.
    """

    split: Split
    kind: str
    statement: str
    noun: str

    @classmethod
    def draw(cls, rng: random.Random, split: Split, kind: str = "number") -> NeedleWording:
        """Draws a wording of the split."""
        drawn = templates(split)["needles"]
        statement = _statement(drawn, rng)
        is_named = re.search(r"\{noun\}", statement, re.IGNORECASE)
        return cls(
            split,
            kind,
            statement,
            pick(drawn["nouns" if is_named else "plain_nouns"][kind], rng),
        )

    @property
    def is_record(self) -> bool:
        """True if a needle is a separate line instead of a sentence."""
        return self.statement in templates(self.split)["needles"]["records"]

    def state(self, key: str, value: str) -> str:
        """Returns a needle."""
        return fill(self.statement, key=key, value=value, **self._nouns)

    def introduce(self, rng: random.Random, num_values: int) -> str:
        """Returns an introduction to a text with `num_values` requested values."""
        options = templates(self.split)["needles"]["introductions"][_number(num_values)]
        return fill(pick(options, rng), kind=self.kind, **self._nouns)

    def ask(self, rng: random.Random, keys: Sequence[str], values: Sequence[str]) -> Question:
        """Returns a question for all values of some keys, in the order of the answer."""
        drawn, number = templates(self.split)["needles"], _number(len(values))
        return pose(
            pick(drawn["questions"][number], rng),
            pick(drawn["openings"][number], rng),
            join(values, pick(drawn["joins"], rng)),
            key=listed(keys),
            **self._nouns,
        )

    @property
    def _nouns(self) -> dict[str, str]:
        return {"noun": self.noun, "Noun": self.noun[0].upper() + self.noun[1:]}


@dataclass(frozen=True)
class ChainWording:
    """Wording of the assignments and questions of one sequence.

    Attributes:
        split: split of the templates.
        statement: template of an assignment.
    """

    split: Split
    statement: str

    @classmethod
    def draw(cls, rng: random.Random, split: Split) -> ChainWording:
        """Draws a wording of the split."""
        return cls(split, _statement(templates(split)["chains"], rng))

    @property
    def is_record(self) -> bool:
        """True if an assignment is a separate line instead of a sentence."""
        return self.statement in templates(self.split)["chains"]["records"]

    def assign(self, name: str, value: str) -> str:
        """Returns an assignment of a value."""
        return fill(self.statement, name=name, source=value)

    def copy(self, name: str, source: str) -> str:
        """Returns an assignment of another variable."""
        [reference] = templates(self.split)["chains"]["references"]
        return self.assign(name, fill(reference, name=source))

    def introduce(self, rng: random.Random) -> str:
        """Returns an introduction to a text with assignments."""
        return str(pick(templates(self.split)["chains"]["introductions"], rng))

    def ask(self, rng: random.Random, value: str, names: Sequence[str]) -> Question:
        """Returns a question for all variables of a value."""
        drawn = templates(self.split)["chains"]
        return pose(
            pick(drawn["questions"], rng),
            pick(drawn["openings"], rng),
            join(names, pick(drawn["joins"], rng)),
            value=value,
            count=len(names),
        )


@dataclass(frozen=True)
class CountingWording:
    """Wording of a list of words and of the question for the most frequent ones.

    Attributes:
        introduction: template of the text before the words.
        layout: template of an entry, and the text between entries.
        question: template of the question.
        opening: template of the opening words of the answer.
        answer_layout: layout of the answer.
    """

    introduction: str
    layout: Sequence[str]
    question: str
    opening: str
    answer_layout: Sequence[str]

    @classmethod
    def draw(
        cls, rng: random.Random, split: Split, kind: Literal["lists", "code_words"]
    ) -> CountingWording:
        """Draws a wording of the split."""
        drawn = templates(split)[kind]
        parts = ("introductions", "layouts", "questions", "openings", "answers")
        return cls(*(pick(drawn[part], rng) for part in parts))

    def introduce(self, num_asked: int) -> str:
        """Returns an introduction to words of which `num_asked` are requested."""
        return fill(self.introduction, count=num_asked)

    def text(self, words: Sequence[str], num_asked: int) -> str:
        """Returns the words after their introduction."""
        return f"{self.introduce(num_asked)}\n\n{lay_out(words, self.layout)}"

    def ask(self, words: Sequence[str]) -> Question:
        """Returns a question for the most frequent words."""
        answer = lay_out(words, self.answer_layout)
        return pose(self.question, self.opening, answer, count=len(words))


def filler_sentences(rng: random.Random, num_sentences: int) -> list[str]:
    """Returns distinct irrelevant sentences for haystacks of training."""
    parts = templates("train")["filler"]
    subjects, predicates = parts["subjects"], parts["predicates"]
    drawn = rng.sample(range(len(subjects) * len(predicates)), num_sentences)
    return [
        f"{subjects[number // len(predicates)]} {predicates[number % len(predicates)]}."
        for number in drawn
    ]


def listed(keys: Sequence[str]) -> str:
    """Formats one key, or several as "a, b, and c"."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def _statement(drawn: dict[str, Any], rng: random.Random) -> str:
    """Draws the template of a sentence or a record."""
    return str(pick([*drawn["sentences"], *drawn["records"]], rng))


def _number(num_values: int) -> str:
    return "one" if num_values == 1 else "several"
