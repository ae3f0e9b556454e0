"""Wordings of the synthetic tasks: many for training, drawn at random, and those of the benchmarks.

Both are plain data, `training_wordings.json` and `benchmark_wordings.json`, and share no six words in
a row. A benchmark has one wording of each kind, for which nothing is drawn.
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
    """Every template of a split by kind of task, as in its file."""
    text = resources.files("rtpurbo.data").joinpath(_FILES[split]).read_text("utf-8")
    return dict(json.loads(text))


def pick(options: Sequence[T], rng: random.Random) -> T:
    """One of the options; a single one leaves the random generator as it is."""
    return options[0] if len(options) == 1 else rng.choice(options)


def fill(template: str, **values: object) -> str:
    """A template with values for its fields in braces; other braces stay, as in JSON."""
    return _FIELD.sub(lambda field: str(values.get(field[1], field[0])), template)


def join(values: Sequence[str], separators: Sequence[str]) -> str:
    """Values with the first separator between them, and the second before the last."""
    between, before_last = separators
    if len(values) == 1:
        return values[0]
    return f"{between.join(values[:-1])}{before_last}{values[-1]}"


def lay_out(words: Sequence[str], layout: Sequence[str]) -> str:
    """Words as entries of a list: the template of an entry, and what stands between entries."""
    entry, between = layout
    return between.join(
        fill(entry, number=number, word=word) for number, word in enumerate(words, 1)
    )


def pose(question: str, opening: str, answer: str, /, **values: object) -> Question:
    """A question from its templates; an answer without opening words begins without a space."""
    opening = fill(opening, **values)
    return Question(fill(question, **values), opening, f" {answer}" if opening else answer)


@dataclass(frozen=True)
class NeedleWording:
    """The way in which one sequence states the values of keys and asks for them.

    Attributes:
        split: whose templates they are.
        kind: of the values, "number" or "uuid".
        statement: the template of a needle.
        noun: the name of the values.
    """

    split: Split
    kind: str
    statement: str
    noun: str

    @classmethod
    def draw(cls, rng: random.Random, split: Split, kind: str = "number") -> NeedleWording:
        """A random wording of the split."""
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
        """True if a needle takes a line of its own instead of being a sentence."""
        return self.statement in templates(self.split)["needles"]["records"]

    def state(self, key: str, value: str) -> str:
        """A needle."""
        return fill(self.statement, key=key, value=value, **self._nouns)

    def introduce(self, rng: random.Random, num_values: int) -> str:
        """An introduction to a text of which so many values are asked."""
        options = templates(self.split)["needles"]["introductions"][_number(num_values)]
        return fill(pick(options, rng), kind=self.kind, **self._nouns)

    def ask(self, rng: random.Random, keys: Sequence[str], values: Sequence[str]) -> Question:
        """A question for all values of some keys, in the order of the answer."""
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
    """The way in which one sequence assigns variables and asks for those that hold a value.

    Attributes:
        split: whose templates they are.
        statement: the template of an assignment.
    """

    split: Split
    statement: str

    @classmethod
    def draw(cls, rng: random.Random, split: Split) -> ChainWording:
        """A random wording of the split."""
        return cls(split, _statement(templates(split)["chains"], rng))

    @property
    def is_record(self) -> bool:
        """True if an assignment takes a line of its own instead of being a sentence."""
        return self.statement in templates(self.split)["chains"]["records"]

    def assign(self, name: str, value: str) -> str:
        """An assignment of a value."""
        return fill(self.statement, name=name, source=value)

    def copy(self, name: str, source: str) -> str:
        """An assignment of another variable."""
        [reference] = templates(self.split)["chains"]["references"]
        return self.assign(name, fill(reference, name=source))

    def introduce(self, rng: random.Random) -> str:
        """An introduction to a text with assignments."""
        return str(pick(templates(self.split)["chains"]["introductions"], rng))

    def ask(self, rng: random.Random, value: str, names: Sequence[str]) -> Question:
        """A question for all variables that hold a value."""
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
    """The way in which one sequence lists words and asks for the most frequent ones.

    Attributes:
        introduction: template of what comes before the words.
        layout: of the words: the template of an entry, and what stands between entries.
        question: template of the question.
        opening: template of the opening words of the answer.
        answer_layout: of the answer.
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
        """A random wording of the split."""
        drawn = templates(split)[kind]
        parts = ("introductions", "layouts", "questions", "openings", "answers")
        return cls(*(pick(drawn[part], rng) for part in parts))

    def introduce(self, num_asked: int) -> str:
        """An introduction to words of which so many are asked."""
        return fill(self.introduction, count=num_asked)

    def text(self, words: Sequence[str], num_asked: int) -> str:
        """The words under their introduction."""
        return f"{self.introduce(num_asked)}\n\n{lay_out(words, self.layout)}"

    def ask(self, words: Sequence[str]) -> Question:
        """A question for the most frequent words, of which there are several."""
        answer = lay_out(words, self.answer_layout)
        return pose(self.question, self.opening, answer, count=len(words))


def filler_sentences(rng: random.Random, num_sentences: int) -> list[str]:
    """Different sentences that say nothing of interest, for haystacks of training."""
    parts = templates("train")["filler"]
    subjects, predicates = parts["subjects"], parts["predicates"]
    drawn = rng.sample(range(len(subjects) * len(predicates)), num_sentences)
    return [
        f"{subjects[number // len(predicates)]} {predicates[number % len(predicates)]}."
        for number in drawn
    ]


def listed(keys: Sequence[str]) -> str:
    """One key, or several as in "a, b, and c"."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def _statement(drawn: dict[str, Any], rng: random.Random) -> str:
    """A sentence or a record."""
    return str(pick([*drawn["sentences"], *drawn["records"]], rng))


def _number(num_values: int) -> str:
    return "one" if num_values == 1 else "several"
