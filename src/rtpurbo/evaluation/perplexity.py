"""Perplexity of prose, in which every query of a sparse model selects its keys."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, bos_and_prose
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.samples import Outcome
from rtpurbo.evaluation.task_suite import TaskSuite
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparsify import runtime

# Logits of this many positions are held at once.
CHUNK_POSITIONS = 512


class PerplexitySuite(TaskSuite):
    """Exponential of the mean loss per token over windows of prose.

    The queries of a sparse model whose rule is dense in prefill would not select here, so each query
    selects for itself, as in decoding.

    Args:
        corpus: prose that is not in any training.
        seed: of the windows, which do not depend on the model.
    """

    makes_prompts = False

    def __init__(self, corpus: TextCorpus, seed: int = 0) -> None:
        self.corpus, self.seed = corpus, seed

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        after_sample: Callable[[], None] = lambda: None,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns the perplexity; refuses a corpus that is shorter than a window."""
        length, means = case.context_length, []
        with _every_query_sparse(model):
            for number in range(case.samples):
                rng = random.Random(f"prose-{length}-{self.seed}-{number}")
                window = bos_and_prose(tokenizer, self.corpus, length, rng)
                losses = token_losses(model, torch.tensor([window], device=model.device))
                means.append(losses.double().mean().item())
                after_sample()
        return [Outcome.of_losses(means)]


@torch.no_grad()
def token_losses(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Returns the cross-entropy in nats of each token [batch, length] but the first.

    Logits are computed for some positions at a time, because those of a long window and a large
    vocabulary may be larger than the model.
    """
    hidden = decoder_of(model)(token_ids, use_cache=False).last_hidden_state[:, :-1]
    head, targets = model.get_output_embeddings(), token_ids[:, 1:]
    losses = [
        F.cross_entropy(head(states).float().transpose(1, 2), labels, reduction="none")
        for states, labels in zip(
            hidden.split(CHUNK_POSITIONS, 1), targets.split(CHUNK_POSITIONS, 1), strict=True
        )
    ]
    return torch.cat(losses, 1)


def _every_query_sparse(model: PreTrainedModel) -> AbstractContextManager[None]:
    if is_sparse(model) and model.rtpurbo_config.attention.prefill_mode == "dense":
        return runtime(model).rule(prefill_mode="top_p")
    return nullcontext()
