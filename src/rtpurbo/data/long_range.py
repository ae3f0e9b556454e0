"""Training sequences that reward reading far back: needles, chains of variables, passages, counting, books.

Needles hide in prose, in dull repeated sentences or among other needles, and chains of variables in the
first two, as in RULER's tests, whose words, names and sentences are others; so are the words counted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, cycle
from typing import TYPE_CHECKING

from rtpurbo.data.counting import code_words_text, common_words_list
from rtpurbo.data.fitting import Stream
from rtpurbo.data.needles import listed, needle_question, needle_sentence, random_values
from rtpurbo.data.prompts import (
    Conversation,
    Question,
    conversation_tokens,
    fit_prose,
    fit_units,
    hide,
    hide_among_lines,
)
from rtpurbo.data.texts import SENTENCE_END, Prose, begin_ids
from rtpurbo.data.variables import INTRODUCTION, draw_chains, scatter
from rtpurbo.data.words import Split, key_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {"prose": 0.30, "needles": 0.37, "variables": 0.13, "passage": 0.08, "counting": 0.12}
"""How many sequences of each kind there are."""

PROSE, NOISE, NEEDLES = "prose", "noise", "needles"
HAYSTACKS = {PROSE: 0.5, NOISE: 0.2, NEEDLES: 0.3}
"""How often needles hide in what."""

UUID_SHARE = {PROSE: 0.2, NOISE: 0.2, NEEDLES: 0.5}
"""How often values are UUIDs instead of numbers, by haystack; among other needles, then half of the keys are too."""

LISTED_SHARE = 0.25
"""How often one question asks for several keys at once."""

EXAMPLE_SHARE = 0.3
"""How often a solved example comes before chains of variables, where there is room."""

MAX_QUESTIONS = 8

# What is hidden and asked must leave most of a short sequence to prose.
TOKENS_PER_NEEDLE = {"number": 96, "uuid": 256}
TOKENS_PER_QUESTION = {"number": 384, "uuid": 768}
TOKENS_PER_CHAIN = 512

ROOM_FOR_EXAMPLE, EXAMPLE_SENTENCES = 4096, 60

QUOTED_WORDS, CONTINUED_WORDS = 24, 48

DULL = (
    "The rain falls on the roof.", "A door opens and closes.", "The clock strikes again.",
    "Nobody is in the garden.", "The soup is on the stove.", "Two birds sit on a fence.",
    "It was the same last week.", "The train leaves on time.", "Someone waters the plants.",
    "The letter is still unread.", "We walk up and down.", "The window faces the street.",
    "He counts the steps once more.", "The tea is getting cold.", "There is nothing new today.",
)  # fmt: skip
"""Of these, each haystack of noise repeats a few."""


@dataclass(frozen=True)
class LongRangeMix:
    """Draws sequences by number: nothing to store, and a resumed run meets the same ones.

    Attributes:
        tokenizer: the model's.
        corpus: prose.
        seed: of everything.
        split: which keys and names to draw from.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Prose
    seed: int = 0
    split: Split = "train"

    def sequence(self, number: int, length: int) -> Conversation:
        """Sequence `number`, at most `length` tokens long; prose has no answers."""
        rng = random.Random(f"long-range-{self.seed}-{number}")
        kind = _draw(SHARES, rng)
        if kind == "needles":
            return self.needles(length, rng)
        if kind == "variables":
            return self.variables(length, rng)
        if kind == "passage":
            return self.passage(length, rng)
        if kind == "counting":
            return self.counting(length, rng)
        start = begin_ids(self.tokenizer)
        prose = self.corpus.sample_tokens(self.tokenizer, length - len(start), rng)
        return Conversation([*start, *prose], [])

    def needles(
        self,
        length: int,
        rng: random.Random,
        haystack: str | None = None,
        most_questions: int = MAX_QUESTIONS,
        listed_share: float = LISTED_SHARE,
    ) -> Conversation:
        """1 to 32 keys with 1 to 4 values each, and up to 8 questions.

        As many values as may be come often: where they are rare, a model learns to stop listing early.

        Args:
            length: the most tokens.
            rng: the source of all randomness.
            haystack: of `HAYSTACKS`; drawn if None.
            most_questions: at most so many questions.
            listed_share: how often one question asks for several keys at once, where there are several.
        """
        haystack = haystack or _draw(HAYSTACKS, rng)
        kind = "uuid" if rng.random() < UUID_SHARE[haystack] else "number"
        keys = self._keys(rng, kind == "uuid" and haystack == NEEDLES and rng.random() < 0.5)
        values = random_values(rng, kind)
        room = max(1, length // TOKENS_PER_NEEDLE[kind])
        num_keys = rng.choice([count for count in (1, 2, 4, 8, 16, 32) if count <= room])
        most = min(4, room // num_keys)
        needles = [
            (rng.random(), key, next(values))
            for key in [next(keys) for _ in range(num_keys)]
            for _ in range(rng.choice((1, rng.randint(1, most), most)))
        ]
        needles.sort()
        held: dict[str, list[str]] = {}
        for _, key, value in needles:
            held.setdefault(key, []).append(value)
        introduction, questions = self._questions(
            length, rng, held, kind, most_questions, listed_share
        )
        hidden = [(depth, needle_sentence(key, value, kind)) for depth, key, value in needles]
        distractors = (needle_sentence(*pair, kind) for pair in zip(keys, values, strict=True))
        return self._around(haystack, length, rng, introduction, hidden, questions, distractors)

    def variables(
        self,
        length: int,
        rng: random.Random,
        haystack: str | None = None,
        most_questions: int = MAX_QUESTIONS,
    ) -> Conversation:
        """Up to 4 chains of up to 4 hops, and a question for each, at most `most_questions`."""
        haystack = haystack or rng.choice((PROSE, NOISE))
        room = max(1, length // TOKENS_PER_CHAIN)
        num_chains = rng.choice([count for count in (1, 1, 2, 4) if count <= room])
        num_hops = rng.choice((1, 2, 3, 4, 4, 4))
        *chains, shown = draw_chains(rng, num_chains + 1, num_hops, self.split)
        questions = [chain.question() for chain in chains[:most_questions]]
        introduction = INTRODUCTION
        if length >= ROOM_FOR_EXAMPLE and rng.random() < EXAMPLE_SHARE:
            dull = _dull_lines(rng).first(EXAMPLE_SENTENCES)
            example = hide_among_lines(dull, scatter(rng, [shown]))
            solved = shown.question().solved_after(f"{INTRODUCTION}\n\n{example}")
            introduction = f"{solved}\n\n\n{INTRODUCTION}"
        return self._around(haystack, length, rng, introduction, scatter(rng, chains), questions)

    def passage(self, length: int, rng: random.Random) -> Conversation:
        """Prose of which a passage is quoted again at the end and must be continued."""
        depth = 0.9 * rng.random()
        introduction = "Read the following text. I will quote a passage of it afterwards."
        return fit_prose(
            self.tokenizer,
            self.corpus,
            length,
            rng,
            lambda prose: conversation_tokens(
                self.tokenizer, f"{introduction}\n\n{prose}", [passage_question(prose, depth)]
            ),
            "A text and a passage of it",
        )

    def counting(self, length: int, rng: random.Random) -> Conversation:
        """A list some of whose words come up more often, or code words with counts of a Zipf law."""
        if rng.choice((True, False)):
            return common_words_list(self.tokenizer, length, rng, self._keys(rng, uuids=False))
        return code_words_text(self.tokenizer, length, rng)

    def _keys(self, rng: random.Random, uuids: bool) -> Iterator[str]:
        """Keys without end, no two the same."""
        if uuids:
            return random_values(rng, "uuid")
        names = list(key_names(self.split))
        rng.shuffle(names)
        return chain(names, (f"{name}-{number}" for number in count(2) for name in names))

    def _questions(
        self,
        length: int,
        rng: random.Random,
        held: dict[str, list[str]],
        kind: str,
        most_questions: int,
        listed_share: float,
    ) -> tuple[str, list[Question]]:
        """What introduces the text, and questions for some keys, for each or for several at once."""
        most = min(len(held), most_questions, max(1, length // TOKENS_PER_QUESTION[kind]))
        if len(held) > 1 and rng.random() < listed_share:
            together = rng.sample(sorted(held), min(len(held), rng.randint(2, 4)))
            every = [value for key in together for value in held[key]]
            introduction, question = needle_question(listed(together), every, kind)
            return introduction, [question]
        asked = rng.sample(sorted(held), rng.choice((rng.randint(1, most), most)))
        introductions, questions = zip(
            *(needle_question(key, held[key], kind) for key in asked), strict=True
        )
        return introductions[0], list(questions)

    def _around(
        self,
        haystack: str,
        length: int,
        rng: random.Random,
        introduction: str,
        hidden: list[tuple[float, str]],
        questions: list[Question],
        distractors: Iterator[str] | None = None,
    ) -> Conversation:
        """A haystack with what is hidden in it, and the questions, as long as may be."""

        def around(text: str) -> Conversation:
            return conversation_tokens(self.tokenizer, f"{introduction}\n\n{text}", questions)

        what = f"A text with {len(hidden)} hidden sentence(s) and {len(questions)} question(s)"
        if haystack == PROSE:
            return fit_prose(
                self.tokenizer,
                self.corpus,
                length,
                rng,
                lambda prose: around(hide(prose, hidden)),
                what,
            )
        lines = Stream(distractors) if distractors and haystack == NEEDLES else _dull_lines(rng)
        return fit_units(
            length, lambda size: around(hide_among_lines(lines.first(size), hidden)), what
        )


def _dull_lines(rng: random.Random) -> Stream[str]:
    """A few short sentences over and over."""
    return Stream(cycle(rng.sample(DULL, rng.randint(3, 6))))


def _draw(shares: dict[str, float], rng: random.Random) -> str:
    [drawn] = rng.choices(list(shares), weights=list(shares.values()))
    return drawn


def passage_question(prose: str, depth: float) -> Question:
    """Quotes the beginning of a sentence near a depth from 0 to 1 and asks how it goes on."""
    ends = [match.end() for match in SENTENCE_END.finditer(prose)]
    start = min([0, *ends], key=lambda place: abs(place - depth * len(prose)))
    words = []
    for word in re.finditer(r"\S+", prose[start:]):
        words.append(word)
        if len(words) == QUOTED_WORDS + CONTINUED_WORDS:
            break
    quoted, continued = words[:QUOTED_WORDS], words[QUOTED_WORDS:]
    quote = prose[start + quoted[0].start() : start + quoted[-1].end()] if quoted else ""
    rest = prose[start + continued[0].start() : start + continued[-1].end()] if continued else ""
    return Question(
        f'How does this passage of the text go on? "{quote}"', "It goes on:", f" {rest}"
    )
