"""Takes policies through tests, with one policy's model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.parts import CaseResult, Part, joined
from rtpurbo.evaluation.policies import POLICIES, BudgetPolicy, Loaded, Source
from rtpurbo.evaluation.reads import metering
from rtpurbo.evaluation.stopping import questions_undisturbed
from rtpurbo.evaluation.task_suite import TaskSuite
from rtpurbo.models.architecture import context_length
from rtpurbo.models.text import stop_tokens
from rtpurbo.settings import Progress, check_context, no_progress


class Runner:
    """Asks the questions.

    Args:
        source: the artifact, and how its models are loaded.
        task_suite: the tests.
        cache_length: tokens at which the cache is weighed; None takes each test's.
    """

    def __init__(
        self, source: Source, task_suite: TaskSuite, cache_length: int | None = None
    ) -> None:
        self.source, self.task_suite, self.cache_length = source, task_suite, cache_length
        self._policy: str | None = None
        self._loaded: Loaded | None = None

    def prepare(
        self, name: str, cases: Sequence[Case], progress: Progress = no_progress
    ) -> dict[Case, list[Case]]:
        """Loads a policy's model in place of the one before it, and makes the prompts of its tests.

        Args:
            name: the policy's.
            cases: its tests.
            progress: told after each.

        Returns:
            The tests to take, by the case that asks for them, as `TaskSuite.prepare` gives them.

        Raises:
            RTPurboError: a test is longer than the model's context or too short for its task, or the
                data of a task cannot be had.
        """
        model, tokenizer = self._load(name)
        context = context_length(model.config)
        check_context("tests", max(case.context_length for case in cases), context)
        return self.task_suite.prepare(tokenizer, cases, context, progress)

    def take(
        self,
        name: str,
        test: Case,
        budget: int | None,
        keep: Callable[[CaseResult], None],
        after_sample: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes a policy through a test that was prepared.

        Args:
            name: the policy's.
            test: which.
            budget: the far tokens that a `BudgetPolicy` may read in a row; None for the others.
            keep: given all that comes of it.
            after_sample: called after each question or window.

        Raises:
            StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`;
                nothing is kept then, unless the last questions were under way.
        """
        model, _ = self._load(name)
        with questions_undisturbed(model, f"{test} of {name}"):
            keep(joined([self._measured(name, test, budget, after_sample)]))

    def take_part(self, name: str, test: Case, budget: int | None, questions: range) -> Part:
        """Takes a policy through some questions of a test that was prepared.

        Args:
            name: the policy's.
            test: which; `TaskSuite.run` says which tests have parts.
            budget: as in `take`.
            questions: consecutive ones.

        Raises:
            StoppedBySignalError: as in `take`.
        """
        model, _ = self._load(name)
        with questions_undisturbed(model, f"{test} of {name}"):
            return self._measured(name, test, budget, questions=questions)

    def _measured(
        self,
        name: str,
        test: Case,
        budget: int | None,
        after_sample: Callable[[], None] = lambda: None,
        questions: range | None = None,
    ) -> Part:
        policy, (model, tokenizer) = POLICIES[name], self._load(name)
        # What follows an answer in a batch where others go on.
        ended = {*stop_tokens(model, tokenizer), tokenizer.pad_token_id} - {None}
        if isinstance(policy, BudgetPolicy) and budget is not None:
            policy.set_budget(model, budget)
        with metering(model, self.source.config.head_map, ended) as meter:
            outcomes = self.task_suite.run(test, model, tokenizer, after_sample, questions)
        # Questions with lengths of their own have no cache size in common.
        length = self.cache_length or test.context_length
        kv_bytes = policy.kv_bytes(model, length) if length else None
        return Part(test, name, self.task_suite.seed, budget, outcomes, meter.measured(), kv_bytes)

    def release(self) -> None:
        """Takes the model out of memory."""
        self._policy = self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def _load(self, name: str) -> Loaded:
        if self._loaded is None or self._policy != name:
            self.release()
            self._policy, self._loaded = name, POLICIES[name].prepare(self.source)
        return self._loaded
