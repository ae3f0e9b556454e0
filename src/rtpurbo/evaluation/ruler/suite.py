"""Suites whose prompts are filled to a length: RULER and BABILong."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rtpurbo.data.fitting import largest_that_fits
from rtpurbo.data.prompts import Question, conversation_tokens
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.ruler.draft import Draft, Request, Task
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.evaluation.task_suite import AnswerSuite, Instance
from rtpurbo.files import write_text_atomically


@dataclass
class RulerSuite(AnswerSuite):
    """Cases whose prompts are filled to their length; each prompt is made once for all policies.

    The processes of a run share prompts in a folder, if one is given. Tasks are those of RULER, or of another
    suite that fills prompts in the same way.
    """

    materials: Materials
    seed: int = 0
    folder: Path | None = None
    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)
    _made: dict[tuple[str, int, int], list[Example]] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Example:
    """Question of a case.

    Attributes:
        prompt_ids: tokens of the prompt, including the opening words of the answer.
        answers: strings that a correct answer contains.
        rejected: strings that a correct answer does not contain, for tasks that check them.
    """

    prompt_ids: array[int]
    answers: tuple[str, ...]
    rejected: tuple[str, ...] = ()


def make_examples(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    samples: int,
    seed: int,
    materials: Materials,
) -> list[Example]:
    """Returns the questions of a case; question k does not depend on the number of questions.

    Prompt and generated tokens together have at most `context_length` tokens, and would have more with one
    more unit of the haystack.

    Raises:
        RTPurboError: `context_length` leaves no room for the smallest haystack.
    """

    def drafts_at(length: int) -> list[Draft]:
        return [_draft(task, length, seed, number, materials) for number in range(samples)]

    def least_length(drafts: list[Draft]) -> int:
        smallest = max(len(prompt(tokenizer, draft, draft.smallest)) for draft in drafts)
        return smallest + task.tokens_to_generate

    drafts = drafts_at(context_length)
    if (least := least_length(drafts)) > context_length:
        # A longer context may have a longer smallest prompt.
        while (longer := least_length(drafts_at(least))) > least:
            least = longer
        raise RTPurboError(
            f"the {task.suite} task {task.name} does not fit into {context_length:,} tokens: with this "
            f"model's tokenizer it needs at least {least:,}."
        )
    examples = []
    for draft in drafts:
        size = largest_that_fits(
            lambda size, draft=draft: len(prompt(tokenizer, draft, size)),  # type: ignore[misc]
            context_length - task.tokens_to_generate,
            draft.smallest,
        )
        prompt_ids = array("i", prompt(tokenizer, draft, size))
        examples.append(Example(prompt_ids, draft.answers, draft.rejected))
    return examples


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Writes the questions of a case, for `read_examples` in another process."""
    rows = [
        (example.prompt_ids.tolist(), example.answers, example.rejected) for example in examples
    ]
    write_text_atomically(path, json.dumps(rows))


def read_examples(path: Path) -> list[Example]:
    """Returns the questions that `write_examples` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        Example(array("i", prompt_ids), tuple(answers), tuple(rejected))
        for prompt_ids, answers, rejected in rows
    ]


def prompt(tokenizer: PreTrainedTokenizerBase, draft: Draft, size: int) -> list[int]:
    """Returns the tokens of a question with a haystack of some size."""
    question = Question(draft.question, draft.opening, "")
    return conversation_tokens(tokenizer, draft.text(size), [question]).input_ids


def _draft(task: Task, context_length: int, seed: int, number: int, materials: Materials) -> Draft:
    # Without the length: the question is the same at every length, and only the haystack grows.
    rng = random.Random(f"{task.suite.lower()}-{task.name}-{seed}-{number}")
    return task.draft(Request(materials, context_length, seed, number, rng))
