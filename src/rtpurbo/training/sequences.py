"""Training sequences: prose and synthetic retrieval tasks, the same at every step of every run with a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from rtpurbo.data.long_range import LISTED_SHARE, NEEDLES, NOISE, PROSE, LongRangeMix
from rtpurbo.data.needles import make_retrieval_example
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.reading import reading_example
from rtpurbo.data.texts import Prose
from rtpurbo.data.variables import make_variable_example
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import SequenceSettings

if TYPE_CHECKING:
    from rtpurbo.training.pools import Pools

TOKENS_PER_NEEDLE = 128
TOKENS_PER_CHAIN = 512
GOLDEN_RATIO = 0.6180339887498949

POOLED = ("documents", "conversations")
"""Kinds of sequences that the model wrote before training."""


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
        variable_share: share of sequences with chains of variables (1 to 4, of up to 4 hops) and a
            question about one.
        passage_share: share of sequences that quote a passage of their prose, which must be
            continued.
        haystack_share: share of sequences that hide needles or chains in dull repeated sentences,
            needles among other needles, or needles in prose of which several keys' are asked for at
            once.
        counting_share: share of sequences that ask which words of a list or a text come up most often.
        reading_share: share of sequences that ask a plain question about one or two of many paragraphs.
        document_share: share of sequences from the pool of documents.
        conversation_share: share of sequences from the pool of conversations; these have lengths of
            their own, most of them short.
        pools: sequences that the model wrote; each pool is used up before any of it comes again.

    Raises:
        RTPurboError: a pool with a share is empty.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Prose
    lengths: tuple[int, ...]
    needle_share: float
    seed: int
    purpose: str
    variable_share: float = 0.0
    passage_share: float = 0.0
    haystack_share: float = 0.0
    counting_share: float = 0.0
    reading_share: float = 0.0
    document_share: float = 0.0
    conversation_share: float = 0.0
    pools: Pools | None = None

    def __post_init__(self) -> None:
        for name in POOLED:
            if self._shares()[name] and not self._pool(name):
                raise RTPurboError(
                    f"the training mix has a share of {name} that the model writes, but none are "
                    f"written: write them before training, or set {name[:-1]}_share to 0."
                )

    @classmethod
    def of(
        cls,
        settings: SequenceSettings,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Prose,
        seed: int,
        purpose: str,
        pools: Pools | None = None,
    ) -> TrainingMix:
        """The mix that a stage's settings ask for."""
        return cls(
            tokenizer,
            corpus,
            settings.lengths,
            seed=seed,
            purpose=purpose,
            pools=pools,
            **settings.shares(),
        )

    def sequence(self, number: int) -> TrainingSequence:
        """Sequence `number` of this mix; without any share left for a task, it is prose."""
        kind = self._kind_at(number)
        if kind in POOLED:
            # Each pool is used up before any of it comes again.
            return self.of_kind(kind, sum(self._kind_at(each) == kind for each in range(number)))
        return self.of_kind(kind, number)

    def kinds(self) -> list[str]:
        """The kinds of sequences that have a share, prose with what is left among them."""
        shares = self._shares()
        kinds = [kind for kind, share in shares.items() if share]
        return kinds if sum(shares.values()) > 1 - 1e-9 else [*kinds, PROSE]

    def of_kind(self, kind: str, number: int) -> TrainingSequence:
        """Sequence `number` of one kind, a name of `kinds`; prose if the kind does not fit the length.

        Raises:
            RTPurboError: the corpus is too short.
        """
        if kind in POOLED:
            pool = self._pool(kind)
            return pool[number % len(pool)]
        rng = random.Random(f"{self.purpose}-{self.seed}-{number}")
        length = self.lengths[number % len(self.lengths)]
        if kind != PROSE:
            # Default shares serve contexts of any length, and a short one has no room for some tasks.
            with suppress(RTPurboError):
                return getattr(self, f"_{kind}")(length, rng)
        return TrainingSequence(self._long_range.prose(length, rng).input_ids)

    def _shares(self) -> dict[str, float]:
        """Shares by kind, in the order in which they divide the numbers from 0 to 1."""
        return {
            "needles": self.needle_share,
            "variables": self.variable_share,
            "passage": self.passage_share,
            "haystack": self.haystack_share,
            "counting": self.counting_share,
            "reading": self.reading_share,
            "documents": self.document_share,
            "conversations": self.conversation_share,
        }

    def _kind_at(self, number: int) -> str:
        return kind_at(number, self._shares())

    def _pool(self, name: str) -> Sequence[TrainingSequence]:
        return getattr(self.pools, name, ())

    def _needles(self, length: int, rng: random.Random) -> TrainingSequence:
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

    def _variables(self, length: int, rng: random.Random) -> TrainingSequence:
        room = max(1, length // TOKENS_PER_CHAIN)
        example = make_variable_example(
            self.tokenizer,
            self.corpus,
            length,
            rng,
            num_hops=rng.choice((1, 2, 3, 4)),
            num_chains=rng.choice([count for count in (1, 2, 4) if count <= room]),
            split="train",
        )
        return TrainingSequence([*example.prompt_ids, *example.answer_ids], len(example.answer_ids))

    @property
    def _long_range(self) -> LongRangeMix:
        return LongRangeMix(self.tokenizer, self.corpus)

    def _passage(self, length: int, rng: random.Random) -> TrainingSequence:
        return _with_answer(self._long_range.passage(length, rng))

    def _haystack(self, length: int, rng: random.Random) -> TrainingSequence:
        mix = self._long_range
        haystack = rng.choice((NOISE, NEEDLES, PROSE))
        if haystack == NOISE and rng.random() < 0.5:
            return _with_answer(mix.variables(length, rng, haystack, most_questions=1))
        # One key's needles in prose come by a share of their own.
        listed_share = 1.0 if haystack == PROSE else LISTED_SHARE
        return _with_answer(mix.needles(length, rng, haystack, 1, listed_share))

    def _counting(self, length: int, rng: random.Random) -> TrainingSequence:
        return _with_answer(self._long_range.counting(length, rng))

    def _reading(self, length: int, rng: random.Random) -> TrainingSequence:
        return _with_answer(reading_example(self.tokenizer, self.corpus, length, rng))


def kind_at(number: int, shares: Mapping[str, float]) -> str:
    """The kind of sequence `number`; prose for what is left of the shares.

    Multiples of the golden ratio spread kinds evenly over a short run and every length.

    Args:
        number: of the sequence.
        shares: by kind, in the order in which they divide the numbers from 0 to 1.
    """
    place, begin = (number + 1) * GOLDEN_RATIO % 1, 0.0
    for kind, share in shares.items():
        if place < begin + share:
            return kind
        begin += share
    return PROSE


def _with_answer(conversation: Conversation) -> TrainingSequence:
    [(start, end)] = conversation.answer_spans
    return TrainingSequence(conversation.input_ids, end - start)
