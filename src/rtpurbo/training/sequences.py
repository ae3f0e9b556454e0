"""What is trained on: prose and synthetic retrieval tasks, the same at every step of every run with a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rtpurbo.data.needles import make_retrieval_example
from rtpurbo.data.texts import TextCorpus, begin_ids

TOKENS_PER_NEEDLE = 128
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class TrainingSequence:
    """Tokens, of which the last `num_answer_tokens` answer a question about the rest (0 for prose)."""

    input_ids: list[int]
    num_answer_tokens: int = 0


@dataclass(frozen=True)
class TrainingMix:
    """Draws sequences by number: nothing to store, and a resumed run meets the same ones.

    Attributes:
        tokenizer: the model's.
        corpus: prose.
        lengths: tokens of a sequence; sequences take them in turn.
        needle_share: share of sequences with needles (1 to 8 keys, 1 to 4 values) and a question.
        seed: of everything.
        purpose: sequences of different purposes differ.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: TextCorpus
    lengths: tuple[int, ...]
    needle_share: float
    seed: int
    purpose: str

    def sequence(self, number: int) -> TrainingSequence:
        """Sequence `number` of this mix."""
        rng = random.Random(f"{self.purpose}-{self.seed}-{number}")
        length = self.lengths[number % len(self.lengths)]
        # Multiples of the golden ratio spread the kinds evenly over a short run, over every length.
        has_needles = (number + 1) * GOLDEN_RATIO % 1 < self.needle_share
        if not has_needles:
            start = begin_ids(self.tokenizer)
            prose = self.corpus.sample_tokens(self.tokenizer, length - len(start), rng)
            return TrainingSequence([*start, *prose])
        # Needles must not crowd out the prose that they hide in.
        fitting = [count for count in (1, 2, 4, 8) if count * TOKENS_PER_NEEDLE <= length]
        example = make_retrieval_example(
            self.tokenizer,
            self.corpus,
            length,
            rng,
            num_keys=rng.choice(fitting),
            num_values=rng.choice([1, 1, *(count for count in fitting if count <= 4)]),
            split="train",
        )
        return TrainingSequence([*example.prompt_ids, *example.answer_ids], len(example.answer_ids))
