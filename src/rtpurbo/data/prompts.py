"""Long prompts as tokens: prose with hidden sentences, questions and answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from rtpurbo.data.fitting import largest_that_fits
from rtpurbo.data.texts import SENTENCE_END, Prose, bos_ids, encode
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """Question, the opening words of its answer that reveal nothing, and the answer."""

    question: str
    opening: str
    answer: str

    def solved_after(self, text: str) -> str:
        """Returns a text with the question and its answer after it."""
        return f"{text}\n\n{self.question}\n\n{self.opening}{self.answer}"


@dataclass(frozen=True)
class Conversation:
    """Tokens of a text and of questions with answers, ending with the last answer.

    Attributes:
        input_ids: all tokens.
        answer_spans: for each question the first and the one-past-the-last index of its answer,
            without the opening words.
    """

    input_ids: list[int]
    answer_spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.input_ids)


def rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Returns messages in the chat template, up to the beginning of the answer; reasoning is off."""
    rendered = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=True,
        # Option of reasoning models' templates; others ignore it.
        enable_thinking=False,
    )
    return str(rendered)


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, context: str, questions: Sequence[Question]
) -> Conversation:
    """Returns the tokens of a text followed by questions and answers.

    With a chat template, the text and the first question are the user's first turn, the other questions later
    turns, and the answers the assistant's turns.

    Args:
        tokenizer: the model's.
        context: introduction and text.
        questions: at least one question.
    """
    input_ids: list[int] = []
    answer_spans: list[tuple[int, int]] = []
    messages: list[dict[str, str]] = []
    for number, asked in enumerate(questions):
        turn = asked.question if number else f"{context}\n\n{asked.question}"
        messages.append({"role": "user", "content": turn})
        if tokenizer.chat_template:
            rendered = rendered_chat(tokenizer, messages)
            # Earlier turns have been tokenized already.
            new = rendered.rpartition(messages[-2]["content"])[2] if number else rendered
            input_ids += encode(tokenizer, new)
        else:
            before = "\n\n" if number else ""
            input_ids += [] if number else bos_ids(tokenizer)
            input_ids += encode(tokenizer, f"{before}{turn}\n\n")

        # Opening words and answer are encoded together, because encoded alone an answer may begin with
        # other tokens.
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
        tokenizer: the model's.
        corpus: source of the prose.
        length: maximum number of tokens, which is reached to within 1 % or 16 tokens, whichever is more.
        rng: source of all randomness.
        tokens_around: deterministic function that returns the conversation around some prose.
        what: name of the conversation in error messages.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    frame = len(tokens_around(""))
    room = length - frame
    if room < frame / 2:
        raise RTPurboError(
            f"{what} does not fit into {length} tokens; ask for a length of at least {2 * frame}."
        )
    # Encoding the decoded prose among needles changes its length by a few tokens: start with too many
    # and cut.
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
        length: maximum number of tokens.
        tokens_around: returns the conversation around a number of units; more units make it longer.
        what: name of the conversation in error messages.

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
    """Inserts sentences between those of `prose`, each at its depth from 0 to 1, in order.

    Args:
        prose: the haystack.
        sentences: depths and inserted sentences.
        on_lines: put each on a separate line.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(prose)]
    # Text without sentences, such as a list of words, is cut between words, and text without spaces
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
    """Returns a text of lines with others inserted, each at its depth from 0 to 1, in order."""
    return "\n".join(placed_among(lines, hidden))


def placed_among(texts: Sequence[str], placed: Sequence[tuple[float, str]]) -> list[str]:
    """Returns texts with others inserted, each at its depth from 0 to 1, in order."""
    filled = list(texts)
    for depth, text in reversed(placed):
        filled.insert(round(depth * len(texts)), text)
    return filled


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Decodes tokens without cleaning up spaces."""
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
