"""RULER's metric: which of the expected strings stand in what the model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def answer_score(generated: str, answers: Sequence[str], any_answer: bool) -> float:
    """From 0 to 1: the share of the answers that were given, or whether any was.

    Args:
        generated: what the model wrote.
        answers: strings to find, in upper or lower case.
        any_answer: one is enough.
    """
    text = _CONTROL_CHARACTERS.sub("\n", generated).lower()
    found = sum(answer.lower() in text for answer in answers)
    return float(found > 0) if any_answer else found / len(answers)
