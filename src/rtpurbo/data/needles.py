"""Needles in a haystack: questions whose answer hides far back, and documents to calibrate on."""

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
from rtpurbo.data.texts import Prose, begin_ids, encode
from rtpurbo.data.wordings import NeedleWording, fill, pick, templates
from rtpurbo.data.words import NAMES, Split, key_names, words_of
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RetrievalExample:
    """A long prompt that asks for something hidden in it, up to where the answer must begin.

    Attributes:
        prompt_ids: the tokens of the prompt, ending with the opening words of the answer.
        answer_ids: the tokens with which a right answer goes on.
        answers: the strings that a right answer contains, in the order of the text.
        kind: "single", "multi_key" (other keys distract), "multi_value" (the key has several
            numbers), "multi_key_multi_value" or "variable_tracking".
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    answers: list[str]
    kind: str

    @classmethod
    def of(cls, conversation: Conversation, answers: list[str], kind: str) -> RetrievalExample:
        """The example that a conversation with one question is."""
        [(start, _)] = conversation.answer_spans
        ids = conversation.input_ids
        return cls(ids[:start], ids[start:], answers, kind)

    def conversation(self) -> Conversation:
        """Prompt and answer as a conversation with one question."""
        ids = [*self.prompt_ids, *self.answer_ids]
        return Conversation(ids, [(len(self.prompt_ids), len(ids))])


@dataclass(frozen=True)
class CalibrationDocument:
    """Prose in which the same tokens stand twice, near the beginning and at the very end.

    Attributes:
        input_ids: the tokens of the document.
        early_span: the first and the one-past-the-last index of the early needle.
        late_span: the same for the late needle; `input_ids` agrees on both spans.
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

    The test split is worded as RULER is, the training split in one of many other ways.

    A tokenizer with a chat template gets the text and the question as the user's turn and the
    opening words of the answer as the assistant's.

    Args:
        tokenizer: turns the text into tokens.
        corpus: where the prose comes from.
        length: the most tokens that prompt and answer may have together; they have at most 1 %
            or 16 tokens, whichever is more, less.
        rng: the source of all randomness.
        num_keys: how many keys have numbers; all but one distract.
        num_values: how many numbers the queried key has.
        depth: where the (first) needle of the queried key stands, from 0 (the beginning of the
            prose) to 1 (its end); random if None.
        split: whose keys and wordings to draw from.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    if num_keys < 1 or num_values < 1:
        raise RTPurboError("A retrieval example needs at least one key and one value.")
    if depth is not None and not 0 <= depth <= 1:
        raise RTPurboError(f"The depth of a needle must lie between 0 and 1, not be {depth}.")

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
        f"A retrieval example with {len(keys)} needle(s)",
    )
    kinds = ["multi_key"] * (num_keys > 1) + ["multi_value"] * (num_values > 1)
    return RetrievalExample.of(conversation, answers, "_".join(kinds) or "single")


def random_values(rng: random.Random, kind: str = "number", num_digits: int = 7) -> Iterator[str]:
    """Numbers of so many digits or UUIDs (`kind` "uuid"), without end, nothing twice."""
    given: set[str] = set()
    while True:
        if kind == "uuid":
            drawn = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        else:
            drawn = str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))
        if drawn not in given:
            given.add(drawn)
            yield drawn


def is_correct(example: RetrievalExample, generated_text: str) -> bool:
    """Whether every answer stands in the generated text, as a number or word of its own."""
    found = set(re.findall(r"\d+|[^\W\d_]+", generated_text))
    return found.issuperset(example.answers)


def make_calibration_document(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    length: int,
    rng: random.Random,
    depth: float = 0.1,
) -> CalibrationDocument:
    """Puts the same made-up sentences near the beginning and at the end of prose.

    A head that retrieves looks back from the late needle to the early one.

    Args:
        tokenizer: turns the text into tokens.
        corpus: where the prose comes from.
        length: how many tokens the document has, exactly.
        rng: the source of all randomness.
        depth: where the early needle stands, as a part of the prose; it is moved to the end of a
            sentence if one is near.

    Raises:
        RTPurboError: `length` leaves no room for the prose, or `corpus` is too short.
    """
    start_ids = begin_ids(tokenizer)
    break_ids = encode(tokenizer, "\n\n")
    needle_ids = encode(tokenizer, _calibration_needle(rng))
    # The early needle needs a paragraph break on both sides, the late one before it.
    room = length - len(start_ids) - 3 * len(break_ids) - 2 * len(needle_ids)
    if room < len(needle_ids):
        least = length - room + len(needle_ids)
        raise RTPurboError(
            f"A calibration document does not fit into {length} tokens; "
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
    """Made-up sentences that nobody can guess, 30 to 60 tokens long with usual tokenizers."""
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
    """The first index from `position` on that follows the end of a sentence, if one is near."""
    for index in range(max(1, position), min(position + 64, len(token_ids))):
        if decode(tokenizer, [token_ids[index - 1]]).rstrip().endswith((".", "!", "?")):
            return index
    return position
