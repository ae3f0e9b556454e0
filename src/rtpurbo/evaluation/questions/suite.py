"""Definition of a question suite: prompts, answer extraction and scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rtpurbo.evaluation.questions.files import Row


@dataclass(frozen=True)
class Prompt:
    """Question for models with and without a chat template.

    Attributes:
        message: user message, for models with a chat template.
        text: few-shot text that a model without a chat template continues.
    """

    message: str
    text: str


@dataclass(frozen=True)
class QuestionSuite:
    """Benchmark of independent short questions with generated answers.

    Attributes:
        name: as in `--suite`.
        columns: the columns that a row must have, with their types.
        max_new_tokens: the default limit of an answer.
        prompt: renders a row.
        answers: the reference answers of a row, as kept in the sample records.
        is_correct: scores an answer to a row; called once for each answer, possibly from several threads.
        runs_code: scoring executes generated code, so `--run-code` is required.
    """

    name: str
    columns: Mapping[str, type]
    max_new_tokens: int
    prompt: Callable[[Row], Prompt]
    answers: Callable[[Row], tuple[str, ...]]
    is_correct: Callable[[Row, str], bool]
    runs_code: bool = False
