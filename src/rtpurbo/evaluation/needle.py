"""Can the model still find what hides far back? Questions about numbers in long prose."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.needles import is_correct, make_retrieval_example
from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.batching import questions_at_once
from rtpurbo.evaluation.needle_tasks import TASKS
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.models.text import continue_tokens

# An answer may be worded with a few more tokens than expected.
SLACK_TOKENS = 8


def needle_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    task: str,
    context_length: int,
    samples: int,
    seed: int = 0,
    after_sample: Callable[[], None] = lambda: None,
) -> Outcome:
    """Greedy answers to questions whose keys no training saw.

    Questions depend on everything but the model: every policy gets the same ones.

    Args:
        model: dense or sparse.
        tokenizer: the model's.
        corpus: prose that the needles hide in.
        task: one of `TASKS`.
        context_length: tokens of prompt and answer together, at most.
        samples: questions; with task `single` their needles stand at evenly spread depths.
        seed: of the questions.
        after_sample: called after each.

    Raises:
        RTPurboError: `context_length` leaves no room for prose, or the corpus is too short.
    """
    examples = [
        make_retrieval_example(
            tokenizer,
            corpus,
            context_length,
            random.Random(f"needle-{task}-{context_length}-{seed}-{number}"),
            depth=(number + 0.5) / samples if task == "single" else None,
            split="test",
            **TASKS[task],
        )
        for number in range(samples)
    ]
    answered = []
    at_once = questions_at_once(model, context_length)
    for first in range(0, samples, at_once):
        batch = examples[first : first + at_once]
        budget = max(len(example.answer_ids) for example in batch) + SLACK_TOKENS
        prompts = [example.prompt_ids for example in batch]
        for example, generated in zip(
            batch, continue_tokens(model, tokenizer, prompts, budget), strict=True
        ):
            score = 100.0 * is_correct(example, generated)
            answered.append(Sample.of(example.prompt_ids, example.answers, generated, score))
            after_sample()
    return Outcome.of(answered)
