"""Perplexity of prose, where every query of a sparse model selects its keys."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, begin_ids
from rtpurbo.evaluation.samples import Outcome
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparsify import runtime

# Logits of this many positions are held at once.
CHUNK_POSITIONS = 512


def prose_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    context_length: int,
    samples: int,
    seed: int = 0,
    after_sample: Callable[[], None] = lambda: None,
) -> Outcome:
    """The exponential of the mean loss a token over windows of prose.

    A sparse model whose rule is dense for several rows at once would measure nothing of the
    selection here, so each row then selects for itself, as in decoding.

    Args:
        model: dense or sparse.
        tokenizer: the model's.
        corpus: prose that no training saw.
        context_length: tokens of a window.
        samples: windows; they depend on everything but the model.
        seed: of the windows.
        after_sample: called after each.

    Raises:
        RTPurboError: the corpus is shorter than a window.
    """
    start = begin_ids(tokenizer)
    means = []
    with _every_row_sparse(model):
        for number in range(samples):
            rng = random.Random(f"prose-{context_length}-{seed}-{number}")
            window = start + corpus.sample_tokens(tokenizer, context_length - len(start), rng)
            losses = token_losses(model, torch.tensor([window], device=model.device))
            means.append(losses.double().mean().item())
            after_sample()
    return Outcome.of_losses(means)


@torch.no_grad()
def token_losses(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Cross-entropy in nats of each token [batch, length] but the first.

    Logits are made some positions at a time: those of a long window and a large vocabulary are
    larger than many a model.
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


def _every_row_sparse(model: PreTrainedModel) -> AbstractContextManager[None]:
    if is_sparse(model) and model.rtpurbo_config.attention.prefill_mode == "dense":
        return runtime(model).rule(prefill_mode="top_p")
    return nullcontext()
