"""Suites whose prompts are filled to a length: RULER and BABILong."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.ruler.draft import Task
from rtpurbo.evaluation.ruler.examples import (
    Example,
    make_examples,
    read_examples,
    write_examples,
)
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.evaluation.task_suite import AnswerSuite, Instance


class RulerSuite(AnswerSuite):
    """Cases whose prompts are filled to their length; each prompt is made once for all policies.

    Args:
        materials: words, prose and passages of the haystacks.
        seed: of the questions.
        folder: where the processes of a run share prompts; None shares none.
        tasks: by name; those of RULER, or of another suite that fills prompts in the same way.
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
        """Returns the questions of a case."""
        place = (task, context_length, samples)
        if place not in self._made:
            shared = self.folder and self.folder / f"{task}-{context_length}-{samples}.json"
            if shared and shared.exists():
                self._made[place] = read_examples(shared)
            else:
                self._made[place] = make_examples(
                    self.tasks[task], tokenizer, context_length, samples, self.seed, self.materials
                )
                if shared:
                    write_examples(shared, self._made[place])
        return self._made[place]

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, case: Case, context_length: int
    ) -> list[Case]:
        """Makes the prompts of a case."""
        self.examples(tokenizer, case.task, case.context_length, case.samples)
        return [case]

    def instances(self, tokenizer: PreTrainedTokenizerBase, case: Case) -> list[Instance]:
        """Returns the questions of a case."""
        examples = self.examples(tokenizer, case.task, case.context_length, case.samples)
        task = self.tasks[case.task]
        return [
            Instance(
                example.prompt_ids,
                example.answers,
                task.tokens_to_generate,
                partial(task.score, answers=example.answers, rejected=example.rejected),
            )
            for example in examples
        ]
