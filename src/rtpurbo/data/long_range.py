"""Training sequences that reward reading far back: books, needles, chains of variables, quoted passages."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtpurbo.data.needles import needle_question, needle_sentence
from rtpurbo.data.prompts import Conversation, Question, conversation_tokens, fit_prose, hide
from rtpurbo.data.texts import SENTENCE_END, Prose, begin_ids
from rtpurbo.data.variables import INTRODUCTION, draw_chains, scatter
from rtpurbo.data.words import Split, key_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {"prose": 0.40, "needles": 0.35, "variables": 0.15, "passage": 0.10}
"""How many sequences of each kind there are."""

MAX_QUESTIONS = 8

# What is hidden and asked must leave most of a short sequence to prose.
TOKENS_PER_NEEDLE, TOKENS_PER_QUESTION, TOKENS_PER_CHAIN = 96, 384, 512

QUOTED_WORDS, CONTINUED_WORDS = 24, 48


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
        [kind] = rng.choices(list(SHARES), weights=list(SHARES.values()))
        if kind == "needles":
            return self.needles(length, rng)
        if kind == "variables":
            return self.variables(length, rng)
        if kind == "passage":
            return self.passage(length, rng)
        start = begin_ids(self.tokenizer)
        prose = self.corpus.sample_tokens(self.tokenizer, length - len(start), rng)
        return Conversation([*start, *prose], [])

    def needles(self, length: int, rng: random.Random) -> Conversation:
        """1 to 32 keys with 1 to 4 numbers each, and up to 8 questions."""
        room = max(1, length // TOKENS_PER_NEEDLE)
        num_keys = rng.choice([count for count in (1, 2, 4, 8, 16, 32) if count <= room])
        most = min(4, room // num_keys)
        counts = [rng.choice((1, rng.randint(1, most))) for _ in range(num_keys)]
        values = iter(rng.sample(range(1_000_000, 10_000_000), sum(counts)))
        needles = [
            (rng.random(), key, str(next(values)))
            for key, count in zip(rng.sample(key_names(self.split), num_keys), counts, strict=True)
            for _ in range(count)
        ]
        needles.sort()
        numbers: dict[str, list[str]] = {}
        for _, key, number in needles:
            numbers.setdefault(key, []).append(number)
        num_questions = min(num_keys, MAX_QUESTIONS, max(1, length // TOKENS_PER_QUESTION))
        asked = rng.sample(
            sorted(numbers), rng.choice((rng.randint(1, num_questions), num_questions))
        )
        introductions, questions = zip(
            *(needle_question(key, numbers[key]) for key in asked), strict=True
        )
        hidden = [(depth, needle_sentence(key, number)) for depth, key, number in needles]
        return self._around_prose(length, rng, introductions[0], hidden, list(questions))

    def variables(self, length: int, rng: random.Random) -> Conversation:
        """Up to 4 chains of up to 4 hops, and a question for each."""
        room = max(1, length // TOKENS_PER_CHAIN)
        num_chains = rng.choice([count for count in (1, 1, 2, 4) if count <= room])
        chains = draw_chains(rng, num_chains, rng.choice((1, 2, 3, 4, 4, 4)), self.split)
        questions = [chain.question() for chain in chains]
        return self._around_prose(length, rng, INTRODUCTION, scatter(rng, chains), questions)

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

    def _around_prose(
        self,
        length: int,
        rng: random.Random,
        introduction: str,
        hidden: list[tuple[float, str]],
        questions: list[Question],
    ) -> Conversation:
        return fit_prose(
            self.tokenizer,
            self.corpus,
            length,
            rng,
            lambda prose: conversation_tokens(
                self.tokenizer, f"{introduction}\n\n{hide(prose, hidden)}", questions
            ),
            f"A text with {len(hidden)} hidden sentence(s) and {len(questions)} question(s)",
        )


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
