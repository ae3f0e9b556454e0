"""Materials of haystacks: words, prose, passages."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from rtpurbo.data.texts import SENTENCE_END, TextCorpus
from rtpurbo.evaluation.ruler.questions import (
    QuestionSet,
    built_in_questions,
    read_hotpotqa,
    read_squad,
)
from rtpurbo.evaluation.ruler.vocabulary import Vocabulary, load_vocabulary

MOST_WORDS = 1_000_000
"""Maximum number of words of a corpus that are used; no context is longer."""

NOISE = (
    "The pond is still.",
    "The path is long.",
    "The bread is warm.",
    "Off we go.",
    "And home again we come.",
)
"""Sentences of a line of noise, five short ones as in RULER."""

# Words that are searched for the beginning of a sentence; lists and code have none.
WORDS_TO_A_SENTENCE = 200


@dataclass(frozen=True)
class Materials:
    """Materials of haystacks.

    Attributes:
        vocabulary: words of keys and lists.
        essay: words of prose in order, with punctuation.
        single_hop: questions that one passage answers.
        two_hop: questions that need two passages.
    """

    vocabulary: Vocabulary
    essay: tuple[str, ...]
    single_hop: QuestionSet
    two_hop: QuestionSet

    @classmethod
    def of(
        cls,
        corpus: TextCorpus,
        squad: str | Path | None = None,
        hotpotqa: str | Path | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> Materials:
        """Returns the materials of a run.

        Args:
            corpus: prose.
            squad: file in SQuAD's format for `qa_1`; None for the built-in questions.
            hotpotqa: file in HotpotQA's distractor format for `qa_2`; None for the built-in questions.
            vocabulary: words; None for those of `load_vocabulary`.

        Raises:
            RTPurboError: a file is missing or of another format.
        """
        words = (word for document in corpus.documents for word in document.split())
        return cls(
            vocabulary or load_vocabulary(),
            tuple(islice(words, MOST_WORDS)),
            built_in_questions("single_hop") if squad is None else read_squad(squad),
            built_in_questions("two_hop") if hotpotqa is None else read_hotpotqa(hotpotqa),
        )

    def prose(self, rng: random.Random) -> Iterator[str]:
        """Yields the words of the essay cyclically from the start of a random sentence on."""
        start = rng.randrange(len(self.essay))
        for place in range(start, min(start + WORDS_TO_A_SENTENCE, len(self.essay))):
            # The pattern needs the space after the word.
            if SENTENCE_END.search(f"{self.essay[place - 1]} "):
                start = place
                break
        return (self.essay[place % len(self.essay)] for place in count(start))


def first_words(text: str, number: int) -> str:
    """Returns the first words of a text with their spaces and line breaks."""
    ends = [match.end() for match in islice(re.finditer(r"\S+", text), number)]
    return text[: ends[-1]] if ends else ""


def noise_lines(num_sentences: int) -> list[str]:
    """Returns repeated lines of noise of so many sentences; the last line may be incomplete."""
    whole, rest = divmod(num_sentences, len(NOISE))
    return [" ".join(NOISE)] * whole + [" ".join(NOISE[:rest])] * bool(rest)
