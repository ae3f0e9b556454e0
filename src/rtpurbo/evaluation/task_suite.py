"""Task suites: prompts and scoring of cases, the same for every policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.devices import in_fitting_batches
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.text import continue_tokens

# Fewer leave a GPU idle, as a step takes about as long for many questions as for few.
QUESTIONS_OF_A_PART = 48
SCORED_AT_ONCE = 4
MOST_AT_ONCE = 32
# For short questions with long answers, whose steps take about as long for many sequences as for one.
MOST_SHORT_AT_ONCE = 128
# Limits the size of the cache of a batch.
TOKENS_AT_ONCE = 2**18
# Entries of a dense model's mask, of one byte each before attention converts it.
MASK_ENTRIES = 2**30


class TaskSuite(ABC):
    """Cases of one suite.

    Attributes:
        makes_prompts: prompts take long to make, which `prepare` does once for all policies.
    """

    makes_prompts = True

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, case: Case, context_length: int
    ) -> list[Case]:
        """Makes the prompts of a requested case, with the tokenizer that all policies share.

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
        after_sample: Callable[[], None] = lambda: None,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns an outcome for each metric of a case from `prepare`.

        `after_sample` is called after each question or window. Questions are consecutive ones, where
        `in_parts` has several parts; None asks all.
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
        after_sample: Callable[[], None] = lambda: None,
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

        if case.context_length:
            size, every = questions_at_once(model, case.context_length), range(len(instances))
            batches = [list(every[first : first + size]) for first in every[::size]]
        else:
            # Sorted by their lengths, so that little padding is needed.
            lengths = [len(each.prompt_ids) + each.max_new_tokens for each in instances]
            batches = batches_by_length(model, lengths)
        answered: dict[int, Sample] = {}
        # Scoring may run generated code, in a process for each answer.
        with ThreadPoolExecutor(SCORED_AT_ONCE) as threads:
            for batch_places, written in in_fitting_batches(batches, answers):
                batch = [instances[place] for place in batch_places]
                scores = threads.map(lambda each, text: each.score(text), batch, written)
                for place, each, text, score in zip(
                    batch_places, batch, written, scores, strict=True
                ):
                    answered[place] = Sample.of(each.prompt_ids, each.answers, text, 100.0 * score)
                    after_sample()
        return [Outcome.of([answered[place] for place in range(len(instances))])]


def questions_at_once(model: PreTrainedModel, context_length: int, most: int = MOST_AT_ONCE) -> int:
    """Returns the batch size, of `most` at most, for questions whose prompts differ in length.

    Batches save time on a GPU only. In a dense model, several padded prompts need a mask [batch, length,
    length], and a single prompt needs none: long prompts are slower in a batch, and a batch of eight at 32K
    took 50 GB (docs/experiment-log.md).
    """
    if model.device.type != "cuda":
        return 1
    fitting = TOKENS_AT_ONCE // context_length
    if not is_sparse(model):
        fitting = min(fitting, MASK_ENTRIES // context_length**2)
    return max(1, min(most, fitting))


def batches_by_length(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Returns batches of questions of similar length, the longest first.

    Args:
        model: dense or sparse.
        lengths: tokens of each question's prompt and answer, at least one.

    Returns:
        Indices into `lengths`, by batch.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while order:
        size = questions_at_once(model, lengths[order[0]], MOST_SHORT_AT_ONCE)
        batches.append(order[:size])
        order = order[size:]
    return batches


def in_parts(case: Case, most: int) -> list[range]:
    """Divides the questions of a case into parts for several processes, of `most` at most.

    Suites of short questions have one task with many questions. Other cases are one part.
    """
    if case.suite not in SHORT:
        return [range(case.samples)]
    parts = max(1, min(most, case.samples // QUESTIONS_OF_A_PART))
    bounds = [round(case.samples * part / parts) for part in range(parts + 1)]
    return [range(*pair) for pair in pairwise(bounds)]
