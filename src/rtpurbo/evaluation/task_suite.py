"""Task suites: prompts and scoring of cases, the same for every policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.devices import in_fitting_batches
from rtpurbo.evaluation.batching import batches_by_length, questions_at_once
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.models.text import continue_tokens

# Fewer leave a GPU idle, as a step takes about as long for many questions as for few.
QUESTIONS_OF_A_PART = 48
SCORED_AT_ONCE = 4


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
class Instance:
    """Question of a case with its prompt and score, as an instance of LM Evaluation Harness.

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


class AnswerSuite(TaskSuite):
    """Suite whose cases are questions with greedy answers."""

    @abstractmethod
    def instances(self, tokenizer: PreTrainedTokenizerBase, case: Case) -> Sequence[Instance]:
        """Returns the questions of a case, in order.

        Raises:
            RTPurboError: the length of the case is too short for its task, or the corpus is.
        """

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        after_sample: Callable[[], None] = ignore_sample,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns the mean score of the answers, in percent."""
        instances = self.instances(tokenizer, case)
        if questions is not None:
            instances = instances[questions.start : questions.stop]

        def answers(places: Sequence[int]) -> list[str]:
            batch = [instances[place] for place in places]
            limit = max(each.max_new_tokens for each in batch)
            prompts = [each.prompt_ids for each in batch]
            return continue_tokens(model, tokenizer, prompts, limit)

        answered: dict[int, Sample] = {}
        # Scoring may run generated code, in a process for each answer.
        with ThreadPoolExecutor(SCORED_AT_ONCE) as threads:
            batches = in_fitting_batches(batches_of(model, case, instances), answers)
            for places, written in batches:
                batch = [instances[place] for place in places]
                scores = threads.map(lambda each, text: each.score(text), batch, written)
                for place, each, text, score in zip(places, batch, written, scores, strict=True):
                    answered[place] = Sample.of(each.prompt_ids, each.answers, text, 100.0 * score)
                    after_sample()
        return [Outcome.of([answered[place] for place in range(len(instances))])]


def batches_of(
    model: PreTrainedModel, case: Case, instances: Sequence[Instance]
) -> list[list[int]]:
    """Returns batches of the questions of a case, as indices into `instances`.

    Questions with their own lengths are sorted by them, so that little padding is needed.
    """
    if not case.context_length:
        return batches_by_length(
            model, [len(each.prompt_ids) + each.max_new_tokens for each in instances]
        )
    size = questions_at_once(model, case.context_length)
    places = list(range(len(instances)))
    return [places[first : first + size] for first in range(0, len(places), size)]


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
