"""Needles in a haystack: retrieval questions, and calibration documents."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtpurbo.data.prompts import (
    Conversation,
    conversation_tokens,
    decode,
    fit_prose,
    hide,
)
from rtpurbo.data.texts import Prose, bos_ids, encode
from rtpurbo.data.wordings import NeedleWording, fill, pick, templates
from rtpurbo.data.words import NAMES, Split, key_names, words_of
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RetrievalExample:
    """Long prompt with a question about hidden text, and its answer.

    Attributes:
        prompt_ids: tokens of the prompt, up to and including the opening words of the answer.
        answer_ids: tokens of the correct answer after them.
        answers: strings that a correct answer contains, in the order of the text.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    answers: list[str]

    @classmethod
    def of(cls, conversation: Conversation, answers: list[str]) -> RetrievalExample:
        """Returns the example of a conversation with one question."""
        [(start, _)] = conversation.answer_spans
        ids = conversation.input_ids
        return cls(ids[:start], ids[start:], answers)

    def conversation(self) -> Conversation:
        """Returns prompt and answer as a conversation with one question."""
        ids = [*self.prompt_ids, *self.answer_ids]
        return Conversation(ids, [(len(self.prompt_ids), len(ids))])


@dataclass(frozen=True)
class CalibrationDocument:
    """Prose with two copies of a needle, near the beginning and at the end.

    Attributes:
        input_ids: tokens of the document.
        early_span: first and one-past-the-last index of the early needle.
        late_span: span of the late needle, with the same tokens.
    """

    input_ids: list[int]
    early_span: tuple[int, int]
    late_span: tuple[int, int]


def make_retrieval_example(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    num_keys: int = 1,
    num_values: int = 1,
    depth: float | None = None,
    split: Split = "test",
) -> RetrievalExample:
    """Hides numbers in prose and asks for those of one key.

    The test split uses RULER's wording, the training split one of many others. With a chat template, text and
    question are the user's turn and the opening words of the answer begin the assistant's.

    Args:
        tokenizer: the model's.
        corpus: source of the prose.
        length: maximum number of tokens of prompt and answer together, which is reached to within 1 % or
            16 tokens, whichever is more.
        rng: source of all randomness.
        num_keys: number of keys; all but one are distractors.
        num_values: number of values of the queried key.
        depth: depth of the (first) needle of the queried key, from 0 (beginning of the prose) to 1
            (end); random if None.
        split: split of keys and wordings.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    if num_keys < 1 or num_values < 1:
        raise RTPurboError("a retrieval example needs at least one key and one value.")
    if depth is not None and not 0 <= depth <= 1:
        raise RTPurboError(f"the depth of a needle must lie between 0 and 1, not be {depth}.")

    wording = NeedleWording.draw(rng, split)
    queried, *distractors = rng.sample(key_names(split), num_keys)
    keys = [queried] * num_values + distractors
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), len(keys))]
    depths = [rng.random() for _ in keys]
    if depth is not None:
        depths[0] = depth
    needles = sorted(
        (place, wording.state(key, number), key, number)
        for place, key, number in zip(depths, keys, numbers, strict=True)
    )
    answers = [number for _, _, key, number in needles if key == queried]
    hidden = [(place, sentence) for place, sentence, _, _ in needles]

    introduction = wording.introduce(rng, len(answers))
    question = wording.ask(rng, [queried], answers)
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
        f"a retrieval example with {len(keys)} needle(s)",
    )
    return RetrievalExample.of(conversation, answers)


def random_values(rng: random.Random, kind: str = "number", num_digits: int = 7) -> Iterator[str]:
    """Yields distinct numbers or UUIDs (`kind` "uuid") without end."""
    used: set[str] = set()
    while True:
        if kind == "uuid":
            drawn = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        else:
            drawn = str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))
        if drawn not in used:
            used.add(drawn)
            yield drawn


def is_correct(example: RetrievalExample, generated_text: str) -> bool:
    """True if every answer is in the generated text, as a separate number or word."""
    found = set(re.findall(r"\d+|[^\W\d_]+", generated_text))
    return found.issuperset(example.answers)


def make_calibration_document(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    depth: float = 0.1,
) -> CalibrationDocument:
    """Inserts the same invented sentences near the beginning and at the end of prose.

    A retrieval head attends from the late needle to the early one.

    Args:
        tokenizer: the model's.
        corpus: source of the prose.
        length: exact number of tokens of the document.
        rng: source of all randomness.
        depth: depth of the early needle in the prose, from 0 to 1; moved to the end of a nearby
            sentence.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    start_ids = bos_ids(tokenizer)
    break_ids = encode(tokenizer, "\n\n")
    needle_ids = encode(tokenizer, _calibration_needle(rng))
    # The early needle needs a paragraph break on both sides, the late one before it.
    room = length - len(start_ids) - 3 * len(break_ids) - 2 * len(needle_ids)
    if room < len(needle_ids):
        least = length - room + len(needle_ids)
        raise RTPurboError(
            f"a calibration document does not fit into {length} tokens; "
            f"ask for a length of at least {least}."
        )
    prose_ids = corpus.sample_tokens(tokenizer, room, rng)
    cut = _next_sentence_end(tokenizer, prose_ids, round(depth * room))

    before_early = start_ids + prose_ids[:cut] + break_ids
    early_start = len(before_early)
    input_ids = before_early + needle_ids + break_ids + prose_ids[cut:] + break_ids + needle_ids
    return CalibrationDocument(
        input_ids=input_ids,
        early_span=(early_start, early_start + len(needle_ids)),
        late_span=(length - len(needle_ids), length),
    )


def _calibration_needle(rng: random.Random) -> str:
    """Returns invented sentences that no model can guess, 30 to 60 tokens with common tokenizers."""
    adjectives, nouns = words_of("train")
    first_name, second_name = rng.sample(NAMES, 2)
    adjective, other_adjective = rng.sample(adjectives, 2)
    noun, other_noun, third_noun = rng.sample(nouns, 3)
    year, price, code = rng.randint(1700, 1999), rng.randint(100, 999), rng.randint(10**5, 10**6)
    return fill(
        pick(templates("train")["calibration"], rng),
        first=first_name,
        second=second_name,
        adjective=adjective,
        other_adjective=other_adjective,
        noun=noun,
        other_noun=other_noun,
        third_noun=third_noun,
        year=year,
        price=price,
        code=code,
    )


def _next_sentence_end(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], position: int
) -> int:
    """Returns the first index from `position` on after the end of a sentence, or `position` if none is near."""
    for index in range(max(1, position), min(position + 64, len(token_ids))):
        if decode(tokenizer, [token_ids[index - 1]]).rstrip().endswith((".", "!", "?")):
            return index
    return position
