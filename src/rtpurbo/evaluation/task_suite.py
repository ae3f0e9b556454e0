"""Task suites: prompts and scoring of cases, the same for every policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.evaluation.batching import questions_at_once
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.models.text import continue_tokens

# Fewer leave a GPU idle, as a step takes about as long for many questions as for few.
QUESTIONS_OF_A_PART = 48


def ignore_sample() -> None:
    """Default of `after_sample`: does nothing."""


class TaskSuite(ABC):
    """Cases of one suite.

    Attributes:
        makes_prompts: prompts take long to make, which `prepare` does once for all policies.
    """

    makes_prompts = True

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, case: Case, context_length: int
    ) -> list[Case]:
        """Makes the prompts of a case.

        Args:
            tokenizer: the model's; all policies share it.
            case: as requested.
            context_length: the model's, in tokens.

        Returns:
            The cases to run: a group of tasks has become its tasks.

        Raises:
            RTPurboError: the task is unknown, its data is not available, or it does not fit its length.
        """
        return [case]

    @abstractmethod
    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        after_sample: Callable[[], None] = ignore_sample,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns an outcome for each metric of a case.

        Args:
            model: dense or sparse.
            tokenizer: the model's.
            case: from `prepare`.
            after_sample: called after each question or window.
            questions: consecutive questions of the case, where `in_parts` has several; None asks all.
        """


@dataclass(frozen=True)
class Asked:
    """Question with a prompt of the length of its case.

    Attributes:
        prompt_ids: tokens of the prompt.
        answers: expected strings.
        max_new_tokens: limit of the answer.
        score: returns the score of an answer, from 0 to 1.
    """

    prompt_ids: Sequence[int]
    answers: Sequence[str]
    max_new_tokens: int
    score: Callable[[str], float]


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    context_length: int,
    after_sample: Callable[[], None],
) -> Outcome:
    """Returns the mean score of greedy answers, in percent.

    Args:
        model: dense or sparse.
        tokenizer: the model's.
        asked: questions of a case.
        context_length: tokens of the longest prompt and answer.
        after_sample: called after each question.
    """
    samples = []
    at_once = questions_at_once(model, context_length)
    for first in range(0, len(asked), at_once):
        batch = asked[first : first + at_once]
        limit = max(each.max_new_tokens for each in batch)
        written = continue_tokens(model, tokenizer, [each.prompt_ids for each in batch], limit)
        for each, generated in zip(batch, written, strict=True):
            score = 100.0 * each.score(generated)
            samples.append(Sample.of(each.prompt_ids, each.answers, generated, score))
            after_sample()
    return Outcome.of(samples)


def in_parts(case: Case, most: int) -> list[range]:
    """Divides the questions of a case among several processes.

    Suites of short questions have one task with many questions. Other cases are one part.

    Args:
        case: to divide.
        most: largest number of parts.
    """
    if case.suite not in SHORT:
        return [range(case.samples)]
    parts = max(1, min(most, case.samples // QUESTIONS_OF_A_PART))
    bounds = [round(case.samples * part / parts) for part in range(parts + 1)]
    return [range(*pair) for pair in pairwise(bounds)]
