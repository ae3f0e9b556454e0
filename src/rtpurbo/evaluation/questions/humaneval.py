"""HumanEval: Python functions from their docstrings, checked by unit tests (pass@1, greedy).

Models with a chat template are asked for the whole function in a code block; models without one
continue the function's head. The tests run in `rtpurbo.evaluation.questions.sandbox`.
"""

from __future__ import annotations

import re

from rtpurbo.evaluation.questions.sandbox import passes
from rtpurbo.evaluation.questions.suite import Prompt, QuestionSuite, Row

MAX_NEW_TOKENS = 512

_INSTRUCTION = (
    "Implement the Python function below. Reply with one Python code block that holds the complete "
    "function, its signature and all imports that it needs, and nothing else."
)

_BLOCK = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
# A continuation ends before the next statement without indentation.
_END_OF_FUNCTION = re.compile(r"\n(?=[^\s)\]}#])")


def extract_code(generated: str, entry_point: str) -> str | None:
    """Returns the source that defines the function; None if the answer is a continuation."""
    blocks = _BLOCK.findall(generated)
    defining = [block for block in blocks if _defines(block, entry_point)]
    if defining:
        return defining[0]
    if _defines(generated, entry_point):
        return generated
    return None


def program(row: Row, generated: str) -> str:
    """Returns the program that passes if the generated function is right.

    It begins with the prompt, which has imports and helpers that the function may use.
    """
    code = extract_code(generated, row["entry_point"])
    if code is None:
        blocks = _BLOCK.findall(generated)
        body = blocks[0] if blocks else _END_OF_FUNCTION.split(generated, maxsplit=1)[0]
        if body.strip() and not body.lstrip("\n").startswith((" ", "\t")):
            body = "    " + body.lstrip("\n")
        source = row["prompt"].rstrip() + "\n" + body
    else:
        source = row["prompt"].rstrip() + "\n\n\n" + code
    return f"{source}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def _defines(source: str, entry_point: str) -> bool:
    return re.search(rf"^def {re.escape(entry_point)}\b", source, re.MULTILINE) is not None


def _prompt(row: Row) -> Prompt:
    head = row["prompt"].strip()
    return Prompt(f"{_INSTRUCTION}\n\n```python\n{head}\n```", row["prompt"].rstrip() + "\n")


SUITE = QuestionSuite(
    "humaneval",
    {"prompt": str, "entry_point": str, "test": str},
    MAX_NEW_TOKENS,
    _prompt,
    lambda row: (row["entry_point"],),
    lambda row, generated: passes(program(row, generated)),
    runs_code=True,
)
