"""Measurements of a test, whole or in parts that several processes took, and their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.reads import reads_of
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.samples import Outcome, SampleRecord


@dataclass(frozen=True)
class CaseResult:
    """All that a policy made of a test.

    Attributes:
        test: which.
        records: one for each metric.
        samples: the questions behind them, with their answers.
    """

    test: Case
    records: list[Record]
    samples: list[SampleRecord]


@dataclass(frozen=True)
class Part:
    """The measurements of one policy on consecutive questions of a test, or on all of them.

    Attributes:
        test: the whole test.
        policy: its name.
        seed: of the questions.
        budget: the far tokens that the policy was told to read; None if it decides.
        outcomes: one for each metric.
        reads: float32 [4, queries] as `ReadMeter.measured` returns it; an array, since tensors would
            need shared memory between processes.
        kv_bytes: size of the cache of one sequence; None where tests have no length.
    """

    test: Case
    policy: str
    seed: int
    budget: int | None
    outcomes: list[Outcome]
    reads: NDArray[np.float32]
    kv_bytes: int | None


def joined(parts: Sequence[Part]) -> CaseResult:
    """Returns the records of a test from all its parts.

    Args:
        parts: in the order of their questions. More than one only of tests with a single metric, whose
            score is the mean of its questions.
    """
    first = parts[0]
    place = (first.test.suite, first.test.task, first.test.context_length, first.policy)
    outcomes = first.outcomes
    if len(parts) > 1:
        samples = [sample for part in parts for sample in part.outcomes[0].samples]
        outcomes = [Outcome.of(samples, first.outcomes[0].metric)]
    reads = reads_of(np.concatenate([part.reads for part in parts], axis=1))
    records = [
        Record(
            *place,
            samples=outcome.count,
            score=outcome.score,
            far_tokens_read=reads.far_share,
            kv_bytes=first.kv_bytes,
            ci95=outcome.ci95,
            tokens_read_mean=reads.tokens_mean,
            tokens_read_p50=reads.tokens_p50,
            tokens_read_p95=reads.tokens_p95,
            mass_kept=reads.mass_kept,
            measured_rows=reads.rows,
            far_tokens_histogram=reads.far_histogram,
            far_token_budget=first.budget,
            metric=outcome.metric,
            far_tokens_mean=reads.far_tokens_mean,
            far_rows=reads.far_rows,
        )
        for outcome in outcomes
    ]
    kept = [
        SampleRecord(*place, first.seed, number, sample, outcome.metric)
        for outcome in outcomes
        for number, sample in enumerate(outcome.samples)
    ]
    return CaseResult(first.test, records, kept)
