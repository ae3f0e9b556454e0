"""Variable tracking: chains of assignments strewn over prose, and who holds a value in the end."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtpurbo.data.needles import RetrievalExample
from rtpurbo.data.prompts import conversation_tokens, fit_prose, hide
from rtpurbo.data.texts import Prose
from rtpurbo.data.wordings import ChainWording, pick
from rtpurbo.data.words import Split, words_of
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME_LENGTH = 5

VALUE_DIGITS = {"train": (4, 5, 6), "test": (5,)}
"""The possible lengths of a value; those of one sequence are equally long."""


@dataclass(frozen=True)
class Chain:
    """Variables of which the first holds a value and each other one is assigned the one before it."""

    value: str
    names: tuple[str, ...]

    def assignments(self, wording: ChainWording) -> Iterator[str]:
        """A sentence for each variable, in an order in which they can be followed."""
        yield wording.assign(self.names[0], self.value)
        for name, before in zip(self.names[1:], self.names, strict=False):
            yield wording.copy(name, before)


def draw_chains(rng: random.Random, num_chains: int, num_hops: int, split: Split) -> list[Chain]:
    """Chains that share neither names nor values; the two splits share no name."""
    if num_chains < 1 or num_hops < 0:
        raise RTPurboError("Variable tracking needs at least one chain and no fewer than 0 hops.")
    style = rng.choice(_TRAINING_NAMES) if split == "train" else _capitals
    names: list[str] = []
    while len(names) < num_chains * (num_hops + 1):
        name = style(rng)
        # Where one contained another, an assignment could be found inside another one.
        is_apart = not any(other in name or name in other for other in names)
        if is_apart and (style is not _capitals or _split_of(name) == split):
            names.append(name)
    digits = pick(VALUE_DIGITS[split], rng)
    values = rng.sample(range(10 ** (digits - 1), 10**digits), num_chains)
    return [
        Chain(str(value), tuple(names[number::num_chains])) for number, value in enumerate(values)
    ]


def scatter(
    rng: random.Random, chains: Sequence[Chain], wording: ChainWording
) -> list[tuple[float, str]]:
    """The assignments at random depths, those of a chain in their order, as `hide` takes them."""
    placed: list[tuple[float, str]] = []
    for chain in chains:
        depths = sorted(rng.random() for _ in chain.names)
        placed += zip(depths, chain.assignments(wording), strict=True)
    return sorted(placed)


def make_variable_example(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    num_hops: int = 4,
    num_chains: int = 1,
    split: Split = "test",
) -> RetrievalExample:
    """Hides chains of assignments in prose and asks which variables hold the value of one.

    The test split is worded as RULER is, the training split in one of many other ways.

    Args:
        tokenizer: turns the text into tokens; its chat template is used if it has one.
        corpus: where the prose comes from.
        length: the most tokens that prompt and answer may have together; they have at most 1 %
            or 16 tokens, whichever is more, less.
        rng: the source of all randomness.
        num_hops: assignments from variable to variable in a chain.
        num_chains: chains in the text; all but one distract.
        split: whose names and wordings to draw from.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    wording = ChainWording.draw(rng, split)
    chains = draw_chains(rng, num_chains, num_hops, split)
    hidden = scatter(rng, chains, wording)
    introduction = wording.introduce(rng)
    question = wording.ask(rng, chains[0].value, chains[0].names)
    conversation = fit_prose(
        tokenizer,
        corpus,
        length,
        rng,
        lambda prose: conversation_tokens(
            tokenizer,
            f"{introduction}\n\n{hide(prose, hidden, on_lines=wording.is_record)}",
            [question],
        ),
        f"An example with {num_chains} chain(s) of variables",
    )
    return RetrievalExample.of(conversation, list(chains[0].names), "variable_tracking")


def _capitals(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=NAME_LENGTH))


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=6))


def _indexed(rng: random.Random) -> str:
    return f"{rng.choice(string.ascii_lowercase)}_{rng.randrange(10, 100)}"


def _register(rng: random.Random) -> str:
    return f"reg{rng.randrange(100, 1000)}"


def _noun(rng: random.Random) -> str:
    return f"{rng.choice(words_of('train')[1])}_{rng.randrange(10, 100)}"


def _camel_case(rng: random.Random) -> str:
    adjectives, nouns = words_of("train")
    return f"{rng.choice(adjectives)}{rng.choice(nouns).capitalize()}"


_TRAINING_NAMES = (_capitals, _letters, _indexed, _register, _noun, _camel_case)


def _split_of(name: str) -> Split:
    """Half of all names of capitals belong to each split."""
    return "train" if sum(map(ord, name)) % 2 == 0 else "test"
