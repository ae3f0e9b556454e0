"""Variable tracking: chains of assignments scattered over prose, and questions for variables of a value."""

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
"""Numbers of digits of a value, one of which is drawn for each sequence."""


@dataclass(frozen=True)
class Chain:
    """Chain of variables: the first is assigned a value, each other one the variable before it."""

    value: str
    names: tuple[str, ...]

    def assignments(self, wording: ChainWording) -> Iterator[str]:
        """Yields the assignment of each variable, in order."""
        yield wording.assign(self.names[0], self.value)
        for name, before in zip(self.names[1:], self.names, strict=False):
            yield wording.copy(name, before)


def draw_chains(rng: random.Random, num_chains: int, num_hops: int, split: Split) -> list[Chain]:
    """Draws chains with distinct names and values; the splits share no name."""
    if num_chains < 1 or num_hops < 0:
        raise RTPurboError("variable tracking needs at least one chain and at least 0 hops.")
    style = rng.choice(_TRAINING_NAMES) if split == "train" else _capitals
    names: list[str] = []
    while len(names) < num_chains * (num_hops + 1):
        name = style(rng)
        # A name that contains another one would make assignments ambiguous.
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
    """Returns depths and assignments for `hide`: random depths, in order within a chain."""
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
    """Hides chains of assignments in prose and asks for all variables of one chain.

    The test split uses RULER's wording, the training split one of many others.

    Args:
        tokenizer: the model's; its chat template is used if it has one.
        corpus: source of the prose.
        length: maximum number of tokens of prompt and answer together, which is reached to within 1 % or
            16 tokens, whichever is more.
        rng: source of all randomness.
        num_hops: assignments from variable to variable in a chain.
        num_chains: number of chains; all but one are distractors.
        split: split of names and wordings.

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
        f"an example with {num_chains} chain(s) of variables",
    )
    return RetrievalExample.of(conversation, list(chains[0].names))


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
    """Returns the split of a name of capitals; each split has half of them."""
    return "train" if sum(map(ord, name)) % 2 == 0 else "test"
