"""Small layers, and a clock with given times."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rtpurbo.benchmarks.layer import LayerShape
from rtpurbo.benchmarks.session import Session
from rtpurbo.config import AttentionRule

CPU = torch.device("cpu")
RULE = AttentionRule(
    sliding_window=32,
    retrieval_window=16,
    block_size=16,
    query_block_size=32,
    prefill_mode="row_peak",
)
# Heads of both kinds of KV heads: the second one is windowed.
SHAPE = LayerShape(4, 2, 16, (1,))


@dataclass
class FakeClock:
    """Runs every call once and returns given times.

    Attributes:
        answers: milliseconds of the first calls; the last one is repeated.
        repeats: requested numbers of calls.
    """

    answers: list[float] = field(default_factory=lambda: [5.0])
    repeats: list[int] = field(default_factory=list)
    peak: int | None = None

    def first(self, call):
        call()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def times(self, call, repeats):
        self.repeats.append(repeats)
        return [float(number + 1) for number in range(repeats)]

    def memory(self):
        return None if self.peak is None else 100

    def peak_memory(self):
        return self.peak

    def reset_peak(self):
        pass


def session(**options):
    return Session(CPU, clock=options.pop("clock", FakeClock()), **options)


def found(session):
    """Last record of each implementation, by name."""
    return {record.implementation: record for record in session.results.records}
