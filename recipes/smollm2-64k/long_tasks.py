"""Four long-range tasks, scored by teacher forcing; used by the recipe of a 64K model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.needles import RetrievalExample, make_retrieval_example
from rtpurbo.data.texts import TextCorpus
from rtpurbo.data.variables import make_variable_example

TASKS: dict[str, Callable[..., RetrievalExample]] = {
    "4 keys": partial(make_retrieval_example, num_keys=4),
    "16 keys": partial(make_retrieval_example, num_keys=16),
    "4 values": partial(make_retrieval_example, num_values=4),
    "variables": partial(make_variable_example, num_hops=4),
}
SCORING = (
    "Scored by teacher forcing: an answer is right if each of its tokens is the likeliest one given "
    "the prompt and the right tokens before it, in one forward. Books, words and names are held out."
)


def make_examples(
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    length: int,
    number: int,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, RetrievalExample]:
    """Example `number` of some tasks, the same for every model of this tokenizer."""
    return {
        task: TASKS[task](
            tokenizer, corpus, length, random.Random(f"{task}-{length}-{seed}-{number}")
        )
        for task in tasks
    }


@torch.no_grad()
def is_predicted(model: PreTrainedModel, example: RetrievalExample) -> bool:
    """True if every token of the answer is the likeliest one, prompt and answer in one forward."""
    answer = torch.tensor(example.answer_ids, device=model.device)
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids[:-1]]], device=model.device)
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, -len(answer) :]
    return bool((model.get_output_embeddings()(hidden).argmax(-1) == answer).all())
