"""The tests of a run: what each case asks of a model, the same of every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.cases import HARNESS, Case
from rtpurbo.evaluation.needle import needle_accuracy
from rtpurbo.evaluation.perplexity import prose_perplexity
from rtpurbo.evaluation.questions import babilong
from rtpurbo.evaluation.questions.bank import QuestionBank
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.samples import Outcome
from rtpurbo.settings import Progress

if TYPE_CHECKING:
    from rtpurbo.evaluation.harness.suite import Harness


# Fewer leave a GPU idle, as a step takes about as long for many questions as for few.
QUESTIONS_OF_A_PART = 48


@dataclass(frozen=True)
class TaskSuite:
    """Runs cases.

    Attributes:
        corpus: prose.
        ruler: RULER's tests.
        babilong: those of BABILong; without its questions, it has no tasks.
        questions: the suites whose questions have their own length.
        harness: those of LM Evaluation Harness; None if no case asks for them.
        seed: of all tests.
    """

    corpus: TextCorpus
    ruler: RulerSuite
    babilong: RulerSuite
    questions: QuestionBank
    harness: Harness | None = None
    seed: int = 0

    @property
    def _filled(self) -> dict[str, RulerSuite]:
        """Suites whose prompts are filled to a length, by name."""
        return {"ruler": self.ruler, babilong.SUITE: self.babilong}

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[Case],
        context_length: int,
        progress: Progress,
    ) -> dict[Case, list[Case]]:
        """Makes the prompts that take long to make, and finds out which do not fit their length.

        Args:
            tokenizer: the model's.
            cases: the tests.
            context_length: the model's.
            progress: told after each test.

        Returns:
            The tests to run, by the case that asks for them: groups of tasks have become their tasks.

        Raises:
            RTPurboError: a task is unknown, its data cannot be had, or it does not fit its length.
        """
        long = [case for case in cases if case.suite in (*self._filled, *SHORT, HARNESS)]
        ready: dict[Case, list[Case]] = {}
        for case in cases:
            if case in long:
                progress("prompts", long.index(case), len(long), {})
            if case.suite == HARNESS:
                assert self.harness is not None
                ready[case] = self.harness.prepare(tokenizer, case, context_length)
                continue
            if case.suite in self._filled:
                suite = self._filled[case.suite]
                suite.examples(tokenizer, case.task, case.context_length, case.samples)
            elif case.suite in SHORT:
                self.questions.prepare(tokenizer, case.suite, case.samples, context_length)
            ready[case] = [case]
        if long:
            progress("prompts", len(long), len(long), {})
        return ready

    def run(
        self,
        case: Case,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        after_sample: Callable[[], None],
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns an outcome for each metric of a case.

        Args:
            case: one that was prepared.
            model: dense or sparse.
            tokenizer: the model's.
            after_sample: called after each question or window.
            questions: consecutive questions of the case, where `in_parts` has several; None asks all.
        """
        length, samples = case.context_length, case.samples
        if case.suite == HARNESS:
            assert self.harness is not None
            return self.harness.run(model, tokenizer, case, after_sample)
        if case.suite in self._filled:
            suite = self._filled[case.suite]
            return [suite.run(model, tokenizer, case.task, length, samples, after_sample)]
        if case.suite in SHORT:
            asked = range(samples) if questions is None else questions
            return [self.questions.run(model, tokenizer, case.suite, asked, after_sample)]
        if case.suite == "needle":
            return [
                needle_accuracy(
                    model,
                    tokenizer,
                    self.corpus,
                    case.task,
                    length,
                    samples,
                    self.seed,
                    after_sample,
                )
            ]
        return [
            prose_perplexity(
                model, tokenizer, self.corpus, length, samples, self.seed, after_sample
            )
        ]


def in_parts(case: Case, most: int) -> list[range]:
    """Divides the questions of a case, for several processes to share.

    Suites of short questions have one task and many questions, which take long together. Other tests
    are one part.

    Args:
        case: the test.
        most: the most parts.
    """
    if case.suite not in SHORT:
        return [range(case.samples)]
    parts = max(1, min(most, case.samples // QUESTIONS_OF_A_PART))
    bounds = [round(case.samples * part / parts) for part in range(parts + 1)]
    return [range(*pair) for pair in pairwise(bounds)]
