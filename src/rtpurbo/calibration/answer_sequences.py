"""Sequences of calibration on answers: long-range tasks with several questions each, and some prose."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rtpurbo.data.long_range import MAX_QUESTIONS, PROSE, LongRangeMix
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.reading import reading_example
from rtpurbo.data.texts import Prose
from rtpurbo.errors import RTPurboError
from rtpurbo.training.sequences import kind_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {
    "needles": 0.25,
    "variables": 0.25,
    "reading": 0.25,
    "passage": 0.1,
    "counting": 0.1,
    "prose": 0.05,
}
"""Default shares of the kinds of sequences."""

CANDIDATES = {"needles": 3, "variables": 3, "reading": 3}
"""Draws of each sequence of a kind, of which the one with the most questions is taken."""

TEXT_LABELS = 256
"""Target positions outside of answers."""


class Sequences(Protocol):
    """Source of sequences."""

    def sequence(self, number: int) -> Conversation:
        """Sequence `number`, with the spans of its answers."""


@dataclass(frozen=True)
class AnswerSequences:
    """Draws sequences by number; several questions about one text cost no more than one.

    Attributes:
        tokenizer: the model's.
        corpus: prose.
        lengths: tokens of a sequence; sequences take them in turn.
        seed: of everything.
        shares: share of each kind.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Prose
    lengths: tuple[int, ...]
    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)

    def sequence(self, number: int) -> Conversation:
        """Sequence `number`; prose if its kind does not fit the length.

        Raises:
            RTPurboError: the corpus is too short.
        """
        rng = random.Random(f"gates-{self.seed}-{number}")
        length = self.lengths[number % len(self.lengths)]
        kind = kind_at(number, self.shares)
        with suppress(RTPurboError):
            drawn = [self._draw(kind, length, rng) for _ in range(CANDIDATES.get(kind, 1))]
            return max(drawn, key=lambda conversation: len(conversation.answer_spans))
        return self._draw(PROSE, length, rng)

    def _draw(self, kind: str, length: int, rng: random.Random) -> Conversation:
        if kind == "reading":
            return reading_example(self.tokenizer, self.corpus, length, rng, MAX_QUESTIONS)
        drawn: Conversation = getattr(LongRangeMix(self.tokenizer, self.corpus), kind)(length, rng)
        # A passage at the end of a short text has nothing after it, so that its answer is empty.
        answers = [(first, end) for first, end in drawn.answer_spans if first < end]
        return Conversation(drawn.input_ids, answers)


def answer_positions(conversation: Conversation) -> list[int]:
    """Positions whose logits predict the tokens of the answers."""
    return [place - 1 for span in conversation.answer_spans for place in range(*span)]


def target_positions(conversation: Conversation, seed: str) -> tuple[Tensor, Tensor]:
    """Positions whose logits predict every token of the answers and some of the text before them.

    Args:
        conversation: at least two tokens.
        seed: of the choice of text.

    Returns:
        int64 [labels], ascending in text and answers each, and bool [labels], true for answer tokens.
    """
    answers = answer_positions(conversation)
    end = min(answers, default=len(conversation) - 1)
    text = sorted(random.Random(seed).sample(range(end), min(end, TEXT_LABELS)))
    is_answer = torch.tensor([False] * len(text) + [True] * len(answers))
    return torch.tensor([*text, *answers]), is_answer
