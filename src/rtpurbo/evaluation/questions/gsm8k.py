"""GSM8K: grade-school word problems with one number as the answer.

Zero-shot with the chat template, four-shot without one. The last number that the model marks as its
answer is compared by value.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from rtpurbo.evaluation.questions.suite import Prompt, QuestionSuite, Row

MAX_NEW_TOKENS = 400

_INSTRUCTION = (
    "Work out the following problem step by step, briefly. On the last line write #### and then "
    "the final answer as a plain number without a unit."
)

_SHOTS = (
    (
        "A baker fills 6 trays with 8 rolls each and sells 29 rolls. How many rolls are left?",
        "There are 6 * 8 = 48 rolls. After selling 29, 48 - 29 = 19 are left.\n#### 19",
    ),
    (
        "A train ticket costs $14 and children pay half. What do 2 adults and 3 children pay?",
        "Two adults pay 2 * 14 = $28. A child pays 14 / 2 = $7, so three pay 3 * 7 = $21. "
        "Together they pay 28 + 21 = $49.\n#### 49",
    ),
    (
        "Nora reads 15 pages a day. Her book has 180 pages and she has read 45 of them. How many "
        "more days does she need?",
        "180 - 45 = 135 pages remain. At 15 pages a day she needs 135 / 15 = 9 days.\n#### 9",
    ),
    (
        "A tank holds 250 litres. It is 60% full, and then 35 litres are drawn. How much is in it?",
        "60% of 250 is 0.6 * 250 = 150 litres. After drawing 35, 150 - 35 = 115 remain.\n#### 115",
    ),
)

# A minus sign after a digit or a bracket is an operator.
_NUMBER = r"(?:(?<![\w)])-)?\$?\s?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBERS = re.compile(_NUMBER)
_MARKERS = (r"####\s*", r"\\boxed\{", r"answer(?:\s+is)?\s*:?\s*")


def extract_number(generated: str) -> Decimal | None:
    r"""Returns the number that an answer states; None if it states none.

    The last number after `####` counts, else the last one in `\boxed{}`, else the last one after
    "answer is", else the last one of the text.
    """
    text = generated.split("\nQuestion:")[0]
    for marker in _MARKERS:
        marked = re.findall(rf"(?i){marker}[^\d\n-]{{0,12}}({_NUMBER})", text)
        if marked:
            return _value(marked[-1])
    found = _NUMBERS.findall(text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[,$\s]", "", number))
    except InvalidOperation:
        return None


def _prompt(row: Row) -> Prompt:
    shots = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in _SHOTS)
    question = row["question"].strip()
    return Prompt(f"{_INSTRUCTION}\n\n{question}", f"{shots}Question: {question}\nAnswer:")


def _answers(row: Row) -> tuple[str, ...]:
    return (row["answer"].rpartition("####")[2].strip(),)


def _is_correct(row: Row, generated: str) -> bool:
    [expected] = _answers(row)
    given = extract_number(generated)
    return given is not None and given == _value(expected)


SUITE = QuestionSuite(
    "gsm8k",
    {"question": str, "answer": str},
    MAX_NEW_TOKENS,
    _prompt,
    _answers,
    _is_correct,
)
