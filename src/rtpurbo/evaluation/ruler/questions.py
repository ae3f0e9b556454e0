"""Questions about passages: built in, or from files in SQuAD's and HotpotQA's formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError


@dataclass(frozen=True)
class PassageQuestion:
    """Question that passages of its set answer.

    Attributes:
        question: text of the question.
        answers: correct answers, which are synonyms.
        gold: numbers of the passages that answer it.
        related: numbers of the most similar other passages.
    """

    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions and the passages they are about.

    Attributes:
        name: source of the questions.
        passages: distinct texts.
        questions: at least one question.
    """

    name: str
    passages: tuple[str, ...]
    questions: tuple[PassageQuestion, ...]


def built_in_questions(kind: Literal["single_hop", "two_hop"]) -> QuestionSet:
    """Returns built-in questions about invented places and people, which no model knows."""
    text = resources.files(__package__).joinpath("passages.json").read_text(encoding="utf-8")
    data = json.loads(text)
    passages = [f"{passage['title']}\n{passage['text']}" for passage in data["passages"]]
    number = {passage["title"]: place for place, passage in enumerate(data["passages"])}
    if kind == "single_hop":
        asked = [(passage, [passage["title"]]) for passage in data["passages"]]
    else:
        asked = [(question, question["titles"]) for question in data["two_hop"]]
    questions = [
        PassageQuestion(
            question["question"],
            tuple(question["answers"]),
            tuple(number[title] for title in titles),
        )
        for question, titles in asked
    ]
    return QuestionSet("rtpurbo", tuple(passages), tuple(questions))


def read_squad(path: str | Path) -> QuestionSet:
    """Reads SQuAD's JSON, version 1.1 or 2.0, without the questions that have no answer.

    Other paragraphs of an article are related to its questions.
    """
    return _read(path, "SQuAD's format", _squad_questions)


def read_hotpotqa(path: str | Path) -> QuestionSet:
    """Reads HotpotQA's JSON of the distractor setting.

    Passages named by the supporting facts are gold, the others of a question related.
    """
    return _read(path, "HotpotQA's distractor format", _hotpotqa_questions)


_Numbering = Callable[[str], int]
"""Returns the number of a passage, which a new one gets."""


def _read(
    path: str | Path,
    expected: str,
    questions_of: Callable[[Any, _Numbering], Iterable[PassageQuestion]],
) -> QuestionSet:
    path = Path(path).expanduser()
    if not path.is_file():
        raise RTPurboError(f"there is no file of questions {path}; check the path.")
    passages: dict[str, int] = {}
    try:
        data = strict_json.read(path)
        asked = questions_of(data, lambda text: passages.setdefault(text, len(passages)))
        questions = [item for item in asked if item.answers]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RTPurboError(f"{path} is not in {expected}; choose another file.") from error
    if not questions:
        raise RTPurboError(f"{path} has no question with an answer; choose another file.")
    return QuestionSet(path.name, tuple(passages), tuple(questions))


def _squad_questions(data: Any, number_of: _Numbering) -> Iterable[PassageQuestion]:
    for article in data["data"]:
        numbers = [number_of(paragraph["context"]) for paragraph in article["paragraphs"]]
        for number, paragraph in zip(numbers, article["paragraphs"], strict=True):
            related = tuple(other for other in dict.fromkeys(numbers) if other != number)
            for asked in paragraph["qas"]:
                answers = dict.fromkeys(answer["text"] for answer in asked["answers"])
                if not asked.get("is_impossible", False):
                    yield PassageQuestion(asked["question"], tuple(answers), (number,), related)


def _hotpotqa_questions(data: Any, number_of: _Numbering) -> Iterable[PassageQuestion]:
    for asked in data:
        numbers = {
            title: number_of(f"{title}\n{''.join(sentences)}")
            for title, sentences in asked["context"]
        }
        facts = {title for title, *_ in asked.get("supporting_facts", [])} & set(numbers)
        gold = [number for title, number in numbers.items() if title in (facts or numbers)]
        related = [number for number in numbers.values() if number not in gold]
        yield PassageQuestion(asked["question"], (asked["answer"],), tuple(gold), tuple(related))
