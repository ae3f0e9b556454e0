"""Chain score of a query head: attention to earlier assignments in a chain of variables.

The retrieval score measures attention from a sentence to its earlier copy. A chain needs more: from an
assignment to the one before it, from the value in the question to the first assignment, and from the
answer to all of them. Without the heads that do this, accuracy at 32K is lost (docs/experiment-log.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.calibration.scores import attention_of_queries
from rtpurbo.data.long_range import NOISE, LongRangeMix
from rtpurbo.data.prompts import decode
from rtpurbo.data.texts import Prose
from rtpurbo.errors import RTPurboError
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layer import LayerObservation
from rtpurbo.models.sparsify import observing

NEAR = 256
"""Attention to tokens within this distance is not counted."""

BUSIEST = 0.25
"""Share of the queries that are counted, those with the most attention: a head may act on one token of a line."""


@dataclass(frozen=True)
class ChainDocument:
    """Chains of variables among noise sentences, and a question about one chain with its answer.

    Attributes:
        input_ids: tokens of the document.
        hidden: indices of the tokens of assignments.
        queries: indices of the queries that need earlier tokens, by kind.
    """

    input_ids: list[int]
    hidden: list[int]
    queries: dict[str, list[int]]


def make_chain_document(
    tokenizer: PreTrainedTokenizerBase, corpus: Prose, length: int, rng: random.Random
) -> ChainDocument:
    """Draws a training sequence, with the indices of its assignments and of the queries that need them.

    Raises:
        RTPurboError: the tokenizer does not return the characters of its tokens.
    """
    sequence = LongRangeMix(tokenizer, corpus).chains(length, rng, NOISE, most_questions=1)
    drawn = sequence.conversation
    text = decode(tokenizer, drawn.input_ids)
    if not tokenizer.is_fast:
        raise RTPurboError(
            "the chain score needs a fast tokenizer: choose calibration.ranking=gates or induction."
        )
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    if found["input_ids"] != drawn.input_ids:
        raise RTPurboError(
            "the tokenizer encodes the text of its own tokens differently, so the chain score cannot be "
            "computed: choose calibration.ranking=gates or induction."
        )

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
    """Returns start and end of a part of a text, searched from an index on."""
    start = text.index(part, after)
    return start, start + len(part)


def chain_scores(model: PreTrainedModel, document: ChainDocument) -> dict[int, Tensor]:
    """Returns the attention to distant assignments, as the mean over the three kinds of queries.

    Only these queries are computed, so no n x n matrix is made.

    Args:
        model: dense, on any device.
        document: chains and a question.

    Returns:
        For each converted layer, fp32 [num_attention_heads] from 0 to 1 on the CPU.
    """
    scores: dict[int, Tensor] = {}

    def score_layer(seen: LayerObservation) -> None:
        looked = [
            _looked_back(seen, places, document.hidden) for places in document.queries.values()
        ]
        scores[seen.layer] = torch.stack(looked).mean(0)

    input_ids = torch.tensor([document.input_ids], device=model.device)
    with torch.no_grad(), observing(model, score_layer):
        decoder_of(model)(input_ids, use_cache=False)
    return scores


def _looked_back(seen: LayerObservation, places: Sequence[int], hidden: Sequence[int]) -> Tensor:
    """Returns the mean attention of the `BUSIEST` queries to distant hidden tokens: [heads]."""
    asked = torch.tensor(places, device=seen.keys.device)
    wanted = torch.tensor(hidden, device=seen.keys.device)
    is_far = asked[:, None] - wanted > NEAR
    mass = (attention_of_queries(seen, asked)[..., wanted] * is_far).sum(-1)
    return mass.topk(max(1, int(BUSIEST * len(places))), -1).values.mean(-1).cpu()
