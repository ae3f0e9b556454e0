"""Registry of the kinds of sequences that training mixes: generators and wordings by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rtpurbo.data.long_range import LISTED_SHARE, NEEDLES, NOISE, PROSE, LongRangeMix
from rtpurbo.data.needles import make_retrieval_example
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.reading import reading_example
from rtpurbo.data.texts import Prose
from rtpurbo.data.variables import make_variable_example
from rtpurbo.data.wordings import templates
from rtpurbo.data.words import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_NEEDLE = 128
TOKENS_PER_CHAIN = 512

Draw = Callable[["PreTrainedTokenizerBase", Prose, int, random.Random], Conversation]
"""Called with tokenizer, prose, the most tokens and the source of randomness; returns one question."""


@dataclass(frozen=True)
class Task:
    """Kind of training sequence.

    Attributes:
        name: key in the `mixture` of a stage.
        sections: sections of the wordings' files that it is drawn from.
        draw: generator of a sequence, which raises `RTPurboError` where the length leaves no room; None
            for sequences that the dense model writes before training.
        stages: stages that can train on it.
    """

    name: str
    sections: tuple[str, ...]
    draw: Draw | None = None
    stages: tuple[str, ...] = ("stage1", "stage2")

    def wordings(self, split: Split) -> dict[str, Any]:
        """Templates by section: `train` gives those of training, `test` those of evaluations, if there are any."""
        every = templates(split)
        return {section: every[section] for section in self.sections if section in every}


def _needles(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Conversation:
    # Needles must not crowd out the prose around them.
    fitting = [count for count in (1, 2, 4, 8) if count * TOKENS_PER_NEEDLE <= length]
    return make_retrieval_example(
        tokenizer,
        corpus,
        length,
        rng,
        num_keys=rng.choice(fitting),
        num_values=rng.choice([1, 1, *(count for count in fitting if count <= 4)]),
        split="train",
    ).conversation()


def _variables(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Conversation:
    room = max(1, length // TOKENS_PER_CHAIN)
    return make_variable_example(
        tokenizer,
        corpus,
        length,
        rng,
        num_hops=rng.choice((1, 2, 3, 4)),
        num_chains=rng.choice([count for count in (1, 2, 4) if count <= room]),
        split="train",
    ).conversation()


def _haystack(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> Conversation:
    mix = LongRangeMix(tokenizer, corpus)
    haystack = rng.choice((NOISE, NEEDLES, PROSE))
    if haystack == NOISE and rng.random() < 0.5:
        return mix.variables(length, rng, haystack, most_questions=1)
    # Questions about a single key in prose are the task `needles`.
    listed_share = 1.0 if haystack == PROSE else LISTED_SHARE
    return mix.needles(length, rng, haystack, 1, listed_share)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("needles", ("needles",), _needles),
        Task("variables", ("chains",), _variables),
        Task(
            "passage",
            ("passages",),
            lambda tokenizer, corpus, *rest: LongRangeMix(tokenizer, corpus).passage(*rest),
        ),
        Task("haystack", ("needles", "chains", "filler"), _haystack),
        Task(
            "counting",
            ("lists", "code_words"),
            lambda tokenizer, corpus, *rest: LongRangeMix(tokenizer, corpus).counting(*rest),
        ),
        Task("reading", ("reading",), reading_example),
        Task("documents", ("documents",)),
        Task("conversations", ("user_turns", "openings_of_text"), stages=("stage2",)),
    )
}
"""Tasks by name, in the order in which their shares divide the numbers from 0 to 1 (docs/training.md)."""
