r"""MATH: competition problems whose answers are expressions in LaTeX.

Zero-shot with the chat template, two-shot without one. The last `\boxed{}` of the answer is compared
with the reference after normalisation of notation; equal numbers match in any notation. There is no
computer algebra: an equivalent expression in another form counts as wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rtpurbo.evaluation.questions.suite import Prompt, QuestionSuite, Row

MAX_NEW_TOKENS = 800

_INSTRUCTION = (
    "Solve the following problem. Show the main steps and put nothing but the final answer, fully "
    "simplified, into \\boxed{}."
)
_SHOTS = (
    (
        "Find the sum of the roots of $x^2 - 7x + 10 = 0$.",
        "The roots are 2 and 5, since $(x-2)(x-5) = x^2 - 7x + 10$. Their sum is $\\boxed{7}$.",
    ),
    (
        "A fair die is rolled twice. What is the probability that both rolls are even?",
        "Each roll is even with probability $\\frac{1}{2}$, so both are with probability "
        "$\\frac{1}{2} \\cdot \\frac{1}{2} = \\boxed{\\frac{1}{4}}$.",
    ),
)

_DROPPED = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|,|;|!|:|quad|qquad| )|\\\$|\$|\\%|%|~"
    r"|\^\{?\\circ\}?|\\(?:degree|circ)(?![a-z])"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=\d)\s*(?:square\s+)?(?:units?|cm|mm|km|m|inch(?:es)?|in|feet|ft|degrees?|dollars?|cents?"
    r"|hours?|minutes?|seconds?|mph|miles?)(?:\s*\^\{?[23]\}?)?\s*$"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])")
_MIXED_FRACTION = re.compile(r"\\frac\{([^{}]+)\}\s*([0-9a-zA-Z])(?![^{]*\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_ONE_NUMBER = re.compile(r"\s*-?\d{1,3}(?:,\d{3})+(?:\.\d+)?\s*")
_PLAIN_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(\d+)")


def extract_boxed(generated: str) -> str | None:
    r"""Returns the content of the last `\boxed{}`, with balanced braces; None if there is none."""
    text = generated.split("\nProblem:")[0]
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def normalise(answer: str) -> str:
    """Returns an answer in one notation: no spaces, units, sizes of brackets or text commands."""
    text = answer.strip().rstrip(".").replace("\\ ", " ")
    text = re.sub(r"\\(?:dfrac|tfrac|cfrac)", r"\\frac", text)
    text = _DROPPED.sub("", text)
    text = _TEXT.sub(r"\1", text)
    text = text.replace("\\{", "{").replace("\\}", "}") if "\\{" not in answer else text
    text = _UNIT.sub("", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _MIXED_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    # "x = 5" is equivalent to "5".
    if re.match(r"^\s*[a-zA-Z]\s*=[^=]*$", text):
        text = text.partition("=")[2]
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if _ONE_NUMBER.fullmatch(text) else text
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"_\{(\w)\}", r"_\1", text)
    text = re.sub(r"\^\{(\w)\}", r"^\1", text)
    # Words, and letters of choices such as "(B)".
    return text.strip("()").lower() if re.fullmatch(r"\(?[A-Za-z]+\)?", text) else text


def is_equivalent(given: str, expected: str) -> bool:
    """Returns True if two answers agree after normalisation, or are equal numbers."""
    one, other = normalise(given), normalise(expected)
    value = _number(one)
    return one == other or (value is not None and value == _number(other))


def _number(text: str) -> Fraction | None:
    """Returns the exact value of an integer, a decimal or a fraction of integers."""
    try:
        if match := _PLAIN_FRACTION.fullmatch(text):
            sign, top, bottom, plain_top, plain_bottom = match.groups()
            value = Fraction(int(top or plain_top), int(bottom or plain_bottom))
            return -value if sign else value
        return Fraction(text) if re.fullmatch(r"[+-]?\d*\.?\d+", text) else None
    except (ValueError, ZeroDivisionError):
        return None


def _prompt(row: Row) -> Prompt:
    shots = "".join(f"Problem: {asked}\nSolution: {answer}\n\n" for asked, answer in _SHOTS)
    problem = row["problem"].strip()
    return Prompt(f"{_INSTRUCTION}\n\n{problem}", f"{shots}Problem: {problem}\nSolution:")


def _is_correct(row: Row, generated: str) -> bool:
    given = extract_boxed(generated)
    return given is not None and is_equivalent(given, row["answer"])


SUITE = QuestionSuite(
    "math",
    {"problem": str, "answer": str},
    MAX_NEW_TOKENS,
    _prompt,
    lambda row: (row["answer"],),
    _is_correct,
)
