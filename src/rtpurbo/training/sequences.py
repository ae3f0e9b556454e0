"""Training sequences: prose and tasks in a mixture, drawn by number from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rtpurbo.data.long_range import PROSE, LongRangeMix
from rtpurbo.data.tasks import TASKS
from rtpurbo.data.texts import Prose
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import SequenceSettings

GOLDEN_RATIO = 0.6180339887498949

HELD_OUT = 16
"""Sequences of each pool that are held out from training; half of the pool if it is smaller than twice that."""


@dataclass(frozen=True)
class TrainingSequence:
    """Tokens, of which the last `num_answer_tokens` answer a question about the rest (0 for prose)."""

    input_ids: list[int]
    num_answer_tokens: int = 0


@dataclass(frozen=True)
class Pools:
    """Sequences written before training, by task.

    Attributes:
        conversations: short conversations (`write_conversations`).
        documents: long documents with answers (`write_document_answers`).
    """

    conversations: tuple[TrainingSequence, ...] = ()
    documents: tuple[TrainingSequence, ...] = ()

    def split(self) -> tuple[Pools, Pools]:
        """Returns the pools to train on and the held-out ones, which are the end of each pool."""
        pools = (self.conversations, self.documents)
        cuts = [len(pool) - min(HELD_OUT, len(pool) // 2) for pool in pools]
        return (
            Pools(*(pool[:cut] for pool, cut in zip(pools, cuts, strict=True))),
            Pools(*(pool[cut:] for pool, cut in zip(pools, cuts, strict=True))),
        )


@dataclass(frozen=True)
class TrainingMix:
    """Sequences drawn by number, so that nothing is stored and a resumed run draws the same ones.

    Attributes:
        tokenizer: the model's.
        corpus: prose.
        lengths: tokens of a sequence; sequences cycle through them. Conversations have lengths of their
            own, most of them short.
        mixture: share of each task of `rtpurbo.data.tasks.TASKS`; the rest is prose.
        seed: seed of all randomness.
        purpose: name that makes the sequences of one use differ from those of another.
        pools: sequences written by the dense model; every sequence of a pool is used before one is used
            again.

    Raises:
        RTPurboError: a task has a share, but its pool is empty.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Prose
    lengths: tuple[int, ...]
    mixture: Mapping[str, float]
    seed: int
    purpose: str
    pools: Pools | None = None

    def __post_init__(self) -> None:
        for name, share in self.mixture.items():
            if share and TASKS[name].draw is None and not self._pool(name):
                raise RTPurboError(
                    f"{name} of the training mixture are written by the dense model, but there are none: "
                    f"write them before training, or set mixture.{name} to 0."
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
        """Mix of a stage's settings."""
        return cls(tokenizer, corpus, settings.lengths, settings.mixture, seed, purpose, pools)

    def sequence(self, number: int) -> TrainingSequence:
        """Sequence `number` of this mix."""
        kind = self._kind_at(number)
        if kind != PROSE and TASKS[kind].draw is None:
            # Its place among the sequences of the pool, so that the whole pool is used before any repeats.
            return self.of_kind(kind, sum(self._kind_at(each) == kind for each in range(number)))
        return self.of_kind(kind, number)

    def kinds(self) -> list[str]:
        """Tasks that have a share, and prose if some of the mixture is left."""
        kinds = [name for name in TASKS if self.mixture.get(name)]
        return kinds if sum(self.mixture.values()) > 1 - 1e-9 else [*kinds, PROSE]

    def of_kind(self, kind: str, number: int) -> TrainingSequence:
        """Sequence `number` of one of `kinds`; prose if the task does not fit the length.

        Raises:
            RTPurboError: the corpus is too short.
        """
        draw = None if kind == PROSE else TASKS[kind].draw
        if draw is None and kind != PROSE:
            pool = self._pool(kind)
            return pool[number % len(pool)]
        rng = random.Random(f"{self.purpose}-{self.seed}-{number}")
        length = self.lengths[number % len(self.lengths)]
        if draw is not None:
            # Default mixtures serve contexts of any length, and a short one has no room for some tasks.
            with suppress(RTPurboError):
                drawn = draw(self.tokenizer, self.corpus, length, rng)
                [(start, end)] = drawn.answer_spans
                return TrainingSequence(drawn.input_ids, end - start)
        return TrainingSequence(
            LongRangeMix(self.tokenizer, self.corpus).prose(length, rng).input_ids
        )

    def _kind_at(self, number: int) -> str:
        return kind_at(number, {name: self.mixture.get(name, 0.0) for name in TASKS})

    def _pool(self, name: str) -> Sequence[TrainingSequence]:
        return getattr(self.pools, name, ())


def kind_at(number: int, shares: Mapping[str, float]) -> str:
    """Kind of sequence `number` by the shares of kinds, in their order; prose for what is left of the shares.

    Multiples of the golden ratio spread kinds evenly over a short run and over every length.
    """
    place, begin = (number + 1) * GOLDEN_RATIO % 1, 0.0
    for kind, share in shares.items():
        if place < begin + share:
            return kind
        begin += share
    return PROSE
