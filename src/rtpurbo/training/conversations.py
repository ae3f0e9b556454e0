"""Training conversations in which the dense model writes both sides."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import bos_ids, encode
from rtpurbo.data.wordings import templates
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import Progress, no_progress
from rtpurbo.training.chat_template import UserTurn
from rtpurbo.training.generation import GREEDY, Sampling, generate_tokens
from rtpurbo.training.sequences import TrainingSequence

USER_SAMPLING = Sampling(1.0, 0.95)
ANSWER_SAMPLING = Sampling(0.7, 0.95)

OPENED_SHARE = 0.5
"""Share of user turns that begin with a given opening of a random kind, such as code or translation."""

MAX_ROUNDS = 6
"""Rounds of sampling after which fewer conversations than requested are returned."""

MIN_DISTINCT = 0.5
"""Minimum share of distinct word trigrams in a user turn; a turn below it is repetitive."""


def write_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    max_user_tokens: int = 192,
    max_answer_tokens: int = 384,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> list[TrainingSequence]:
    """Samples user turns after the chat template's user header, then the model's answers.

    Half of the user turns begin with an opening of a random kind. Half of the answers are greedy, the others
    sampled; each ends with its end-of-turn token unless it is too long. For a tokenizer without a chat
    template, free text is sampled instead.

    Args:
        model: dense, before it is made sparse: generation needs a cache, which `Runtime.dense` does not have.
        tokenizer: the model's.
        count: number of conversations; fewer are written if the model repeats itself.
        max_user_tokens: maximum number of tokens of a user turn.
        max_answer_tokens: maximum number of tokens of an answer, and of free text.
        seed: seed of all randomness; on a CPU, conversations are reproducible.
        batch_size: prompts of a batch.
        progress: called as ("conversations", written, count, {}) after each batch.

    Raises:
        RTPurboError: the chat template does not support a user message, or no user turn is usable.
    """
    rng = random.Random(f"conversations-{seed}")
    if tokenizer.chat_template:
        turn = UserTurn.of(tokenizer)
        user_texts = _user_turns(
            model, tokenizer, turn, count, max_user_tokens, rng, batch_size, progress
        )
        prompts = [encode(tokenizer, f"{turn.before}{text}{turn.after}") for text in user_texts]
    else:
        prompts = [_text_opening(tokenizer, rng) for _ in range(count)]
    return write_answers(
        model,
        tokenizer,
        prompts,
        max_answer_tokens,
        ANSWER_SAMPLING if tokenizer.chat_template else USER_SAMPLING,
        rng,
        batch_size=batch_size,
        stage="conversations",
        progress=progress,
    )


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_answer_tokens: int,
    sampling: Sampling,
    rng: random.Random,
    *,
    batch_size: int,
    stage: str,
    progress: Progress,
) -> list[TrainingSequence]:
    """Generates the dense model's answers to prompts, half of them greedily, the others with `sampling`.

    Prompts are batched by length, so that little or no padding is needed; `rng` draws each batch's seed, and `progress`
    is called as (stage, answered, prompts, {}) after it.

    Returns:
        Prompts with their answers, in the order of the prompts.
    """
    written: dict[int, TrainingSequence] = {}
    # Random halves, so that both contain prompts of all kinds and lengths.
    halves = list(range(len(prompts)))
    rng.shuffle(halves)
    middle = len(halves) // 2
    for numbers, chosen in ((halves[:middle], GREEDY), (halves[middle:], sampling)):
        numbers = sorted(numbers, key=lambda number: (len(prompts[number]), number))
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            answers = generate_tokens(
                model,
                tokenizer,
                [prompts[number] for number in batch],
                max_answer_tokens,
                chosen,
                seed=rng.getrandbits(31),
            )
            for number, answer in zip(batch, answers, strict=True):
                written[number] = TrainingSequence([*prompts[number], *answer], len(answer))
            progress(stage, len(written), len(prompts), {})
    return [written[number] for number in sorted(written)]


def _user_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: UserTurn,
    count: int,
    max_tokens: int,
    rng: random.Random,
    batch_size: int,
    progress: Progress,
) -> list[str]:
    """Returns distinct user turns that are neither empty nor repetitive.

    Raises:
        RTPurboError: no sampled turn is usable.
    """
    stops, header = turn.stop_tokens(tokenizer), encode(tokenizer, turn.before)
    kinds = templates("train")["user_turns"]
    kept: dict[str, str] = {}
    max_batches = MAX_ROUNDS * -(-count // batch_size)
    for _ in range(max_batches):
        if len(kept) >= count:
            break
        openings = [
            rng.choice(kinds[rng.choice(sorted(kinds))]) if rng.random() < OPENED_SHARE else ""
            for _ in range(min(batch_size, count))
        ]
        prompts = [
            encode(tokenizer, turn.before + opening) if opening else header for opening in openings
        ]
        batch = generate_tokens(
            model,
            tokenizer,
            prompts,
            max_tokens,
            USER_SAMPLING,
            seed=rng.getrandbits(31),
            stops=stops,
        )
        for opening, token_ids in zip(openings, batch, strict=True):
            has_ended = token_ids[-1] in stops or len(token_ids) < max_tokens
            # Decoded together, because some tokenizers drop a leading space.
            text = tokenizer.decode(
                [*encode(tokenizer, opening), *token_ids],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            text = turn.user_text(str(text))
            if not has_ended:
                text = _up_to_sentence_end(text)
            if is_usable(text, opening):
                kept.setdefault(" ".join(text.lower().split()), text)
        progress("user turns", min(len(kept), count), count, {})
    if not kept:
        raise RTPurboError(
            "the model writes no usable user turn after its chat template's header: train without "
            "conversations (--set stage2.mixture.conversations=0)."
        )
    return list(kept.values())[:count]


def is_usable(text: str, opening: str = "") -> bool:
    """True if a sampled user turn has text beyond its opening and is not repetitive."""
    words = text.split()
    if len(text) <= len(opening.strip()) or not re.search(r"\w", text):
        return False
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) >= MIN_DISTINCT * len(trigrams)


def _up_to_sentence_end(text: str) -> str:
    """Returns truncated text up to the last end of a sentence or line in its second half."""
    ends = [match.end() for match in re.finditer(r"[.!?\u3002\uff01\uff1f](?=\s)|(?=\n)", text)]
    return text[: ends[-1]] if ends and ends[-1] > len(text) / 2 else text


def _text_opening(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[int]:
    """Returns the BOS token, if there is one, and often a few words of a text."""
    start = bos_ids(tokenizer)
    options = templates("train")["openings_of_text"]
    opening = encode(tokenizer, rng.choice(options))
    while not start and not opening:
        opening = encode(tokenizer, rng.choice(options))
    return [*start, *opening]
