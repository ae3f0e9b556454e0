"""MMLU-Pro: multiple-choice questions of 14 subjects with up to ten options.

Zero-shot with a short chain of thought with the chat template, one-shot without one. The last
letter that the model marks as its answer counts; an answer without a letter is wrong.
"""

from __future__ import annotations

import re

from rtpurbo.evaluation.questions.suite import Prompt, QuestionSuite, Row

MAX_NEW_TOKENS = 512
LETTERS = "ABCDEFGHIJ"

_INSTRUCTION = (
    "Answer the multiple-choice question below. Reason in at most a few sentences, then finish with "
    'a line of the form "Answer: X", where X is the letter of the best option.'
)
_SHOT = (
    "Question: Which of these units measures electrical resistance?\n"
    "A. volt\nB. ampere\nC. ohm\nD. watt\n"
    "Reasoning: Volts measure potential difference, amperes current and watts power. Resistance "
    "is measured in ohms.\nAnswer: C\n\n"
)

_LETTER = r"[\s*_`(\[{$\\]*(?:\\?(?:boxed|text|textbf)\{)*\(?([A-J])(?![A-Za-z])"
_MARKED = re.compile(
    rf"(?:(?i:answer|option|choice)(?:\s+(?i:is))?\s*[*_]*:?|\\boxed\{{(?:\\text\{{)?){_LETTER}"
)
_ALONE = re.compile(r"^[\s*(]*([A-J])(?:[*).:]|[ \t]*$)", re.MULTILINE)


def extract_letter(generated: str, options: int = len(LETTERS)) -> str | None:
    """Returns the letter of the chosen option; None if there is none among so many options."""
    text = generated.split("\nQuestion:")[0]
    found = _MARKED.findall(text) or _ALONE.findall(text)
    valid = [letter for letter in found if letter in LETTERS[:options]]
    return valid[-1] if valid else None


def _question(row: Row) -> str:
    options = "\n".join(
        f"{letter}. {text}" for letter, text in zip(LETTERS, row["options"], strict=False)
    )
    return f"{row['question'].strip()}\n{options}"


def _prompt(row: Row) -> Prompt:
    question = _question(row)
    return Prompt(f"{_INSTRUCTION}\n\n{question}", f"{_SHOT}Question: {question}\nReasoning:")


def _is_correct(row: Row, generated: str) -> bool:
    return extract_letter(generated, len(row["options"])) == row["answer"]


SUITE = QuestionSuite(
    "mmlu_pro",
    {"question": str, "options": list, "answer": str},
    MAX_NEW_TOKENS,
    _prompt,
    lambda row: (row["answer"],),
    _is_correct,
)
