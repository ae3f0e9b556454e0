"""Runs every policy through every test and collects the records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.devices import default_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.battery import Battery
from rtpurbo.evaluation.budgets import far_token_budget
from rtpurbo.evaluation.cells import DEFAULT_SUITES, HARNESS, Cell, check_name, choose_cells
from rtpurbo.evaluation.conditions import Conditions
from rtpurbo.evaluation.policies import BUDGET_POLICY, POLICIES, BudgetPolicy, Source
from rtpurbo.evaluation.reads import Reads, metering
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.results_file import ResultsFile
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.samples import Outcome, SampleRecord
from rtpurbo.evaluation.stopping import questions_undisturbed
from rtpurbo.models.artifact import find_artifact
from rtpurbo.models.text import stop_tokens
from rtpurbo.settings import Progress, check_context, no_progress

DEFAULT_LENGTHS = (2048, 4096)
DEFAULT_POLICIES = ("full", "rtpurbo")
EVERY_POLICY = "all"


def evaluate(
    artifact: str | Path,
    *,
    suites: Sequence[str | Cell] = DEFAULT_SUITES,
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
    results: ResultsFile | None = None,
    keep_sample: Callable[[SampleRecord], None] = lambda sample: None,
    progress: Progress = no_progress,
) -> list[Record]:
    """Measures an artifact: quality, what retrieval heads read, and bytes of cache.

    Args:
        artifact: a folder, or a name on the Hugging Face Hub.
        suites: names of `rtpurbo.evaluation.cells.SUITES`; `suite:task,task` takes some tasks of a
            suite, and `suite@2048,8192` has lengths of its own. `lm-eval:task,task` takes tasks of
            LM Evaluation Harness. A `Cell` is one test, with a length and samples of its own.
        lengths: tokens of a test, for all suites or by the suite's name. Tasks of lm-eval have the
            model's context, unless lengths are named for them; RULER's among them, which makes
            prompts to measure, needs one.
        samples: questions or windows of each test; None takes 10, and all that tasks of lm-eval have.
        policies: names of `rtpurbo.evaluation.policies.POLICIES`, or `all`. Those that read as much as
            `rtpurbo` on the mean of a suite's tests at a length make it run before them.
        data: prose, as `load_texts` takes it; its held-out part is used.
        seed: of the tests; the same seed gives every policy the same tests.
        device: where to compute.
        dtype: of the weights; None chooses what suits the device.
        base_model: where to take the base model from, if not from where the artifact says.
        cache_length: tokens at which the cache is weighed; None takes each test's.
        squad: questions of `ruler:qa_1`, a file in SQuAD's format; None takes the built-in ones.
        hotpotqa: those of `ruler:qa_2`, in HotpotQA's distractor format, likewise.
        task_data: files for tasks of lm-eval instead of the Hub's, by the task's name; see
            `rtpurbo.evaluation.harness.local_data`.
        max_new_tokens: the most that answers to tasks of lm-eval may have; None leaves it to the task.
        results: given all that a policy makes of a test as soon as it is there; what one that resumes
            has already is not measured again.
        keep_sample: given every question with its answer, as soon as its test is done.
        progress: told after each sample.

    Returns:
        The records of all tests, policy by policy.

    Raises:
        RTPurboError: a name is unknown, the artifact or a file cannot be loaded, a test is
            longer than the model's context or too short for its task, or what is to be resumed was
            measured otherwise.
        StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`; a
            test that was under way is lost, unless its last questions were.
    """
    cells = choose_cells(suites, lengths, samples)
    names = run_order(policies)
    device = resolve_device(device)
    source = Source(
        find_artifact(artifact), device, dtype or default_dtype(device), base_model, seed
    )
    asked = [cell.task for cell in cells if cell.suite == HARNESS]
    for name in task_data or {}:
        if name not in asked:
            raise RTPurboError(
                f"there is data for the task '{name}' of lm-eval, which is not asked for."
            )
    harness = None
    if asked:
        # Imported where it is asked for: it takes long, and may not be installed.
        from rtpurbo.evaluation.harness.suite import Harness

        harness = Harness(task_data or {}, max_new_tokens, seed)
    corpus = load_texts(data, "heldout")
    materials = Materials.of(corpus, squad, hotpotqa)
    if results is None:
        results = ResultsFile()
    if results.path is not None:
        results.begin(
            Conditions.of(
                source,
                corpus,
                materials,
                task_data=task_data,
                max_new_tokens=max_new_tokens,
                cache_length=cache_length,
            )
        )
    for cell in cells:
        results.ask(cell)
    battery = Battery(corpus, RulerSuite(materials, seed), harness, seed)
    run = _Run(source, battery, cells, cache_length, results, keep_sample, progress)
    return [record for name in names for record in run.policy(name)]


def run_order(policies: Sequence[str]) -> list[str]:
    """The policies to run, in turn: what sets a budget comes before those that keep to it.

    Raises:
        RTPurboError: a name is unknown.
    """
    names = list(dict.fromkeys(POLICIES if EVERY_POLICY in policies else policies))
    for name in names:
        check_name("policy", name, [*POLICIES, EVERY_POLICY])
    budgeted = [name for name in names if isinstance(POLICIES[name], BudgetPolicy)]
    free = [name for name in names if name not in budgeted]
    if budgeted and BUDGET_POLICY not in free:
        free.append(BUDGET_POLICY)
    return [*free, *budgeted]


@dataclass
class _Bar:
    """What `progress` is told of a policy.

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

    source: Source
    battery: Battery
    cells: Sequence[Cell]
    cache_length: int | None
    results: ResultsFile
    keep_sample: Callable[[SampleRecord], None]
    progress: Progress

    def policy(self, name: str) -> list[Record]:
        """Takes a policy through the tests that it has not taken; the records of all."""
        missing = [cell for cell in self.cells if not self._is_complete(cell, name)]
        bar = self._bar(name)
        bar.show()
        if missing:
            self._take(missing, name, bar)
        tests = dict.fromkeys(test for cell in self.cells for test in self.results.tests(cell))
        return [record for test in tests for record in self.results.of(test, name)]

    def _is_complete(self, cell: Cell, name: str) -> bool:
        tests = self.results.tests(cell)
        return bool(tests) and all(self._is_done(test, name) for test in tests)

    def _is_done(self, test: Cell, name: str) -> bool:
        records = self.results.of(test, name)
        # With more tests beside it, a test has another budget.
        return bool(records) and records[0].far_token_budget == self._budget(test, name)

    def _budget(self, test: Cell, name: str) -> int | None:
        if not isinstance(POLICIES[name], BudgetPolicy):
            return None
        read = (self.results.of(other, BUDGET_POLICY)[:1] for other in self.results.every_test())
        return far_token_budget(test, (record for records in read for record in records))

    def _bar(self, name: str) -> _Bar:
        done = total = 0
        for cell in self.cells:
            for test in self.results.tests(cell) or [cell]:
                samples = test.samples
                if self._is_done(test, name):
                    samples = self.results.of(test, name)[0].samples
                    done += samples
                total += samples
        return _Bar(name, self.progress, done, total)

    def _take(self, cells: Sequence[Cell], name: str, bar: _Bar) -> None:
        """Takes a policy through those tests of some cells that it has not taken."""
        policy = POLICIES[name]
        model, tokenizer = policy.prepare(self.source)
        # What follows an answer in a batch where others go on.
        ended = {*stop_tokens(model, tokenizer), tokenizer.pad_token_id} - {None}
        context = model.config.max_position_embeddings
        check_context("tests", max(cell.context_length for cell in cells), context)
        ready = self.battery.prepare(tokenizer, cells, context, self.progress)
        for cell, tests in ready.items():
            self.results.set_tests(cell, tests)
        for test in (test for tests in ready.values() for test in tests):
            if self._is_done(test, name):
                continue
            budget = self._budget(test, name)
            if isinstance(policy, BudgetPolicy) and budget is not None:
                policy.set_budget(model, budget)
            with questions_undisturbed(model, f"{test} of {name}"):
                with metering(model, self.source.config.head_map, ended) as meter:
                    outcomes = self.battery.run(test, model, tokenizer, bar.after_sample)
                kv_bytes = policy.kv_bytes(model, self.cache_length or test.context_length)
                self._keep(test, name, outcomes, meter.reads(), kv_bytes, budget)
                bar.figures = {str(test): outcome.score for outcome in outcomes[-1:]}
                bar.show()
        del model
        gc.collect()
        torch.cuda.empty_cache()

    def _keep(
        self,
        test: Cell,
        name: str,
        outcomes: Sequence[Outcome],
        reads: Reads,
        kv_bytes: int,
        budget: int | None,
    ) -> None:
        place = (test.suite, test.task, test.context_length, name)
        samples = [
            SampleRecord(*place, self.battery.seed, number, sample, outcome.metric)
            for outcome in outcomes
            for number, sample in enumerate(outcome.samples)
        ]
        records = [
            Record(
                *place,
                outcome.count,
                outcome.score,
                reads.far_share,
                kv_bytes,
                outcome.ci95,
                reads.tokens_mean,
                reads.tokens_p50,
                reads.tokens_p95,
                reads.mass_kept,
                reads.rows,
                reads.far_histogram,
                budget,
                outcome.metric,
                reads.far_tokens_mean,
                reads.far_rows,
            )
            for outcome in outcomes
        ]
        for sample in samples:
            self.keep_sample(sample)
        self.results.add(records, samples)
