"""The chain score of a query head: how much it looks back where a chain of variables is followed.

The retrieval score asks which heads look from a sentence back to its copy. A chain asks for more: from an
assignment the one before it must be found, from the value in the question the first of them, and all from
the answer. What that needs and copies do not is lost at 32K (docs/experiment-log.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.calibration.scores import attention_of_rows
from rtpurbo.data.long_range import NOISE, LongRangeMix
from rtpurbo.data.prompts import decode
from rtpurbo.data.texts import Prose
from rtpurbo.errors import RTPurboError
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layer import LayerObservation
from rtpurbo.models.sparsify import observing

NEAR = 256
"""Tokens so near do not count as looked back at."""

BUSIEST = 0.25
"""A head may act on one token of a line: of the rows, this share that looks back most counts."""


@dataclass(frozen=True)
class ChainDocument:
    """Chains in dull sentences, and a question about one with its answer.

    Attributes:
        input_ids: all of it.
        hidden: indices of the tokens of assignments.
        rows: indices of those tokens that have to look back, by what they look for.
    """

    input_ids: list[int]
    hidden: list[int]
    rows: dict[str, list[int]]


def make_chain_document(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> ChainDocument:
    """One of training's sequences, with the places of what is hidden and asked.

    Raises:
        RTPurboError: the tokenizer does not tell which characters its tokens are.
    """
    sequence = LongRangeMix(tokenizer, corpus).chains(length, rng, NOISE, most_questions=1)
    drawn = sequence.conversation
    text = decode(tokenizer, drawn.input_ids)
    if not tokenizer.is_fast:
        raise RTPurboError("chains can be found with fast tokenizers alone.")
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    if found["input_ids"] != drawn.input_ids:
        raise RTPurboError("the tokenizer reads the text of its own tokens as other ones.")

    def tokens(places: Iterable[tuple[int, int]]) -> list[int]:
        return [
            index
            for start, stop in places
            for index, (first, end) in enumerate(found["offset_mapping"])
            if first < stop and end > start
        ]

    assigned = {each: _place(text, each, 0) for each in sequence.assignments}
    after = max(end for _, end in assigned.values())
    [value] = sequence.values
    return ChainDocument(
        drawn.input_ids,
        tokens(sorted(assigned.values())),
        {
            "value": tokens([_place(text, value, after)]),
            "assignment": tokens(sorted(assigned[each] for each in sequence.copies)),
            "answer": [i for first, end in drawn.answer_spans for i in range(first - 1, end - 1)],
        },
    )


def _place(text: str, part: str, after: int) -> tuple[int, int]:
    """The first and the one-past-the-last character of a part of a text, from a place on."""
    start = text.index(part, after)
    return start, start + len(part)


def chain_scores(model: PreTrainedModel, document: ChainDocument) -> dict[int, Tensor]:
    """The attention that goes far back to assignments, mean over the three kinds of rows.

    Only these rows are computed, so no n x n matrix is made.

    Args:
        model: dense, on any device.
        document: chains and a question.

    Returns:
        For each converted layer, fp32 [num_attention_heads] from 0 to 1 on the CPU.
    """
    scores: dict[int, Tensor] = {}

    def score_layer(seen: LayerObservation) -> None:
        looked = [_looked_back(seen, rows, document.hidden) for rows in document.rows.values()]
        scores[seen.layer] = torch.stack(looked).mean(0)

    input_ids = torch.tensor([document.input_ids], device=model.device)
    with torch.no_grad(), observing(model, score_layer):
        decoder_of(model)(input_ids, use_cache=False)
    return scores


def _looked_back(seen: LayerObservation, rows: Sequence[int], hidden: Sequence[int]) -> Tensor:
    """The mass on hidden tokens far before these rows, mean over the busiest of them: [heads]."""
    asked = torch.tensor(rows, device=seen.keys.device)
    wanted = torch.tensor(hidden, device=seen.keys.device)
    is_far = asked[:, None] - wanted > NEAR
    mass = (attention_of_rows(seen, asked)[..., wanted] * is_far).sum(-1)
    return mass.topk(max(1, int(BUSIEST * len(rows))), -1).values.mean(-1).cpu()
