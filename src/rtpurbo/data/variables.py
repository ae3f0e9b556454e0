"""Variable tracking: chains of assignments strewn over prose, and who holds a value in the end."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtpurbo.data.needles import RetrievalExample
from rtpurbo.data.prompts import Question, conversation_tokens, fit_prose, hide
from rtpurbo.data.texts import Prose
from rtpurbo.data.words import Split
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME_LENGTH = 5

INTRODUCTION = "Memorize and track the chains of variable assignments hidden in the following text."


@dataclass(frozen=True)
class Chain:
    """Variables of which the first holds a value and each other one is assigned the one before it."""

    value: str
    names: tuple[str, ...]

    def assignments(self) -> Iterator[str]:
        """A sentence for each variable, in an order in which they can be followed."""
        yield f"VAR {self.names[0]} = {self.value}."
        for name, before in zip(self.names[1:], self.names, strict=False):
            yield f"VAR {name} = VAR {before}."

    def question(self) -> Question:
        """Asks for all variables that hold the value."""
        return Question(
            f"Find all variables that are assigned the value {self.value} in the text above.",
            "According to the chains of variable assignments in the text above, "
            f"{len(self.names)} variables are assigned the value {self.value}, they are:",
            f" {' '.join(self.names)}",
        )


def draw_chains(rng: random.Random, num_chains: int, num_hops: int, split: Split) -> list[Chain]:
    """Chains that share neither names nor values; the two splits share no name."""
    if num_chains < 1 or num_hops < 0:
        raise RTPurboError("Variable tracking needs at least one chain and no fewer than 0 hops.")
    names: list[str] = []
    while len(names) < num_chains * (num_hops + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=NAME_LENGTH))
        if name not in names and _split_of(name) == split:
            names.append(name)
    values = rng.sample(range(10_000, 100_000), num_chains)
    return [
        Chain(str(value), tuple(names[number::num_chains])) for number, value in enumerate(values)
    ]


def scatter(rng: random.Random, chains: Sequence[Chain]) -> list[tuple[float, str]]:
    """The assignments at random depths, those of a chain in their order, as `hide` takes them."""
    placed: list[tuple[float, str]] = []
    for chain in chains:
        depths = sorted(rng.random() for _ in chain.names)
        placed += zip(depths, chain.assignments(), strict=True)
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
    """Hides chains of assignments in prose and asks which variables hold the value of one, as RULER does.

    Args:
        tokenizer: turns the text into tokens; its chat template is used if it has one.
        corpus: where the prose comes from.
        length: the most tokens that prompt and answer may have together; they have at most 1 %
            or 16 tokens, whichever is more, less.
        rng: the source of all randomness.
        num_hops: assignments from variable to variable in a chain.
        num_chains: chains in the text; all but one distract.
        split: which names to draw from.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    chains = draw_chains(rng, num_chains, num_hops, split)
    hidden = scatter(rng, chains)
    conversation = fit_prose(
        tokenizer,
        corpus,
        length,
        rng,
        lambda prose: conversation_tokens(
            tokenizer, f"{INTRODUCTION}\n\n{hide(prose, hidden)}", [chains[0].question()]
        ),
        f"An example with {num_chains} chain(s) of variables",
    )
    return RetrievalExample.of(conversation, list(chains[0].names), "variable_tracking")


def _split_of(name: str) -> Split:
    """Half of all names belong to each split."""
    return "train" if sum(map(ord, name)) % 2 == 0 else "test"
