"""Runs every policy through every test and collects the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from rtpurbo.devices import default_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.budgets import budget_of, has_budget
from rtpurbo.evaluation.cases import DEFAULT_SUITES, HARNESS, Case, check_name
from rtpurbo.evaluation.manifest import RunManifest
from rtpurbo.evaluation.parts import CaseResult, Part, joined
from rtpurbo.evaluation.policies import BUDGET_POLICY, POLICIES, Source
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.request import (
    DEFAULT_LENGTHS,
    DEFAULT_POLICIES,
    EVERY_POLICY,
    Request,
)
from rtpurbo.evaluation.results_file import ResultsFile
from rtpurbo.evaluation.runner import Runner
from rtpurbo.evaluation.samples import SampleRecord
from rtpurbo.evaluation.task_suite import in_parts
from rtpurbo.evaluation.workers import Finished, Job, Workers, started_workers
from rtpurbo.models.artifact_folder import find_artifact
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
    results: ResultsFile | None = None,
    keep_sample: Callable[[SampleRecord], None] = lambda sample: None,
    progress: Progress = no_progress,
) -> list[Record]:
    """Measures an artifact: quality, what retrieval heads read, and bytes of cache.

    Args:
        artifact: a folder, or a name on the Hugging Face Hub.
        suites: names of `rtpurbo.evaluation.cases.SUITES`; `suite:task,task` takes some tasks of a
            suite, and `suite@2048,8192` has lengths of its own. `lm-eval:task,task` takes tasks of
            LM Evaluation Harness. A `Case` is one test, with a length and samples of its own.
        lengths: tokens of a test, for all suites or by the suite's name. Tasks of lm-eval have the
            model's context, unless lengths are named for them; RULER's among them, which makes
            prompts to measure, needs one.
        samples: questions or windows of each test; None takes 10, and all questions of `gsm8k`,
            `math`, `mmlu_pro`, `humaneval` and tasks of lm-eval.
        policies: names of `rtpurbo.evaluation.policies.POLICIES`, or `all`. Those that read as much as
            `rtpurbo` on average over a suite's tests at a length make it run before them.
        data: prose, as `load_texts` takes it; its held-out part is used.
        seed: of the tests; the same seed gives every policy the same tests.
        device: where to compute.
        dtype: of the weights; None chooses what suits the device.
        base_model: where to take the base model from, if not from where the artifact says.
        cache_length: tokens at which the cache is weighed; None takes each test's.
        squad: questions of `ruler:qa_1`, a file in SQuAD's format; None takes the built-in ones.
        hotpotqa: those of `ruler:qa_2`, in HotpotQA's distractor format; None takes the built-in ones.
        task_data: files with the questions of `gsm8k`, `math`, `mmlu_pro`, `humaneval` and `babilong`,
            by the suite's name; and files for tasks of lm-eval instead of the Hub's, by the task's
            name, see `rtpurbo.evaluation.harness.local_data`.
        max_new_tokens: the most tokens of answers to questions of these suites (but for BABILong) and
            to tasks of lm-eval; None leaves it to the suite or task.
        run_code: agree that `humaneval` executes code that the model writes, in a limited process.
        processes: that take tests side by side, on all GPUs there are where `device` names none of
            them. A caller that uses several has its own code under `if __name__ == "__main__"`.
        results: given all that a policy makes of a test as soon as it is there; what one that resumes
            has already is not measured again.
        keep_sample: given every question with its answer, as soon as its test is done.
        progress: told after each sample.

    Returns:
        The records of all tests, policy by policy.

    Raises:
        RTPurboError: a name is unknown, the artifact or a file cannot be loaded, a test is
            longer than the model's context or too short for its task, what is to be resumed was
            measured otherwise, or there is too little memory for so many processes.
        StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`; a
            test that was under way is lost, unless its last questions were and there is one process.
    """
    names = run_order(policies)
    request = Request.of(
        suites,
        lengths,
        policies,
        samples=samples,
        task_data=task_data,
        seed=seed,
        run_code=run_code,
    )
    if processes < 1:
        raise RTPurboError(f"the number of processes is {processes}, but it must be at least 1.")
    device = resolve_device(device)
    folder = find_artifact(artifact)
    request.check_lengths(folder, base_model)
    cases = request.cases
    manifest = RunManifest(
        Source(folder, device, dtype or default_dtype(device), base_model, seed),
        asks_harness=any(case.suite == HARNESS for case in cases),
        data=data,
        seed=seed,
        squad=squad,
        hotpotqa=hotpotqa,
        task_data=request.harness_data,
        question_data=request.question_data,
        max_new_tokens=max_new_tokens,
        cache_length=cache_length,
    )
    task_suite = manifest.task_suite()
    if results is None:
        results = ResultsFile()
    if results.path is not None:
        results.begin(manifest.conditions(task_suite))
    for case in cases:
        results.ask(case)
    run = _Run(cases, results, keep_sample, progress)
    if processes == 1:
        run.one_by_one(names, manifest.runner(task_suite))
    else:
        with started_workers(manifest, processes) as workers:
            run.side_by_side(names, workers)
    return run.records(names)


def run_order(policies: Sequence[str]) -> list[str]:
    """The policies to run, in turn: what sets a budget comes before those that keep to it.

    Raises:
        RTPurboError: a name is unknown.
    """
    names = list(dict.fromkeys(POLICIES if EVERY_POLICY in policies else policies))
    for name in names:
        check_name("policy", name, [*POLICIES, EVERY_POLICY])
    budgeted = [name for name in names if has_budget(name)]
    free = [name for name in names if name not in budgeted]
    if budgeted and BUDGET_POLICY not in free:
        free.append(BUDGET_POLICY)
    return [*free, *budgeted]


@dataclass
class _Bar:
    """Progress of a policy.

    Attributes:
        done: samples taken.
        total: samples to take. How many tasks of lm-eval have is known when they are answered.
        figures: the latest.
    """

    policy: str
    progress: Progress
    done: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)

    def show(self) -> None:
        """Tells it."""
        self.progress(self.policy, self.done, self.total, self.figures)

    def after_sample(self) -> None:
        """Counts one more."""
        self.done += 1
        self.total = max(self.done, self.total)
        self.show()


@dataclass
class _Run:
    """One call of `evaluate`; arguments as its."""

    cases: Sequence[Case]
    results: ResultsFile
    keep_sample: Callable[[SampleRecord], None]
    progress: Progress

    def records(self, names: Sequence[str]) -> list[Record]:
        """Returns the records of all tests."""
        tests = dict.fromkeys(test for case in self.cases for test in self.results.tests(case))
        return [
            record for name in names for test in tests for record in self.results.of(test, name)
        ]

    def one_by_one(self, names: Sequence[str], runner: Runner) -> None:
        """Takes policies through the tests that they have not taken."""
        for name in names:
            bar = self._bar(name)
            bar.show()
            if missing := self._missing(name):
                for case, tests in runner.prepare(name, missing, self.progress).items():
                    self.results.set_tests(case, tests)
                for test in (test for case in missing for test in self.results.tests(case)):
                    if not self._is_done(test, name):
                        budget = budget_of(name, test, self._read())
                        runner.take(name, test, budget, partial(self._keep, bar), bar.after_sample)
            runner.release()

    def side_by_side(self, names: Sequence[str], workers: Workers) -> None:
        """The same, several at a time: first all that sets budgets, then those that keep to them."""
        for keeps_to_it, together in groupby(names, has_budget):
            read = tuple(self._read()) if keeps_to_it else ()
            bars, jobs = {}, list[Job]()
            for name in together:
                bars[name] = self._bar(name)
                bars[name].show()
                for case in sorted(self._missing(name), key=_order_of_work):
                    done = {test for test in self.results.tests(case) if self._is_done(test, name)}
                    job = Job(name, case, frozenset(done), read)
                    parts = in_parts(case, workers.count)
                    jobs += [replace(job, questions=part) for part in parts] if parts[1:] else [job]
            unfinished: dict[Job, list[Finished]] = {}
            for finished in workers.do(jobs):
                self.results.set_tests(finished.job.case, finished.tests)
                bar = bars[finished.job.policy]
                for taken in finished.taken:
                    bar.done += taken.records[0].samples
                    self._keep(bar, taken)
                if finished.job.questions is not None:
                    bar.done += len(finished.job.questions)
                    bar.show()
                    whole = replace(finished.job, questions=None)
                    parts_done = unfinished.setdefault(whole, [])
                    parts_done.append(finished)
                    if len(parts_done) == len(in_parts(whole.case, workers.count)):
                        self._keep(bar, joined(_parts_in_order(unfinished.pop(whole))))

    def _missing(self, name: str) -> list[Case]:
        return [
            case
            for case in self.cases
            if not self.results.tests(case)
            or not all(self._is_done(test, name) for test in self.results.tests(case))
        ]

    def _is_done(self, test: Case, name: str) -> bool:
        records = self.results.of(test, name)
        # With more tests beside it, a test has another budget.
        budget = budget_of(name, test, self._read())
        return bool(records) and records[0].far_token_budget == budget

    def _read(self) -> Iterator[Record]:
        """Returns the records of the policy that sets budgets."""
        for test in self.results.every_test():
            yield from self.results.of(test, BUDGET_POLICY)[:1]

    def _bar(self, name: str) -> _Bar:
        done = total = 0
        for case in self.cases:
            for test in self.results.tests(case) or [case]:
                samples = test.samples
                if self._is_done(test, name):
                    samples = self.results.of(test, name)[0].samples
                    done += samples
                total += samples
        return _Bar(name, self.progress, done, total)

    def _keep(self, bar: _Bar, taken: CaseResult) -> None:
        for sample in taken.samples:
            self.keep_sample(sample)
        self.results.add(taken.records, taken.samples)
        bar.figures = {str(taken.test): record.score for record in taken.records[-1:]}
        bar.show()


def _order_of_work(case: Case) -> float:
    """Sorts cases so that the longest jobs do not come last, with nothing left to run beside them.

    Short questions have the longest answers.
    """
    return -math.inf if case.suite in SHORT else -case.context_length


def _parts_in_order(parts: Sequence[Finished]) -> list[Part]:
    return [
        finished.part
        for finished in sorted(parts, key=lambda each: (each.job.questions or range(1)).start)
        if finished.part is not None
    ]
