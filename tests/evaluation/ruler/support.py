"""Shared by the tests of RULER's tasks."""

import random
from functools import cache

from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation.ruler.draft import Request
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import make_examples
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.evaluation.ruler.vocabulary import own_vocabulary
from tests.tiny_tokenizer import tiny_tokenizer

# The tiny tokenizer needs more tokens for long lists than 4,096.
LENGTH = 6144


@cache
def materials():
    """The same whether or not `wonderwords` is installed."""
    return Materials.of(load_texts(None, "heldout"), vocabulary=own_vocabulary())


def examples_of(task, length=LENGTH, samples=3, seed=0, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    return make_examples(TASKS[task], tokenizer, length, samples, seed, materials())


def prompts_of(task, **options):
    """The text of some prompts, and their answers."""
    tokenizer = tiny_tokenizer()
    return [
        (tokenizer.decode(example.prompt_ids), example.answers)
        for example in examples_of(task, **options)
    ]


def draft_of(task, number=0, length=LENGTH, **changes):
    request = {"materials": materials(), "context_length": length, "seed": 0, "number": number}
    return TASKS[task].draft(Request(**{**request, "rng": random.Random(number), **changes}))
