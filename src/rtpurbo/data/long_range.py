"""Training sequences with long-range dependencies: needles, variables, passages, counting and prose.

Needles are hidden in prose, in repeated filler sentences or among other needles, and chains of variables in the
first two. The kinds are those of RULER; wordings, formats, keys, names and filler are different.
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
from rtpurbo.data.needles import random_values
from rtpurbo.data.prompts import (
    Conversation,
    Question,
    conversation_tokens,
    fit_prose,
    fit_units,
    hide,
    hide_among_lines,
)
from rtpurbo.data.texts import SENTENCE_END, Prose, bos_and_prose
from rtpurbo.data.variables import draw_chains, scatter
from rtpurbo.data.wordings import (
    ChainWording,
    NeedleWording,
    filler_sentences,
    pose,
    templates,
)
from rtpurbo.data.words import Split, key_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {"prose": 0.30, "needles": 0.37, "variables": 0.13, "passage": 0.08, "counting": 0.12}
"""Shares of the kinds of sequences, each of which is a method of `LongRangeMix`."""

PROSE, NOISE, NEEDLES = "prose", "noise", "needles"
HAYSTACKS = {PROSE: 0.5, NOISE: 0.2, NEEDLES: 0.3}
"""Shares of the haystacks of needles."""

UUID_SHARE = {PROSE: 0.2, NOISE: 0.2, NEEDLES: 0.5}
"""Shares of UUIDs instead of numbers as values, by haystack; among other needles, half of these have UUID keys."""

LISTED_SHARE = 0.25
"""Share of questions that ask for several keys at once."""

EXAMPLE_SHARE = 0.3
"""Share of chains of variables that begin with a solved example, where there is room."""

MAX_QUESTIONS = 8

# Hidden sentences and questions must leave most of a short sequence to prose.
TOKENS_PER_NEEDLE = {"number": 96, "uuid": 256}
TOKENS_PER_QUESTION = {"number": 384, "uuid": 768}
TOKENS_PER_CHAIN = 512

ROOM_FOR_EXAMPLE, EXAMPLE_SENTENCES = 4096, 60

QUOTED_WORDS, CONTINUED_WORDS = 24, 48

FILLER_SENTENCES = (3, 4, 5, 6, 30, 300)
"""Choices of the number of distinct sentences in a haystack of noise."""

NUMBER_DIGITS = (6, 7, 8, 9)
"""Choices of the number of digits of a sequence's values."""


@dataclass(frozen=True)
class ChainSequence:
    """Sequence with chains of variables.

    Attributes:
        conversation: tokens.
        assignments: text of each assignment, once.
        copies: those of `assignments` that copy another variable.
        values: values of the chains that are asked for.
    """

    conversation: Conversation
    assignments: tuple[str, ...]
    copies: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class LongRangeMix:
    """Generator of sequences by number, so that a resumed run draws the same ones.

    Attributes:
        tokenizer: the model's.
        corpus: prose.
        seed: seed of all randomness.
        split: split of keys and names.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Prose
    seed: int = 0
    split: Split = "train"

    def sequence(self, number: int, length: int) -> Conversation:
        """Returns sequence `number`, at most `length` tokens long; prose has no answers."""
        rng = random.Random(f"long-range-{self.seed}-{number}")
        conversation: Conversation = getattr(self, _draw(SHARES, rng))(length, rng)
        return conversation

    def prose(self, length: int, rng: random.Random) -> Conversation:
        """Returns prose of exactly `length` tokens, without a question."""
        return Conversation(bos_and_prose(self.tokenizer, self.corpus, length, rng), [])

    def needles(
        self,
        length: int,
        rng: random.Random,
        haystack: str | None = None,
        most_questions: int = MAX_QUESTIONS,
        listed_share: float = LISTED_SHARE,
    ) -> Conversation:
        """Returns 1 to 32 keys with 1 to 4 values each, and up to 8 questions.

        The largest number of values is frequent, because otherwise a model learns to stop listing early.

        Args:
            length: maximum number of tokens.
            rng: source of all randomness.
            haystack: one of `HAYSTACKS`; drawn if None.
            most_questions: maximum number of questions.
            listed_share: share of sequences of several keys with one question about several of them.
        """
        haystack = haystack or _draw(HAYSTACKS, rng)
        kind = "uuid" if rng.random() < UUID_SHARE[haystack] else "number"
        keys = self._keys(rng, kind == "uuid" and haystack == NEEDLES and rng.random() < 0.5)
        values = random_values(rng, kind, rng.choice(NUMBER_DIGITS))
        wording = NeedleWording.draw(rng, "train", kind)
        room = max(1, length // TOKENS_PER_NEEDLE[kind])
        num_keys = rng.choice([count for count in (1, 2, 4, 8, 16, 32) if count <= room])
        most = min(4, room // num_keys)
        needles = [
            (rng.random(), key, next(values))
            for key in [next(keys) for _ in range(num_keys)]
            for _ in range(rng.choice((1, rng.randint(1, most), most)))
        ]
        needles.sort()
        values_of: dict[str, list[str]] = {}
        for _, key, value in needles:
            values_of.setdefault(key, []).append(value)
        introduction, questions = self._questions(
            length, rng, values_of, wording, most_questions, listed_share
        )
        hidden = [(depth, wording.state(key, value)) for depth, key, value in needles]
        distractors = (wording.state(*pair) for pair in zip(keys, values, strict=True))
        return self._around(
            haystack, length, rng, introduction, hidden, questions, wording.is_record, distractors
        )

    def lookup(self, length: int, rng: random.Random) -> Conversation:
        """Returns `needles` among hundreds of other needles, which differ in key and value only."""
        return self.needles(length, rng, NEEDLES)

    def variables(
        self,
        length: int,
        rng: random.Random,
        haystack: str | None = None,
        most_questions: int = MAX_QUESTIONS,
    ) -> Conversation:
        """Returns up to 4 chains of up to 4 hops, and a question for each, at most `most_questions`."""
        return self.chains(length, rng, haystack, most_questions).conversation

    def chains(
        self,
        length: int,
        rng: random.Random,
        haystack: str | None = None,
        most_questions: int = MAX_QUESTIONS,
    ) -> ChainSequence:
        """Returns a sequence of `variables` with its hidden assignments."""
        haystack = haystack or rng.choice((PROSE, NOISE))
        room = max(1, length // TOKENS_PER_CHAIN)
        num_chains = rng.choice([count for count in (1, 1, 2, 4) if count <= room])
        num_hops = rng.choice((1, 2, 3, 4, 4, 4))
        *chains, shown = draw_chains(rng, num_chains + 1, num_hops, self.split)
        wording = ChainWording.draw(rng, "train")
        asked = chains[:most_questions]
        questions = [wording.ask(rng, chain.value, chain.names) for chain in asked]
        introduction, before = wording.introduce(rng), ""
        if length >= ROOM_FOR_EXAMPLE and rng.random() < EXAMPLE_SHARE:
            filler = _filler(rng).first(EXAMPLE_SENTENCES)
            example = hide_among_lines(filler, scatter(rng, [shown], wording))
            question = wording.ask(rng, shown.value, shown.names)
            before = question.solved_after(f"{introduction}\n\n{example}") + "\n\n\n"
        hidden = scatter(rng, chains, wording)
        conversation = self._around(
            haystack, length, rng, before + introduction, hidden, questions, wording.is_record
        )
        assigned = [tuple(chain.assignments(wording)) for chain in chains]
        return ChainSequence(
            conversation,
            tuple(text for chain in assigned for text in chain),
            tuple(text for chain in assigned for text in chain[1:]),
            tuple(chain.value for chain in asked),
        )

    def passage(self, length: int, rng: random.Random) -> Conversation:
        """Returns prose of which a passage is quoted at the end and must be continued."""
        depth = 0.9 * rng.random()
        worded = templates("train")["passages"]
        introduction = rng.choice(worded["introductions"])
        question, opening = rng.choice(worded["questions"]), rng.choice(worded["openings"])
        return fit_prose(
            self.tokenizer,
            self.corpus,
            length,
            rng,
            lambda prose: conversation_tokens(
                self.tokenizer,
                f"{introduction}\n\n{prose}",
                [passage_question(prose, depth, question, opening)],
            ),
            "a text and a passage of it",
        )

    def counting(self, length: int, rng: random.Random) -> Conversation:
        """Returns a list with common words, or code words with Zipf-distributed counts."""
        if rng.choice((True, False)):
            return common_words_list(self.tokenizer, length, rng, self._keys(rng, uuids=False))
        return code_words_text(self.tokenizer, length, rng)

    def _keys(self, rng: random.Random, uuids: bool) -> Iterator[str]:
        """Yields distinct keys without end."""
        if uuids:
            return random_values(rng, "uuid")
        names = list(key_names(self.split))
        rng.shuffle(names)
        return chain(names, (f"{name}-{number}" for number in count(2) for name in names))

    def _questions(
        self,
        length: int,
        rng: random.Random,
        values_of: dict[str, list[str]],
        wording: NeedleWording,
        most_questions: int,
        listed_share: float,
    ) -> tuple[str, list[Question]]:
        """Returns the introduction of the text, and a question for each of some keys or for several at once."""
        most = min(
            len(values_of), most_questions, max(1, length // TOKENS_PER_QUESTION[wording.kind])
        )
        if len(values_of) > 1 and rng.random() < listed_share:
            together = rng.sample(sorted(values_of), min(len(values_of), rng.randint(2, 4)))
            every = [value for key in together for value in values_of[key]]
            return wording.introduce(rng, len(every)), [wording.ask(rng, together, every)]
        asked = rng.sample(sorted(values_of), rng.choice((rng.randint(1, most), most)))
        num_values = sum(len(values_of[key]) for key in asked)
        questions = [wording.ask(rng, [key], values_of[key]) for key in asked]
        return wording.introduce(rng, num_values), questions

    def _around(
        self,
        haystack: str,
        length: int,
        rng: random.Random,
        introduction: str,
        hidden: list[tuple[float, str]],
        questions: list[Question],
        on_lines: bool,
        distractors: Iterator[str] | None = None,
    ) -> Conversation:
        """Returns the longest haystack that fits, with hidden sentences and questions."""

        def around(text: str) -> Conversation:
            return conversation_tokens(self.tokenizer, f"{introduction}\n\n{text}", questions)

        what = f"a text with {len(hidden)} hidden sentence(s) and {len(questions)} question(s)"
        if haystack == PROSE:
            return fit_prose(
                self.tokenizer,
                self.corpus,
                length,
                rng,
                lambda prose: around(hide(prose, hidden, on_lines=on_lines)),
                what,
            )
        lines = Stream(distractors) if distractors and haystack == NEEDLES else _filler(rng)
        return fit_units(
            length, lambda size: around(hide_among_lines(lines.first(size), hidden)), what
        )


def _filler(rng: random.Random) -> Stream[str]:
    """Returns endlessly repeated short sentences."""
    return Stream(cycle(filler_sentences(rng, rng.choice(FILLER_SENTENCES))))


def _draw(shares: dict[str, float], rng: random.Random) -> str:
    [drawn] = rng.choices(list(shares), weights=list(shares.values()))
    return drawn


def passage_question(prose: str, depth: float, question: str, opening: str) -> Question:
    """Quotes the beginning of a sentence near a depth from 0 to 1 and asks for its continuation.

    Args:
        prose: the text.
        depth: depth of the sentence.
        question: template with a field `quote`.
        opening: opening words of the answer.
    """
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
    return pose(question, opening, rest, quote=quote)
