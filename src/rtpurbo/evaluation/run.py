"""Evaluation of policies on cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from rtpurbo.devices import default_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.budgets import budget_of, has_budget
from rtpurbo.evaluation.case_results import Part, joined
from rtpurbo.evaluation.cases import DEFAULT_SUITES, Case
from rtpurbo.evaluation.manifest import RunManifest
from rtpurbo.evaluation.policies import BUDGET_POLICY, POLICIES, Source
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.request import DEFAULT_LENGTHS, DEFAULT_POLICIES, EVERY_POLICY, Request
from rtpurbo.evaluation.results_log import ResultsLog
from rtpurbo.evaluation.runner import Job, Runner
from rtpurbo.evaluation.samples import SampleRecord
from rtpurbo.evaluation.task_suite import in_parts
from rtpurbo.evaluation.workers import WorkerPool, started_workers
from rtpurbo.models.artifact_config import find_artifact
from rtpurbo.settings import Progress, no_progress


def evaluate(
    artifact: str | Path,
    *,
    suites: Sequence[str | Case] = DEFAULT_SUITES,
    lengths: Sequence[int] | Mapping[str, Sequence[int]] = DEFAULT_LENGTHS,
    samples: int | None = None,
    policies: Sequence[str] = DEFAULT_POLICIES,
    data: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    cache_length: int | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
    task_data: Mapping[str, str | Path] | None = None,
    max_new_tokens: int | None = None,
    run_code: bool = False,
    processes: int = 1,
    results: ResultsLog | None = None,
    keep_sample: Callable[[SampleRecord], None] = lambda sample: None,
    progress: Progress = no_progress,
) -> list[Record]:
    """Evaluates an artifact: quality, tokens that retrieval heads read, and cache sizes.

    Args:
        artifact: folder, or name on the Hugging Face Hub.
        suites: names of `rtpurbo.evaluation.cases.SUITES`; `suite:task,task` selects tasks of a suite, and
            `suite@2048,8192` its lengths. `lm-eval:task,task` selects tasks of LM Evaluation Harness. A
            `Case` is a single test with its own length and samples.
        lengths: tokens of a test, for all suites or by suite. Tasks of lm-eval have the model's context
            unless lengths are given for them, which RULER's tasks of lm-eval need.
        samples: questions or windows of each test; None for 10, and for all questions of `gsm8k`,
            `math`, `mmlu_pro`, `humaneval` and tasks of lm-eval.
        policies: names of `rtpurbo.evaluation.policies.POLICIES`, or `all`. `rtpurbo` runs before policies
            with the same mean budget of far tokens.
        data: prose, as an argument of `load_texts`; its held-out part is used.
        seed: seed of the tests, which are the same for all policies.
        device: device of the models.
        dtype: dtype of the weights; None for the default of the device.
        base_model: replaces the base model that the artifact names.
        cache_length: tokens at which cache sizes are computed; None for each test's length.
        squad: questions of `ruler:qa_1`, a file in SQuAD's format; None for the built-in ones.
        hotpotqa: questions of `ruler:qa_2`, in HotpotQA's distractor format; None for the built-in ones.
        task_data: files with the questions of `gsm8k`, `math`, `mmlu_pro`, `humaneval` and `babilong`,
            by suite; and files that replace the Hub's data of tasks of lm-eval, by task, see
            `rtpurbo.evaluation.harness.suite`.
        max_new_tokens: limit of an answer in these suites (except BABILong) and in tasks of lm-eval; None
            for the default of the suite or task.
        run_code: allow `humaneval` to execute code that the model writes, in a limited process.
        processes: number of processes that run tests at the same time, on all GPUs unless `device` has
            a number. With several, the caller's script needs `if __name__ == "__main__"`.
        results: receives the result of each finished test. Results of earlier runs are not measured again.
        keep_sample: called with every question and its answer when the test is finished.
        progress: called after each sample.

    Returns:
        The records of all tests, policy by policy.

    Raises:
        RTPurboError: a name is unknown, the artifact or a file cannot be loaded, a test is
            longer than the model's context or too short for its task, the results to resume were
            measured under other conditions, or there is too little memory for so many processes.
        StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`; the
            current test is lost, unless there is one process and it is answering the last questions.
    """
    request = Request.of(
        suites,
        lengths,
        policies,
        samples=samples,
        task_data=task_data,
        seed=seed,
        run_code=run_code,
    )
    names = run_order(policies)
    if processes < 1:
        raise RTPurboError(f"the number of processes is {processes}, but it must be at least 1.")
    device = resolve_device(device)
    folder = find_artifact(artifact)
    request.check_lengths(folder, base_model)
    manifest = RunManifest(
        Source(folder, device, dtype or default_dtype(device), base_model, seed),
        request,
        data=data,
        squad=squad,
        hotpotqa=hotpotqa,
        max_new_tokens=max_new_tokens,
        cache_length=cache_length,
    )
    runner = manifest.runner()
    log = ResultsLog() if results is None else results
    log.begin(manifest.conditions(runner) if log.path else None, request.cases)
    with nullcontext(runner) if processes == 1 else started_workers(manifest, processes) as workers:
        run = _Run(request.cases, log, workers, keep_sample, progress)
        run.evaluate(names)
    runner.release()
    return run.records(names)


def run_order(policies: Sequence[str]) -> list[str]:
    """Returns the policies to run; the one that sets budgets comes before those that have one.

    Raises:
        RTPurboError: a name is unknown.
    """
    names = list(dict.fromkeys(POLICIES if EVERY_POLICY in policies else policies))
    budgeted = [name for name in names if has_budget(name)]
    free = [name for name in names if name not in budgeted]
    if budgeted and BUDGET_POLICY not in free:
        free.append(BUDGET_POLICY)
    return [*free, *budgeted]


@dataclass
class _Bar:
    """Progress of a policy.

    Attributes:
        policy: name.
        progress: called after each sample.
        done: answered samples.
        total: samples to answer; of tasks of lm-eval, their number is unknown in the beginning.
        figures: the latest scores.
    """

    policy: str
    progress: Progress
    done: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    def show(self) -> None:
        """Reports the progress."""
        self.progress(self.policy, self.done, max(self.done, self.total), self.figures)


@dataclass
class _Run:
    """One call of `evaluate`: the `Listener` of its jobs, and the only writer of its results."""

    cases: Sequence[Case]
    log: ResultsLog
    workers: Runner | WorkerPool
    keep_sample: Callable[[SampleRecord], None]
    progress: Progress
    _bars: dict[str, _Bar] = field(default_factory=dict)
    _parts: dict[tuple[str, Case], list[Part]] = field(default_factory=dict)

    def evaluate(self, names: Sequence[str]) -> None:
        """Evaluates policies on the cases that they have no results of."""
        # A pool runs policies side by side, but first all that a budget depends on.
        groups = [list(group) for _, group in groupby(names, has_budget)]
        for group in [[name] for name in names] if self.workers.count == 1 else groups:
            jobs = [job for name in group for job in self._jobs(name)]
            self.workers.run(jobs, self, self.progress)

    def records(self, names: Sequence[str]) -> list[Record]:
        """Returns the records of policies on all cases."""
        tests = dict.fromkeys(test for case in self.cases for test in self.log.tests(case))
        return [record for name in names for test in tests for record in self.log.of(test, name)]

    def prepared(self, case: Case, tests: Sequence[Case]) -> None:
        """Records the cases that a requested case stands for."""
        self.log.set_tests(case, tests)

    def answered(self, policy: str, count: int = 1) -> None:
        """Advances the bar of a policy."""
        self._bars[policy].done += count
        self._bars[policy].show()

    def measured(self, part: Part) -> None:
        """Logs the result of a case when its last part is there."""
        parts = self._parts.setdefault((part.policy, part.test), [])
        parts.append(part)
        if len(parts) < len(in_parts(part.test, self.workers.count)):
            return
        result = joined(self._parts.pop((part.policy, part.test)))
        for sample in result.samples:
            self.keep_sample(sample)
        self.log.add(result)
        bar = self._bars[part.policy]
        bar.figures = {str(part.test): result.records[-1].score}
        bar.show()

    def _jobs(self, name: str) -> list[Job]:
        """Returns the jobs of a policy, and shows its bar."""
        records = tuple(self._budget_records()) if has_budget(name) else ()
        done = frozenset(
            test for test in self.log.every_test() if self._is_done(test, name, records)
        )
        bar = self._bars[name] = _Bar(name, self.progress)
        jobs = []
        for case in self.cases:
            tests = self.log.tests(case)
            for test in tests or [case]:
                samples = self.log.of(test, name)[0].samples if test in done else 0
                bar.done += samples
                bar.total += samples or test.samples
            if not tests or not done.issuperset(tests):
                parts = in_parts(case, self.workers.count)
                for questions in parts if parts[1:] else [None]:
                    jobs.append(Job(name, case, done, records, questions))
        bar.show()
        return jobs

    def _is_done(self, test: Case, name: str, budget_records: Sequence[Record]) -> bool:
        records = self.log.of(test, name)
        # More cases of a suite at the same length give it another budget.
        budget = budget_of(name, test, budget_records)
        return bool(records) and records[0].far_token_budget == budget

    def _budget_records(self) -> Iterator[Record]:
        for test in self.log.every_test():
            yield from self.log.of(test, BUDGET_POLICY)[:1]
