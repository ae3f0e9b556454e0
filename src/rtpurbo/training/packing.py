"""Sequences packed one behind the other, and the rows of each that stage 1 learns from."""

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
class RowChoice:
    """Query rows that teach, and how much.

    Attributes:
        rows: int64 [rows], ascending places in the packed sequence.
        weights: fp32 [rows], factor of a row's loss in what is minimised.
        shares: fp32 [rows], its factor in the loss that is reported for its document; 0 for rows that
            are there because they answer a question.
        documents: int64 [rows], number of the row's document.
    """

    rows: Tensor
    weights: Tensor
    shares: Tensor
    documents: Tensor

    def part(self, chunk: slice) -> RowChoice:
        """Some of the rows."""
        return RowChoice(*(values[chunk] for values in vars(self).values()))


def pack(sequences: Sequence[TrainingSequence], longest: int) -> Iterator[slice]:
    """Slices of consecutive sequences that have at most so many tokens together, each at least one."""
    start, tokens = 0, 0
    for number, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        if number > start and tokens + length > longest:
            yield slice(start, number)
            start, tokens = number, 0
        tokens += length
    if sequences:
        yield slice(start, len(sequences))


def choose_rows(
    sequences: Sequence[TrainingSequence],
    rule: AttentionRule,
    settings: IndexerTrainingSettings,
    seeds: Sequence[str],
    device: torch.device | str,
) -> RowChoice:
    """Random rows with far keys, or all of them, and every row that answers a question.

    Rows that answer are one in hundreds, but they are what retrieval is for: a random choice would
    hardly ever meet them, so they are learnt from at every step. The mean over either kind of row of a
    document counts, whatever else it is packed with.

    Args:
        sequences: packed one behind the other.
        rule: sinks and window, beyond which keys are far.
        settings: `queries_per_step` and `answer_weight`.
        seeds: of the random choice in each sequence.
        device: where the rows will be used.
    """
    total = sum(len(sequence.input_ids) for sequence in sequences)
    weights, shares = torch.zeros(total), torch.zeros(total)
    documents = torch.zeros(total, dtype=torch.int64)
    chosen = torch.zeros(total, dtype=torch.bool)
    start = 0
    for number, (sequence, seed) in enumerate(zip(sequences, seeds, strict=True)):
        length = len(sequence.input_ids)
        documents[start : start + length] = number
        first_far = min(rule.num_sink_tokens + rule.near_window, length)
        rows = torch.arange(first_far, length)
        if settings.queries_per_step is not None and settings.queries_per_step < rows.numel():
            generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(56))
            rows = rows[
                torch.randperm(rows.numel(), generator=generator)[: settings.queries_per_step]
            ]
        rows = rows + start
        answers = torch.arange(length - 1 - sequence.num_answer_tokens, length - 1) + start
        weights[rows] += 1 / max(1, rows.numel())
        shares[rows] += 1 / max(1, rows.numel())
        weights[answers] += settings.answer_weight / max(1, answers.numel())
        chosen[rows] = chosen[answers] = True
        start += length
    rows = chosen.nonzero()[:, 0]
    choice = RowChoice(rows, weights[rows], shares[rows], documents[rows])
    return RowChoice(*(values.to(device) for values in vars(choice).values()))
