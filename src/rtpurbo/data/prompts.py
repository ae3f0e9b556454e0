"""Long prompts: prose with something hidden in it, and questions about it with their answers, as tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from rtpurbo.data.fitting import largest_that_fits
from rtpurbo.data.texts import SENTENCE_END, Prose, begin_ids, encode
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A question, the words that open its answer and give nothing away, and the answer itself."""

    question: str
    opening: str
    answer: str

    def solved_after(self, text: str) -> str:
        """What it is about, the question and the answer, as one text."""
        return f"{text}\n\n{self.question}\n\n{self.opening}{self.answer}"


@dataclass(frozen=True)
class Conversation:
    """Tokens of a text and of questions about it, each with its answer; the last answer ends it.

    Attributes:
        input_ids: all of it.
        answer_spans: for each question the first and the one-past-the-last index of its answer,
            opening words left out.
    """

    input_ids: list[int]
    answer_spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.input_ids)


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, context: str, questions: Sequence[Question]
) -> Conversation:
    """The tokens of a text followed by questions and answers.

    A tokenizer with a chat template gets the text and the first question as the user's first turn,
    the other questions as later ones, and the answers as the assistant's.

    Args:
        tokenizer: turns the text into tokens.
        context: what the questions are about, and what introduces it.
        questions: at least one.
    """
    input_ids: list[int] = []
    answer_spans: list[tuple[int, int]] = []
    messages: list[dict[str, str]] = []
    for number, asked in enumerate(questions):
        turn = asked.question if number else f"{context}\n\n{asked.question}"
        messages.append({"role": "user", "content": turn})
        if tokenizer.chat_template:
            # Templates of models that can think out loud know the last option; others ignore it.
            rendered = str(
                tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
            # What came before has its tokens already.
            new = rendered.rpartition(messages[-2]["content"])[2] if number else rendered
            input_ids += encode(tokenizer, new)
        else:
            before = "\n\n" if number else ""
            input_ids += [] if number else begin_ids(tokenizer)
            input_ids += encode(tokenizer, f"{before}{turn}\n\n")

        # What follows the opening words is found by encoding both at once: encoded alone, an
        # answer may begin with other tokens.
        opening_ids = encode(tokenizer, asked.opening)
        both_ids = encode(tokenizer, asked.opening + asked.answer)
        shared = 0
        while shared < len(opening_ids) and opening_ids[shared] == both_ids[shared]:
            shared += 1
        answer_spans.append((len(input_ids) + shared, len(input_ids) + len(both_ids)))
        input_ids += both_ids
        messages.append({"role": "assistant", "content": asked.opening + asked.answer})
    return Conversation(input_ids, answer_spans)


def fit_prose(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    tokens_around: Callable[[str], Conversation],
    what: str,
) -> Conversation:
    """Fills a conversation with as much prose as fits.

    Args:
        tokenizer: turns the text into tokens.
        corpus: where the prose comes from.
        length: the most tokens of the whole; it has at most 1 % or 16 tokens, whichever is more,
            less.
        rng: the source of all randomness.
        tokens_around: makes the conversation around some prose, always the same around the same.
        what: what error messages call the whole, capitalised.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    frame = len(tokens_around(""))
    room = length - frame
    if room < frame / 2:
        raise RTPurboError(
            f"{what} does not fit into {length} tokens; ask for a length of at least {2 * frame}."
        )
    # Decoded and encoded again amid the needles, the prose changes its length by a few tokens:
    # begin with too many and cut.
    prose_ids = corpus.sample_tokens(tokenizer, room + 32, rng)
    while True:
        conversation = tokens_around(decode(tokenizer, prose_ids).strip())
        excess = len(conversation) - length
        if excess <= 0:
            return conversation
        del prose_ids[-excess:]


def fit_units(length: int, tokens_around: Callable[[int], Conversation], what: str) -> Conversation:
    """Fills a conversation with as many units of a haystack as fit, at least one.

    Args:
        length: the most tokens of the whole.
        tokens_around: makes the conversation around so many units; more make it longer.
        what: what error messages call the whole, capitalised.

    Raises:
        RTPurboError: `length` leaves no room for one unit.
    """
    tokens_around = cache(tokens_around)
    smallest = len(tokens_around(1))
    if smallest > length:
        raise RTPurboError(
            f"{what} does not fit into {length} tokens; ask for a length of at least {smallest}."
        )
    return tokens_around(largest_that_fits(lambda size: len(tokens_around(size)), length, 1))


def hide(prose: str, sentences: Sequence[tuple[float, str]], *, on_lines: bool = False) -> str:
    """Puts sentences between those of `prose`, each at its depth from 0 to 1, in order.

    Args:
        prose: the haystack.
        sentences: depths and what is hidden there.
        on_lines: gives each a line of its own.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(prose)]
    # Text without sentences, such as a list of words, is cut between words, and without words
    # anywhere.
    spaces = [match.start() for match in re.finditer(r"\s", prose)]
    places = [0, *(ends or spaces or range(len(prose)))]
    pieces, start = [], 0
    for depth, sentence in sentences:
        place = min(places, key=lambda place: abs(place - depth * len(prose)))
        pieces += [prose[start:place], sentence]
        start = place
    separator = "\n" if on_lines else " "
    return separator.join(piece.strip(" ") for piece in [*pieces, prose[start:]] if piece)


def hide_among_lines(lines: Sequence[str], hidden: Sequence[tuple[float, str]]) -> str:
    """A text of lines and of those hidden among them, each at its depth from 0 to 1, in order."""
    return "\n".join(placed_among(lines, hidden))


def placed_among(texts: Sequence[str], placed: Sequence[tuple[float, str]]) -> list[str]:
    """Texts and others among them, each at its depth from 0 to 1, in order."""
    filled = list(texts)
    for depth, text in reversed(placed):
        filled.insert(round(depth * len(texts)), text)
    return filled


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of some tokens, nothing cleaned up."""
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
