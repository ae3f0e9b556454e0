"""Needle questions: greedy answers about numbers that are hidden in long prose."""

from __future__ import annotations

import random
from functools import partial

from transformers import PreTrainedTokenizerBase

from rtpurbo.data.needles import is_correct, make_retrieval_example
from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.cases import NEEDLE_TASKS, Case
from rtpurbo.evaluation.task_suite import AnswerSuite, Instance

# An answer may be worded with a few more tokens than expected.
SLACK_TOKENS = 8


class NeedleSuite(AnswerSuite):
    """Questions with keys that are not in any training; with task `single` at evenly spread depths.

    Args:
        corpus: prose that the needles are hidden in.
        seed: of the questions, which do not depend on the model.
    """

    makes_prompts = False

    def __init__(self, corpus: TextCorpus, seed: int = 0) -> None:
        self.corpus, self.seed = corpus, seed

    def instances(self, tokenizer: PreTrainedTokenizerBase, case: Case) -> list[Instance]:
        """Returns the questions of a case."""
        task, length = case.task, case.context_length
        instances = []
        for number in range(case.samples):
            example = make_retrieval_example(
                tokenizer,
                self.corpus,
                length,
                random.Random(f"needle-{task}-{length}-{self.seed}-{number}"),
                depth=(number + 0.5) / case.samples if task == "single" else None,
                split="test",
                **NEEDLE_TASKS[task],
            )
            limit = len(example.answer_ids) + SLACK_TOKENS
            instances.append(
                Instance(example.prompt_ids, example.answers, limit, partial(is_correct, example))
            )
        return instances
