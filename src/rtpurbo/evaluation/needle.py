"""Needle questions: greedy answers about numbers that are hidden in long prose."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.needles import is_correct, make_retrieval_example
from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.batching import questions_at_once
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.needle_tasks import TASKS
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.evaluation.task_suite import TaskSuite, ignore_sample
from rtpurbo.models.text import continue_tokens

# An answer may be worded with a few more tokens than expected.
SLACK_TOKENS = 8


class NeedleSuite(TaskSuite):
    """Questions with keys that are not in any training; with task `single` at evenly spread depths.

    Args:
        corpus: prose that the needles are hidden in.
        seed: of the questions, which do not depend on the model.
    """

    makes_prompts = False

    def __init__(self, corpus: TextCorpus, seed: int = 0) -> None:
        self.corpus, self.seed = corpus, seed

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        after_sample: Callable[[], None] = ignore_sample,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns the share of right answers.

        Raises:
            RTPurboError: the length leaves no room for prose, or the corpus is too short.
        """
        task, length = case.task, case.context_length
        examples = [
            make_retrieval_example(
                tokenizer,
                self.corpus,
                length,
                random.Random(f"needle-{task}-{length}-{self.seed}-{number}"),
                depth=(number + 0.5) / case.samples if task == "single" else None,
                split="test",
                **TASKS[task],
            )
            for number in range(case.samples)
        ]
        answered = []
        at_once = questions_at_once(model, length)
        for first in range(0, case.samples, at_once):
            batch = examples[first : first + at_once]
            limit = max(len(example.answer_ids) for example in batch) + SLACK_TOKENS
            prompts = [example.prompt_ids for example in batch]
            written = continue_tokens(model, tokenizer, prompts, limit)
            for example, generated in zip(batch, written, strict=True):
                score = 100.0 * is_correct(example, generated)
                answered.append(Sample.of(example.prompt_ids, example.answers, generated, score))
                after_sample()
        return [Outcome.of(answered)]
