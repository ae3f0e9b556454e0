"""Long documents with instructions of many kinds, and the answers that the model itself gives."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.prompts import decode
from rtpurbo.data.texts import SENTENCE_END, Prose, begin_ids, encode
from rtpurbo.data.wordings import fill, templates
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import Progress, no_progress
from rtpurbo.training.chat_template import UserTurn
from rtpurbo.training.conversations import ANSWER_SAMPLING, write_answers
from rtpurbo.training.sequences import TrainingSequence

LEAST_PROSE = 0.5
"""Least share of a prompt that is prose; a shorter document asks for a larger length."""

BATCH_TOKENS = 131072
"""Tokens of all prompts that are answered at a time."""

PHRASE_WORDS, PHRASE_CHARACTERS = (4, 8), 80
"""Words of a phrase that an instruction quotes, from the first to the second, and its most characters."""


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
    """Prose of given lengths, an instruction after it, and the model's own answer.

    Prompts of one length have exactly as many tokens, so that a batch needs no padding. Half of the
    answers are greedy, the others sampled.

    Args:
        model: dense, before it is made sparse: generation needs a cache, which `running_dense` has not.
        tokenizer: the model's; its chat template is used if it has one.
        corpus: where the prose comes from.
        lengths: tokens of prompt and longest answer together; documents take them in turn.
        count: documents.
        max_answer_tokens: the most tokens of an answer; a quarter of a short length.
        seed: of everything; the same one gives the same sequences on a CPU.
        batch_tokens: the most tokens of all prompts of a batch, if it has more than one.
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
    """A document and an instruction as exactly `length` tokens, up to where the answer begins.

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
        start, end = [*begin_ids(tokenizer), *encode(tokenizer, introduction)], "\n\n"
    room = max(1, length - len(start))
    prose_ids = corpus.sample_tokens(tokenizer, room, rng)
    # What is quoted must not be cut off below, where the instruction takes its room.
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
    """The first words of a random sentence, or any words where there are no sentences."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text))]
    following = text[rng.choice(starts[:-1] or starts) :].split()
    return " ".join(following[: rng.randint(*PHRASE_WORDS)])[:PHRASE_CHARACTERS]


def _word(text: str, rng: random.Random) -> str:
    """A random long word, or any word where none is long; where no spaces are written, some characters."""
    return rng.choice(re.findall(r"[^\W\d_]{6,24}", text) or re.findall(r"\S{1,24}", text) or [""])
