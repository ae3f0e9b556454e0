"""Runs every policy through every test and collects the records."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.devices import default_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.battery import Battery
from rtpurbo.evaluation.cells import DEFAULT_SUITES, HARNESS, Cell, check_name, choose_cells
from rtpurbo.evaluation.policies import BUDGET_POLICY, POLICIES, BudgetPolicy, Source
from rtpurbo.evaluation.reads import Reads, metering
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.samples import SampleRecord
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
    keep_sample: Callable[[SampleRecord], None] = lambda sample: None,
    keep_record: Callable[[Record], None] = lambda record: None,
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
        keep_sample: given every question with its answer.
        keep_record: given every record as soon as it is there.
        progress: told after each sample.

    Raises:
        RTPurboError: a name is unknown, the artifact or a file cannot be loaded, or a test is
            longer than the model's context or too short for its task.
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
    ruler = RulerSuite(Materials.of(corpus, squad, hotpotqa), seed)
    battery = Battery(corpus, ruler, harness, seed)
    run = _Run(source, battery, cells, cache_length, keep_sample, progress)
    records = []
    for name in names:
        for record in run.policy(name):
            records.append(record)
            keep_record(record)
    return records


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
class _Run:
    """One call of `evaluate`; arguments as its.

    Attributes:
        budgets: far tokens that rows of `BUDGET_POLICY` read and rows that had any, by suite and
            length.
    """

    source: Source
    battery: Battery
    cells: Sequence[Cell]
    cache_length: int | None
    keep_sample: Callable[[SampleRecord], None]
    progress: Progress
    budgets: dict[tuple[str, int], tuple[float, int]] = field(default_factory=dict)

    def policy(self, name: str) -> Iterator[Record]:
        """Takes a policy through all tests."""
        policy, head_map = POLICIES[name], self.source.config.head_map
        done, figures = 0, dict[str, float]()
        cells, total = self.cells, sum(cell.samples for cell in self.cells)

        def after_sample() -> None:
            nonlocal done, total
            done += 1
            # How many samples tasks of lm-eval have is known when they are answered.
            total = max(done, total)
            self.progress(name, done, total, figures)

        self.progress(name, 0, total, figures)
        model, tokenizer = policy.prepare(self.source)
        # What follows an answer in a batch where others go on.
        ended = {*stop_tokens(model, tokenizer), tokenizer.pad_token_id} - {None}
        context = model.config.max_position_embeddings
        check_context("tests", max(cell.context_length for cell in cells), context)
        for cell in self.battery.prepare(tokenizer, cells, context, self.progress):
            budget = None
            if isinstance(policy, BudgetPolicy):
                budget = self._budget(cell)
                policy.set_budget(model, budget)
            with metering(model, head_map, ended) as meter:
                outcomes = self.battery.run(cell, model, tokenizer, after_sample)
            reads = meter.reads()
            if name == BUDGET_POLICY:
                self._add_to_budget(cell, reads)
            for outcome in outcomes:
                figures = {str(cell): outcome.score}
                self.progress(name, done, total, figures)
                place = (cell.suite, cell.task, cell.context_length, name)
                for number, sample in enumerate(outcome.samples):
                    self.keep_sample(
                        SampleRecord(*place, self.battery.seed, number, sample, outcome.metric)
                    )
                yield Record(
                    *place,
                    outcome.count,
                    outcome.score,
                    reads.far_share,
                    policy.kv_bytes(model, self.cache_length or cell.context_length),
                    outcome.ci95,
                    reads.tokens_mean,
                    reads.tokens_p50,
                    reads.tokens_p95,
                    reads.mass_kept,
                    reads.rows,
                    reads.far_histogram,
                    budget,
                    outcome.metric,
                )
        del model
        gc.collect()
        torch.cuda.empty_cache()

    def _budget(self, cell: Cell) -> int:
        """The mean of what `BUDGET_POLICY` read, rounded up, so that nobody gets less."""
        far_tokens, rows = self.budgets.get(_budget_key(cell), (0.0, 0))
        return math.ceil(far_tokens / rows) if rows else 0

    def _add_to_budget(self, cell: Cell, reads: Reads) -> None:
        far_tokens, rows = self.budgets.get(_budget_key(cell), (0.0, 0))
        self.budgets[_budget_key(cell)] = (
            far_tokens + reads.far_tokens_mean * reads.far_rows,
            rows + reads.far_rows,
        )


def _budget_key(cell: Cell) -> tuple[str, int]:
    # Tasks of lm-eval have nothing in common but the model's context.
    suite = f"{cell.suite}:{cell.task}" if cell.suite == HARNESS else cell.suite
    return suite, cell.context_length
