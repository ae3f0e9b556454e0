"""Asks a model the questions of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.evaluation.batching import questions_at_once
from rtpurbo.evaluation.ruler.draft import Task
from rtpurbo.evaluation.ruler.examples import (
    Example,
    make_examples,
    read_examples,
    write_examples,
)
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.models.text import continue_tokens


class RulerSuite:
    """The tests of one run, each made once for all policies, which share a tokenizer.

    Args:
        materials: what haystacks are made of.
        seed: of the tests.
        folder: where other processes of the run leave the tests that they made, and find this one's.
        tasks: by name; RULER's unless another suite is filled to a length in the same way.
    """

    def __init__(
        self,
        materials: Materials,
        seed: int = 0,
        folder: Path | None = None,
        tasks: Mapping[str, Task] = TASKS,
    ) -> None:
        self.materials = materials
        self.seed = seed
        self.folder = folder
        self.tasks = tasks
        self._made: dict[tuple[str, int, int], list[Example]] = {}

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, task: str, context_length: int, samples: int
    ) -> list[Example]:
        """The questions of a test."""
        test = (task, context_length, samples)
        if test not in self._made:
            shared = self.folder and self.folder / f"{task}-{context_length}-{samples}.json"
            if shared and shared.exists():
                self._made[test] = read_examples(shared)
            else:
                self._made[test] = make_examples(
                    self.tasks[task], tokenizer, context_length, samples, self.seed, self.materials
                )
                if shared:
                    write_examples(shared, self._made[test])
        return self._made[test]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        context_length: int,
        samples: int,
        after_sample: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Greedy answers to the questions of a test, and their mean score in percent.

        Args:
            model: dense or sparse.
            tokenizer: the model's.
            task: the name of one of the tasks.
            context_length: the most tokens of prompt and answer.
            samples: questions.
            after_sample: called after each.

        Raises:
            RTPurboError: `context_length` is too short for the task.
        """
        examples = self.examples(tokenizer, task, context_length, samples)
        kind, answered = self.tasks[task], list[Sample]()
        at_once = questions_at_once(model, context_length)
        for first in range(0, samples, at_once):
            batch = examples[first : first + at_once]
            prompts = [example.prompt_ids for example in batch]
            written = continue_tokens(model, tokenizer, prompts, kind.tokens_to_generate)
            for example, generated in zip(batch, written, strict=True):
                score = 100 * kind.score(generated, example.answers, example.rejected)
                answered.append(Sample.of(example.prompt_ids, example.answers, generated, score))
                after_sample()
        return Outcome.of(answered)
