"""Runner of evaluation jobs in one process, with one policy's model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from rtpurbo.evaluation.budgets import budget_of
from rtpurbo.evaluation.case_results import Part
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.policies import POLICIES, BudgetPolicy, Loaded, Source
from rtpurbo.evaluation.reads import metering
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.task_suite import TaskSuite
from rtpurbo.interruption import StoppedBySignalError, steps_undisturbed, stop_requested
from rtpurbo.lengths import check_context
from rtpurbo.models.architecture import context_length
from rtpurbo.models.arguments import named
from rtpurbo.models.text import stop_tokens
from rtpurbo.settings import Progress, no_progress


@dataclass(frozen=True)
class Job:
    """A policy to evaluate on a case.

    Attributes:
        policy: name.
        case: as requested; a group of lm-eval's tasks stands for several cases.
        done: cases that have results of the policy already.
        budget_records: records of the policy that sets budgets; empty for policies without a budget.
        questions: consecutive questions of the case to ask; None asks all.
    """

    policy: str
    case: Case
    done: frozenset[Case] = frozenset()
    budget_records: tuple[Record, ...] = ()
    questions: range | None = None


class Listener(Protocol):
    """Receiver of the results of jobs."""

    def prepared(self, case: Case, tests: Sequence[Case]) -> None:
        """Receives the cases that a requested case stands for."""

    def answered(self, policy: str, count: int = 1) -> None:
        """Receives the number of samples that a policy has answered since the last call."""

    def measured(self, part: Part) -> None:
        """Receives the measurements of a finished case or part of it."""


class Runner:
    """Runs jobs one after the other in this process.

    Args:
        source: the artifact, and how its models are loaded.
        suites: task suites by name.
        cache_length: tokens at which cache sizes are computed; None takes each case's length.
    """

    count = 1

    def __init__(
        self, source: Source, suites: Mapping[str, TaskSuite], cache_length: int | None = None
    ) -> None:
        self.source, self.suites, self.cache_length = source, suites, cache_length
        self._policy: str | None = None
        self._loaded: Loaded | None = None

    def run(
        self, jobs: Sequence[Job], listener: Listener, progress: Progress = no_progress
    ) -> None:
        """Runs jobs, those of one policy one after the other; all its prompts are made before its first answer.

        Raises:
            RTPurboError: a case is longer than the model's context or too short for its task, or the
                data of a task is not available.
            StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`; the
                results of the current case are lost unless its last questions were being answered.
        """
        for policy, own in groupby(jobs, lambda job: job.policy):
            jobs_of_policy = list(own)
            model, _ = self._load(policy)
            tests = self._prepare(policy, [job.case for job in jobs_of_policy], listener, progress)
            for job in jobs_of_policy:
                for test in tests[job.case]:
                    if test not in job.done:
                        with questions_undisturbed(model, f"{test} of {policy}"):
                            after_sample = partial(listener.answered, policy)
                            listener.measured(self._measure(job, test, after_sample))

    def _prepare(
        self, policy: str, cases: Sequence[Case], listener: Listener, progress: Progress
    ) -> dict[Case, list[Case]]:
        """Makes the prompts of a policy's cases, and returns the cases that each stands for."""
        model, tokenizer = self._load(policy)
        context = context_length(model.config)
        check_context("tests", max(case.context_length for case in cases), context)
        count = sum(self.suites[case.suite].makes_prompts for case in cases)
        tests: dict[Case, list[Case]] = {}
        made = 0
        for case in cases:
            suite = self.suites[case.suite]
            if suite.makes_prompts:
                progress("prompts", made, count, {})
                made += 1
            tests[case] = suite.prepare(tokenizer, case, context)
            listener.prepared(case, tests[case])
        if count:
            progress("prompts", count, count, {})
        return tests

    def _measure(self, job: Job, test: Case, after_sample: Callable[[], None]) -> Part:
        policy, (model, tokenizer) = POLICIES[job.policy], self._load(job.policy)
        # Tokens that fill an ended sequence while others of its batch continue.
        ended = {*stop_tokens(model, tokenizer), tokenizer.pad_token_id} - {None}
        budget = budget_of(job.policy, test, job.budget_records)
        if isinstance(policy, BudgetPolicy) and budget is not None:
            policy.set_budget(model, budget)
        with metering(model, self.source.config.head_map, ended) as meter:
            suite = self.suites[test.suite]
            outcomes = suite.run(model, tokenizer, test, after_sample, job.questions)
        # Questions with their own lengths have no common cache size.
        length = self.cache_length or test.context_length
        return Part(
            test=test,
            policy=job.policy,
            seed=self.source.seed,
            budget=budget,
            outcomes=outcomes,
            reads=meter.measured(),
            kv_bytes=policy.kv_bytes(model, length) if length else None,
            first=job.questions.start if job.questions else 0,
        )

    def release(self) -> None:
        """Frees the model's memory."""
        self._policy = self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def _load(self, policy: str) -> Loaded:
        if self._loaded is None or self._policy != policy:
            self.release()
            self._policy, self._loaded = policy, POLICIES[policy].prepare(self.source)
        return self._loaded


@contextmanager
def questions_undisturbed(model: PreTrainedModel, test: str) -> Iterator[None]:
    """Context in which a first signal is delayed until the model receives another prompt, or until the end.

    A case whose last questions are being answered is finished. A callback after each answer would not be
    sufficient, because a GPU answers several questions at once.

    Raises:
        StoppedBySignalError: the process received a signal.
    """

    def begin(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        number = stop_requested()
        # A single token continues an answer.
        if number is not None and named(module, arguments, keywords)["input_ids"].shape[1] > 1:
            raise StoppedBySignalError(number, f"in the test {test}")

    with steps_undisturbed():
        hook = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        if (number := stop_requested()) is not None:
            raise StoppedBySignalError(number, f"after the test {test}")
