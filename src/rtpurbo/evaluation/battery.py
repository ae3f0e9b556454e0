"""The tests of a run: what each cell asks of a model, the same of every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.cells import Cell
from rtpurbo.evaluation.needle import needle_accuracy
from rtpurbo.evaluation.perplexity import prose_perplexity
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.samples import Outcome
from rtpurbo.settings import Progress


@dataclass(frozen=True)
class Battery:
    """Runs cells.

    Attributes:
        corpus: prose.
        ruler: RULER's tests.
        seed: of all tests.
    """

    corpus: TextCorpus
    ruler: RulerSuite
    seed: int = 0

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, cells: Sequence[Cell], progress: Progress
    ) -> None:
        """Makes the prompts that take long to make, and finds out which do not fit their length."""
        long = [cell for cell in cells if cell.suite == "ruler"]
        for done, cell in enumerate(long):
            progress("prompts", done, len(long), {})
            self.ruler.examples(tokenizer, cell.task, cell.context_length, cell.samples)
        if long:
            progress("prompts", len(long), len(long), {})

    def run(
        self,
        cell: Cell,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        after_sample: Callable[[], None],
    ) -> Outcome:
        """What a model makes of a cell."""
        length, samples = cell.context_length, cell.samples
        if cell.suite == "ruler":
            return self.ruler.run(model, tokenizer, cell.task, length, samples, after_sample)
        if cell.suite == "needle":
            return needle_accuracy(
                model, tokenizer, self.corpus, cell.task, length, samples, self.seed, after_sample
            )
        return Outcome(
            prose_perplexity(
                model, tokenizer, self.corpus, length, samples, self.seed, after_sample
            )
        )
