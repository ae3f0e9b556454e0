"""Definition of a question suite: files, prompts, answer extraction and scoring."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError

Row = Mapping[str, Any]
"""Question: the columns of a line."""


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


def read_rows(suite: str, path: str | Path, columns: Mapping[str, type]) -> list[Row]:
    """Reads the questions of a suite.

    Args:
        suite: name of the suite, for error messages.
        path: a `.jsonl` or `.jsonl.gz` file.
        columns: the columns that every line must have, with the type of their values.

    Returns:
        At least one row, in the order of the file.

    Raises:
        RTPurboError: the file is missing, empty or of another kind, or a line is malformed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RTPurboError(f"there is no file {path} with questions of {suite}; check the path.")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise RTPurboError(
            f"the questions of {suite} come from a .jsonl or .jsonl.gz file, which {path} is not."
        )
    rows = []
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(line, f"line {number} of {path}", suite, columns))
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise RTPurboError(f"cannot read the questions of {suite} in {path}: {error}.") from error
    if not rows:
        raise RTPurboError(f"{path} has no questions of {suite}; choose another file.")
    return rows


def _row(line: str, place: str, suite: str, columns: Mapping[str, type]) -> Row:
    try:
        row = strict_json.parse(line)
    except ValueError as error:
        raise RTPurboError(f"{place} is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise RTPurboError(f"{place} is not a JSON object with the columns of {suite}.")
    for name, kind in columns.items():
        if not isinstance(row.get(name), kind):
            raise RTPurboError(
                f"{place} has no column '{name}' of type {kind.__name__}, which questions of "
                f"{suite} need (their columns: {', '.join(columns)})."
            )
    return row
