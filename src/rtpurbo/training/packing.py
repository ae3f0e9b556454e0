"""Packing of training sequences, and the queries of each that stage 1 trains on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training.sequences import TrainingSequence


@dataclass(frozen=True)
class QueryChoice:
    """Queries that stage 1 trains on, with their weights.

    Attributes:
        positions: int64 [queries], ascending positions in the packed sequence.
        weights: fp32 [queries], factor of a query's loss in the minimised loss.
        report_weights: fp32 [queries], factor of a query's loss in the reported loss of its document; 0 for
            queries that were added because they predict an answer.
        documents: int64 [queries], number of the query's document.
    """

    positions: Tensor
    weights: Tensor
    report_weights: Tensor
    documents: Tensor

    def part(self, chunk: slice) -> QueryChoice:
        """Returns a slice of the queries."""
        return QueryChoice(*(values[chunk] for values in vars(self).values()))


def pack(sequences: Sequence[TrainingSequence], longest: int) -> Iterator[slice]:
    """Yields slices of consecutive sequences with at most `longest` tokens, or of a single longer sequence."""
    start, tokens = 0, 0
    for number, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        if number > start and tokens + length > longest:
            yield slice(start, number)
            start, tokens = number, 0
        tokens += length
    if sequences:
        yield slice(start, len(sequences))


def choose_queries(
    sequences: Sequence[TrainingSequence],
    rule: AttentionRule,
    settings: IndexerTrainingSettings,
    seeds: Sequence[str],
    device: torch.device | str,
) -> QueryChoice:
    """Draws queries that have far keys, or takes all of them, and adds every query that predicts an answer.

    Only one query in hundreds predicts an answer, but those need retrieval most, so every step trains on
    them. Each of the two kinds counts by its mean over a document, whatever else is packed with it.
    """
    total = sum(len(sequence.input_ids) for sequence in sequences)
    weights, report_weights = torch.zeros(total), torch.zeros(total)
    documents = torch.zeros(total, dtype=torch.int64)
    chosen = torch.zeros(total, dtype=torch.bool)
    start = 0
    for number, (sequence, seed) in enumerate(zip(sequences, seeds, strict=True)):
        length = len(sequence.input_ids)
        documents[start : start + length] = number
        first_far = min(rule.num_sink_tokens + rule.near_window, length)
        drawn = torch.arange(first_far, length)
        if settings.queries_per_step is not None and settings.queries_per_step < drawn.numel():
            generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(56))
            order = torch.randperm(drawn.numel(), generator=generator)
            drawn = drawn[order[: settings.queries_per_step]]
        drawn = drawn + start
        answers = torch.arange(length - 1 - sequence.num_answer_tokens, length - 1) + start
        weights[drawn] += 1 / max(1, drawn.numel())
        report_weights[drawn] += 1 / max(1, drawn.numel())
        weights[answers] += settings.answer_weight / max(1, answers.numel())
        chosen[drawn] = chosen[answers] = True
        start += length
    positions = chosen.nonzero()[:, 0]
    choice = (positions, weights[positions], report_weights[positions], documents[positions])
    return QueryChoice(*(values.to(device) for values in choice))
