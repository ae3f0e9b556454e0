"""Manifest of a run, which worker processes receive: artifact, data and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation.conditions import Conditions
from rtpurbo.evaluation.policies import Source
from rtpurbo.evaluation.questions.bank import QuestionBank
from rtpurbo.evaluation.questions.suites import QuestionData
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.runner import Runner
from rtpurbo.evaluation.task_suite import TaskSuite


@dataclass(frozen=True)
class RunManifest:
    """Everything a process needs to run cases.

    Attributes:
        source: the artifact, and how its models are loaded.
        asks_harness: whether any test is one of lm-eval's.
        data: as `rtpurbo.evaluation.run.evaluate` takes it, like the rest.
        seed: of the tests.
        squad: questions of `ruler:qa_1`.
        hotpotqa: those of `ruler:qa_2`.
        task_data: files for tasks of lm-eval.
        question_data: files for the suites of `rtpurbo.evaluation.questions`, by suite.
        max_new_tokens: the most that answers to tasks of lm-eval and to questions of these suites may
            have.
        cache_length: tokens at which the cache is weighed.
    """

    source: Source
    asks_harness: bool = False
    data: Sequence[str] | None = None
    seed: int = 0
    squad: str | Path | None = None
    hotpotqa: str | Path | None = None
    task_data: Mapping[str, str | Path] | None = None
    question_data: Mapping[str, str | Path] | None = None
    max_new_tokens: int | None = None
    cache_length: int | None = None

    def task_suite(self, questions: Path | None = None) -> TaskSuite:
        """Its tests.

        Args:
            questions: a folder where processes find the prompts that others made.

        Raises:
            RTPurboError: a file is missing or of another format, or lm-eval is not installed.
        """
        harness = None
        if self.asks_harness:
            # Imported where it is asked for: it takes long, and may not be installed.
            from rtpurbo.evaluation.harness.suite import Harness

            harness = Harness(self.task_data or {}, self.max_new_tokens, self.seed)
        corpus = load_texts(self.data, "heldout")
        materials = Materials.of(corpus, self.squad, self.hotpotqa)
        data = QuestionData.read(self.question_data or {}, self.seed)
        return TaskSuite(
            corpus,
            RulerSuite(materials, self.seed, questions),
            RulerSuite(materials, self.seed, questions, data.babilong),
            QuestionBank(data, self.max_new_tokens),
            harness,
            self.seed,
        )

    def conditions(self, task_suite: TaskSuite) -> Conditions:
        """Returns the conditions of the run.

        Args:
            task_suite: its tests.
        """
        return Conditions.of(
            self.source,
            task_suite.corpus,
            task_suite.ruler.materials,
            task_data={**(self.task_data or {}), **(self.question_data or {})},
            max_new_tokens=self.max_new_tokens,
            cache_length=self.cache_length,
        )

    def runner(self, task_suite: TaskSuite, device: torch.device | None = None) -> Runner:
        """Somebody who follows it.

        Args:
            task_suite: its tests.
            device: where to put models, if not where it says.
        """
        source = self.source if device is None else replace(self.source, device=device)
        return Runner(source, task_suite, self.cache_length)
