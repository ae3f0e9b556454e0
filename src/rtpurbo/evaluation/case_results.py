"""Measurements of a case, in one or several parts, and the records made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.reads import reads_of
from rtpurbo.evaluation.records import CaseResult, Record
from rtpurbo.evaluation.samples import Outcome, SampleRecord


@dataclass(frozen=True)
class Part:
    """Measurements of one policy on consecutive questions of a case, or on all of them.

    Attributes:
        test: the whole case.
        policy: name.
        seed: of the questions.
        budget: far tokens per query that the policy was given; None if it has no budget.
        outcomes: one per metric.
        reads: float32 [4, queries] from `ReadMeter.measured`; an array, because tensors would
            need shared memory between processes.
        kv_bytes: cache size of one sequence in bytes; None where cases have no length.
        first: number of the first question.
    """

    test: Case
    policy: str
    seed: int
    budget: int | None
    outcomes: list[Outcome]
    reads: NDArray[np.float32]
    kv_bytes: int | None
    first: int = 0


def joined(parts: Sequence[Part]) -> CaseResult:
    """Returns the result of a case from all its parts, in any order.

    Only cases with a single metric, whose score is the mean over their questions, have several.
    """
    parts = sorted(parts, key=lambda part: part.first)
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
            mass_kept=reads.recall,
            measured_rows=reads.queries,
            far_tokens_histogram=reads.far_histogram,
            far_token_budget=first.budget,
            metric=outcome.metric,
            far_tokens_mean=reads.far_tokens_mean,
            far_rows=reads.far_queries,
        )
        for outcome in outcomes
    ]
    kept = [
        SampleRecord(*place, first.seed, number, sample, outcome.metric)
        for outcome in outcomes
        for number, sample in enumerate(outcome.samples)
    ]
    return CaseResult(records, kept)
