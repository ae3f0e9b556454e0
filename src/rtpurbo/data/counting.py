"""Which words come up most often? Numbered lists, and texts of code words with counts of a Zipf law."""

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
"""How many words of a list come up more often than the others, one of these."""

MOST_COMMON = 30
"""How often common words come up at the most; the others, a fourth as often or less."""

COMMON_ROOM, EXAMPLE_ROOM = 0.4, 0.3
"""The shares of a sequence that common words may take, and a solved example."""

EXAMPLE_SHARE = 0.5
"""How often a solved example comes before a list, where there is room."""

EXAMPLE_COUNTS, EXAMPLE_UNCOMMON = (10, 3), 30

TOKENS_TO_A_CODE_WORD, LEAST_CODE_WORDS, NUM_FREQUENT = 50, 10, 3

DOTS = "..."
"""The most frequent of all in a text of code words, and none of them."""

CODE_WORD_LENGTH, TRAINING_LENGTHS = 6, (4, 5, 6, 7, 8)
"""Letters of a code word of tests, and those of training, where they differ by sequence."""


def shuffled_list(
    common: Sequence[str],
    uncommon: Sequence[str],
    common_count: int,
    uncommon_count: int,
    seed: int,
) -> list[str]:
    """Every common word so many times, and every other, in a random order."""
    entries = [*common] * common_count + [*uncommon] * uncommon_count
    random.Random(seed).shuffle(entries)
    return entries


def code_words(rng: random.Random, length: int = CODE_WORD_LENGTH) -> Iterator[str]:
    """Code words of so many letters, without end, none twice."""
    given: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=length))
        if word not in given:
            given.add(word)
            yield word


def code_text(ranked: Sequence[str], size: int, alpha: float, seed: int) -> list[str]:
    """Some `size` words in a random order: dots most often, then the code words by their rank."""
    counts = zipf_counts(size, len(ranked) + 1, alpha)
    words = [
        word for word, count in zip([DOTS, *ranked], counts, strict=False) for _ in range(count)
    ]
    random.Random(seed).shuffle(words)
    return words


def zipf_counts(size: int, vocabulary: int, alpha: float) -> Sequence[int]:
    """How often each rank comes up in a text of some `size` words: size k^-alpha / zeta(alpha).

    Counts are rounded down, so the text is shorter than `size`; ranks that never come up are left
    out.
    """
    total = zeta(alpha)
    every = (int(size * rank**-alpha / total) for rank in range(1, vocabulary + 1))
    return [count for count in every if count]


def smallest_code_text(num_frequent: int, alpha: float) -> int:
    """From this size on, the last word asked for comes up more often than the next, rounding or not."""
    last, following = num_frequent + 1, num_frequent + 2
    return math.ceil(zeta(alpha) / (last**-alpha - following**-alpha))


def zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function, by its first terms and the Euler-Maclaurin estimate of the rest."""
    head = math.fsum(rank**-alpha for rank in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2


def common_words_list(
    tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random, words: Iterator[str]
) -> Conversation:
    """A list, and the question for the words that come up more often than the others.

    Args:
        tokenizer: the model's.
        length: the most tokens.
        rng: the source of all randomness.
        words: those of the list, without end, no two the same.
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
        asked = wording.ask(_as_they_come(example, shown))
        before = asked.solved_after(wording.text(example, num_common)) + "\n\n\n"
    uncommon, seed = Stream(words), rng.getrandbits(64)

    def around(size: int) -> Conversation:
        entries = shuffled_list(common, uncommon.first(size), common_count, uncommon_count, seed)
        asked = wording.ask(_as_they_come(entries, common))
        text = f"{before}{wording.text(entries, num_common)}"
        return conversation_tokens(tokenizer, text, [asked])

    return fit_units(length, around, f"A list with {num_common} common words")


def code_words_text(
    tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> Conversation:
    """A text of code words, at most `length` tokens with the question for the most frequent ones."""
    alpha, seed = rng.uniform(1.6, 2.4), rng.getrandbits(64)
    num_words = max(LEAST_CODE_WORDS, length // TOKENS_TO_A_CODE_WORD)
    ranked = list(islice(code_words(rng, rng.choice(TRAINING_LENGTHS)), num_words))
    wording = CountingWording.draw(rng, "train", "code_words")
    asked = wording.ask(ranked[:NUM_FREQUENT])
    smallest = smallest_code_text(NUM_FREQUENT, alpha)

    def around(size: int) -> Conversation:
        words = code_text(ranked, smallest + size, alpha, seed)
        return conversation_tokens(tokenizer, wording.text(words, NUM_FREQUENT), [asked])

    return fit_units(length, around, "A text of code words")


def _as_they_come(entries: list[str], words: Sequence[str]) -> list[str]:
    """Words in the order in which they first come up: the one order in which they can be known."""
    return sorted(words, key=entries.index)
