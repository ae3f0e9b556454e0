"""The tests of a run: what each cell asks of a model, the same of every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.cells import HARNESS, Cell
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
class Battery:
    """Runs cells.

    Attributes:
        corpus: prose.
        ruler: RULER's tests.
        babilong: those of BABILong; without its questions, it has no tasks.
        questions: the suites whose questions have their own length.
        harness: those of LM Evaluation Harness; None if no cell asks for them.
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
        cells: Sequence[Cell],
        context_length: int,
        progress: Progress,
    ) -> dict[Cell, list[Cell]]:
        """Makes the prompts that take long to make, and finds out which do not fit their length.

        Args:
            tokenizer: the model's.
            cells: the tests.
            context_length: the model's.
            progress: told after each test.

        Returns:
            The tests to run, by the cell that asks for them: groups of tasks have become their tasks.

        Raises:
            RTPurboError: a task is unknown, its data cannot be had, or it does not fit its length.
        """
        long = [cell for cell in cells if cell.suite in (*self._filled, *SHORT, HARNESS)]
        ready: dict[Cell, list[Cell]] = {}
        for cell in cells:
            if cell in long:
                progress("prompts", long.index(cell), len(long), {})
            if cell.suite == HARNESS:
                assert self.harness is not None
                ready[cell] = self.harness.prepare(tokenizer, cell, context_length)
                continue
            if cell.suite in self._filled:
                suite = self._filled[cell.suite]
                suite.examples(tokenizer, cell.task, cell.context_length, cell.samples)
            elif cell.suite in SHORT:
                self.questions.prepare(tokenizer, cell.suite, cell.samples, context_length)
            ready[cell] = [cell]
        if long:
            progress("prompts", len(long), len(long), {})
        return ready

    def run(
        self,
        cell: Cell,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        after_sample: Callable[[], None],
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns an outcome for each metric of a cell.

        Args:
            cell: one that was prepared.
            model: dense or sparse.
            tokenizer: the model's.
            after_sample: called after each question or window.
            questions: consecutive questions of the cell, where `in_parts` has several; None asks all.
        """
        length, samples = cell.context_length, cell.samples
        if cell.suite == HARNESS:
            assert self.harness is not None
            return self.harness.run(model, tokenizer, cell, after_sample)
        if cell.suite in self._filled:
            suite = self._filled[cell.suite]
            return [suite.run(model, tokenizer, cell.task, length, samples, after_sample)]
        if cell.suite in SHORT:
            asked = range(samples) if questions is None else questions
            return [self.questions.run(model, tokenizer, cell.suite, asked, after_sample)]
        if cell.suite == "needle":
            return [
                needle_accuracy(
                    model,
                    tokenizer,
                    self.corpus,
                    cell.task,
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


def in_parts(cell: Cell, most: int) -> list[range]:
    """Divides the questions of a cell, for several processes to share.

    Suites of short questions have one task and many questions, which take long together. Other tests
    are one part.

    Args:
        cell: the test.
        most: the most parts.
    """
    if cell.suite not in SHORT:
        return [range(cell.samples)]
    parts = max(1, min(most, cell.samples // QUESTIONS_OF_A_PART))
    bounds = [round(cell.samples * part / parts) for part in range(parts + 1)]
    return [range(*pair) for pair in pairwise(bounds)]
