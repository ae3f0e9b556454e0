"""Manifest of a run, which worker processes receive: artifact, data and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation.cases import HARNESS
from rtpurbo.evaluation.conditions import conditions_of
from rtpurbo.evaluation.needle import NeedleSuite
from rtpurbo.evaluation.perplexity import PerplexitySuite
from rtpurbo.evaluation.policies import Source
from rtpurbo.evaluation.questions import babilong
from rtpurbo.evaluation.questions.bank import QuestionBank
from rtpurbo.evaluation.questions.suites import SHORT, QuestionData
from rtpurbo.evaluation.request import Request
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.runner import Runner
from rtpurbo.evaluation.task_suite import TaskSuite


@dataclass(frozen=True)
class RunManifest:
    """Everything that a process needs to run cases; picklable.

    Attributes:
        source: the artifact, and how its models are loaded; its seed is that of the cases.
        request: the cases, and files with their questions.
        data: as `rtpurbo.evaluation.run.evaluate` takes it, like the next two.
        squad: questions of `ruler:qa_1`.
        hotpotqa: questions of `ruler:qa_2`.
        max_new_tokens: limit of answers to tasks of lm-eval and to questions of these suites.
        cache_length: tokens at which cache sizes are computed; None takes each case's length.
    """

    source: Source
    request: Request = field(default_factory=Request)
    data: Sequence[str] | None = None
    squad: str | Path | None = None
    hotpotqa: str | Path | None = None
    max_new_tokens: int | None = None
    cache_length: int | None = None

    def runner(self, prompts: Path | None = None, device: torch.device | None = None) -> Runner:
        """Returns a runner with the prompts and data of all suites, for models on the source's or another device.

        Processes share prompts in the folder of that name, if it is given.

        Raises:
            RTPurboError: a file is missing or of another format, or lm-eval is not installed.
        """
        seed, request = self.source.seed, self.request
        corpus = load_texts(self.data, "heldout")
        materials = Materials.of(corpus, self.squad, self.hotpotqa)
        data = QuestionData.read(request.question_data, seed)
        suites: dict[str, TaskSuite] = {
            "needle": NeedleSuite(corpus, seed),
            "perplexity": PerplexitySuite(corpus, seed),
            "ruler": RulerSuite(materials, seed, prompts),
            babilong.SUITE: RulerSuite(materials, seed, prompts, data.babilong),
            **dict.fromkeys(SHORT, QuestionBank(data, self.max_new_tokens)),
        }
        if any(case.suite == HARNESS for case in request.cases):
            # Importing lm-eval takes seconds, and it may not be installed.
            from rtpurbo.evaluation.harness.suite import Harness

            suites[HARNESS] = Harness(request.harness_data, self.max_new_tokens, seed)
        source = self.source if device is None else replace(self.source, device=device)
        return Runner(source, suites, self.cache_length)

    def conditions(self, runner: Runner) -> dict[str, Any]:
        """Returns the conditions of the run, which a later run must have to resume it."""
        prose, ruler = runner.suites["perplexity"], runner.suites["ruler"]
        assert isinstance(prose, PerplexitySuite)
        assert isinstance(ruler, RulerSuite)
        return conditions_of(
            self.source,
            prose.corpus,
            ruler.materials,
            task_data={**self.request.harness_data, **self.request.question_data},
            max_new_tokens=self.max_new_tokens,
            cache_length=self.cache_length,
        )
