"""Training sequences of long documents, instructions of many kinds, and the dense model's own answers."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.prompts import decode
from rtpurbo.data.texts import SENTENCE_END, Prose, bos_ids, encode
from rtpurbo.data.wordings import fill, templates
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import Progress, no_progress
from rtpurbo.training.chat_template import UserTurn
from rtpurbo.training.conversations import ANSWER_SAMPLING, write_answers
from rtpurbo.training.sequences import TrainingSequence

LEAST_PROSE = 0.5
"""Minimum share of prose in a prompt."""

BATCH_TOKENS = 131072
"""Maximum number of tokens of the prompts of a batch."""

PHRASE_WORDS, PHRASE_CHARACTERS = (4, 8), 80
"""Minimum and maximum number of words of a quoted phrase, and its maximum number of characters."""


def write_document_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    lengths: Sequence[int],
    count: int,
    *,
    max_answer_tokens: int = 128,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = no_progress,
) -> list[TrainingSequence]:
    """Writes prose of given lengths, each with an instruction and the model's own answer.

    Prompts of one length have equal numbers of tokens, so that a batch needs no padding. Half of the
    answers are greedy, the others sampled.

    Args:
        model: dense, before it is made sparse: generation needs a cache, which `Runtime.dense` does not have.
        tokenizer: the model's; its chat template is used if it has one.
        corpus: source of the prose.
        lengths: tokens of prompt and longest answer together; documents cycle through them.
        count: number of documents.
        max_answer_tokens: maximum number of tokens of an answer, at most a quarter of the length.
        seed: seed of all randomness; on a CPU, sequences are reproducible.
        batch_tokens: maximum number of tokens of the prompts of a batch, if it has several.
        progress: called as ("documents", written, count, {}) after each batch.

    Returns:
        `count` sequences, document k of length `lengths[k % len(lengths)]`.

    Raises:
        RTPurboError: a length leaves no room for prose, or the corpus is too short.
    """
    by_length: dict[int, list[int]] = {}
    for number in range(count):
        by_length.setdefault(lengths[number % len(lengths)], []).append(number)
    written: dict[int, TrainingSequence] = {}
    for length, numbers in by_length.items():
        prompts = [
            document_prompt(
                tokenizer,
                corpus,
                length - _answer_tokens(length, max_answer_tokens),
                random.Random(f"documents-{seed}-{number}"),
            )
            for number in numbers
        ]
        before = len(written)
        sequences = write_answers(
            model,
            tokenizer,
            prompts,
            _answer_tokens(length, max_answer_tokens),
            ANSWER_SAMPLING,
            random.Random(f"document-answers-{seed}-{length}"),
            batch_size=max(1, batch_tokens // length),
            stage="documents",
            progress=lambda stage, done, _, figures, before=before: progress(  # type: ignore[misc]
                stage, before + done, count, figures
            ),
        )
        written.update(zip(numbers, sequences, strict=True))
    return [written[number] for number in range(count)]


def _answer_tokens(length: int, most: int) -> int:
    return min(most, length // 4)


def document_prompt(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> list[int]:
    """Returns a document and an instruction as exactly `length` tokens, up to the beginning of the answer.

    Raises:
        RTPurboError: `length` leaves no room for prose, or `corpus` is too short.
    """
    worded = templates("train")["documents"]
    introduction, instruction = (
        rng.choice(worded[part]) for part in ("introductions", "instructions")
    )
    if tokenizer.chat_template:
        turn = UserTurn.of(tokenizer)
        start, end = encode(tokenizer, turn.before + introduction), turn.after
    else:
        start, end = [*bos_ids(tokenizer), *encode(tokenizer, introduction)], "\n\n"
    room = max(1, length - len(start))
    prose_ids = corpus.sample_tokens(tokenizer, room, rng)
    # Quotes come from the part of the prose that is kept below, where the instruction shortens it.
    quotable = decode(tokenizer, prose_ids[: int(LEAST_PROSE * room)])
    instruction = fill(instruction, phrase=_phrase(quotable, rng), word=_word(quotable, rng))
    asked = encode(tokenizer, f"\n\n{instruction}{end}")
    room -= len(asked)
    if room < LEAST_PROSE * length:
        raise RTPurboError(
            f"a document with an instruction does not fit into {length} tokens; ask for a length of "
            f"at least {2 * (len(start) + len(asked))}."
        )
    return [*start, *prose_ids[:room], *asked]


def _phrase(text: str, rng: random.Random) -> str:
    """Returns the first words of a random sentence, or any words of a text without sentences."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text))]
    following = text[rng.choice(starts[:-1] or starts) :].split()
    return " ".join(following[: rng.randint(*PHRASE_WORDS)])[:PHRASE_CHARACTERS]


def _word(text: str, rng: random.Random) -> str:
    """Returns a random long word, or any word if there is none; some characters of a text without spaces."""
    return rng.choice(re.findall(r"[^\W\d_]{6,24}", text) or re.findall(r"\S{1,24}", text) or [""])
