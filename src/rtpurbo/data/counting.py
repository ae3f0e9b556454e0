"""Questions about the most frequent words: lists, and texts of code words with Zipf-distributed counts."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from rtpurbo.data.fitting import Stream
from rtpurbo.data.prompts import Conversation, conversation_tokens, fit_units
from rtpurbo.data.texts import encode
from rtpurbo.data.wordings import CountingWording, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMON_WORDS = (3, 5, 10, 10)
"""Choices of the number of common words in a list."""

MOST_COMMON = 30
"""Maximum count of common words; the count of the others is at most a quarter of theirs."""

COMMON_ROOM, EXAMPLE_ROOM = 0.4, 0.3
"""Maximum shares of a sequence for common words and for a solved example."""

EXAMPLE_SHARE = 0.5
"""Share of lists that begin with a solved example, where there is room."""

EXAMPLE_COUNTS, EXAMPLE_UNCOMMON = (10, 3), 30

TOKENS_TO_A_CODE_WORD, LEAST_CODE_WORDS, NUM_FREQUENT = 50, 10, 3

DOTS = "..."
"""Most frequent entry of a text of code words, which is not a code word."""

CODE_WORD_LENGTH, TRAINING_LENGTHS = 6, (4, 5, 6, 7, 8)
"""Letters of a code word in evaluations, and choices for each training sequence."""


def shuffled_list(
    common: Sequence[str],
    uncommon: Sequence[str],
    common_count: int,
    uncommon_count: int,
    seed: int,
) -> list[str]:
    """Returns every common and uncommon word with its count, in random order."""
    entries = [*common] * common_count + [*uncommon] * uncommon_count
    random.Random(seed).shuffle(entries)
    return entries


def code_words(rng: random.Random, length: int = CODE_WORD_LENGTH) -> Iterator[str]:
    """Yields distinct code words without end."""
    drawn: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=length))
        if word not in drawn:
            drawn.add(word)
            yield word


def code_text(ranked: Sequence[str], size: int, alpha: float, seed: int) -> list[str]:
    """Returns about `size` words in random order: dots most often, then the code words by rank."""
    counts = zipf_counts(size, len(ranked) + 1, alpha)
    words = [
        word for word, count in zip([DOTS, *ranked], counts, strict=False) for _ in range(count)
    ]
    random.Random(seed).shuffle(words)
    return words


def zipf_counts(size: int, vocabulary: int, alpha: float) -> Sequence[int]:
    """Returns the count of each rank in a text of about `size` words: size k^-alpha / zeta(alpha).

    Counts are rounded down, so the text is shorter than `size`; ranks with a count of 0 are left out.
    """
    total = zeta(alpha)
    every = (int(size * rank**-alpha / total) for rank in range(1, vocabulary + 1))
    return [count for count in every if count]


def smallest_code_text(num_frequent: int, alpha: float) -> int:
    """Returns the size from which the last requested word is more frequent than the next despite rounding."""
    last, following = num_frequent + 1, num_frequent + 2
    return math.ceil(zeta(alpha) / (last**-alpha - following**-alpha))


def zeta(alpha: float, terms: int = 1000) -> float:
    """Returns the Riemann zeta function, from its first terms and the Euler-Maclaurin estimate of the rest."""
    head = math.fsum(rank**-alpha for rank in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2


def common_words_list(
    tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random, words: Iterator[str]
) -> Conversation:
    """Returns a list and a question for its common words.

    Args:
        tokenizer: the model's.
        length: maximum number of tokens.
        rng: source of all randomness.
        words: endless iterator of distinct words.
    """
    wording = CountingWording.draw(rng, "train", "lists")
    num_common = rng.choice(COMMON_WORDS)
    shown, common = ([next(words) for _ in range(num_common)] for _ in range(2))
    entry = len(encode(tokenizer, lay_out(common, wording.layout))) / num_common
    most = min(MOST_COMMON, max(2, int(COMMON_ROOM * length / entry / num_common)))
    common_count = rng.randint(max(2, most // 3), most)
    uncommon_count = rng.randint(1, max(1, common_count // 4))
    before = ""
    others = [next(words) for _ in range(EXAMPLE_UNCOMMON)]
    example = shuffled_list(shown, others, *EXAMPLE_COUNTS, rng.getrandbits(64))
    if rng.random() < EXAMPLE_SHARE and len(example) * entry <= EXAMPLE_ROOM * length:
        asked = wording.ask(_by_first_occurrence(example, shown))
        before = asked.solved_after(wording.text(example, num_common)) + "\n\n\n"
    uncommon, seed = Stream(words), rng.getrandbits(64)

    def around(size: int) -> Conversation:
        entries = shuffled_list(common, uncommon.first(size), common_count, uncommon_count, seed)
        asked = wording.ask(_by_first_occurrence(entries, common))
        text = f"{before}{wording.text(entries, num_common)}"
        return conversation_tokens(tokenizer, text, [asked])

    return fit_units(length, around, f"a list with {num_common} common words")


def code_words_text(
    tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> Conversation:
    """Returns a text of code words and a question for the most frequent ones, at most `length` tokens."""
    alpha, seed = rng.uniform(1.6, 2.4), rng.getrandbits(64)
    num_words = max(LEAST_CODE_WORDS, length // TOKENS_TO_A_CODE_WORD)
    ranked = list(islice(code_words(rng, rng.choice(TRAINING_LENGTHS)), num_words))
    wording = CountingWording.draw(rng, "train", "code_words")
    asked = wording.ask(ranked[:NUM_FREQUENT])
    smallest = smallest_code_text(NUM_FREQUENT, alpha)

    def around(size: int) -> Conversation:
        words = code_text(ranked, smallest + size, alpha, seed)
        return conversation_tokens(tokenizer, wording.text(words, NUM_FREQUENT), [asked])

    return fit_units(length, around, "a text of code words")


def _by_first_occurrence(entries: list[str], words: Sequence[str]) -> list[str]:
    """Sorts words by first occurrence, the only order that a reader can know."""
    return sorted(words, key=entries.index)
