"""Layer-wise training of stage 1: each layer is trained during the forward pass, and no states are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule
from rtpurbo.models.architecture import takes_packed_documents
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training.backpropagation import backpropagate
from rtpurbo.training.capture import CapturedHeads, run_backbone
from rtpurbo.training.packing import QueryChoice, choose_queries, pack
from rtpurbo.training.sequences import TrainingSequence


def train_layer_by_layer(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    settings: IndexerTrainingSettings,
    seeds: Sequence[str],
    *,
    on_student: bool = False,
    packed: bool = True,
    backend: str = "auto",
    around_loss: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Tensor]:
    """Runs one forward over some sequences and computes the gradients of each layer's indexers as it runs.

    Sequences are packed up to the length of the longest training sequence. Losses and gradients of a
    sequence do not depend on what it is packed with.

    Args:
        model: sparse, with indexers that require gradients.
        sequences: sequences to train on.
        settings: choice of queries and their weights.
        seeds: seed of the choice of queries in each sequence.
        on_student: attention of the sparse model itself as target, one sequence at a time.
        packed: pack sequences; False runs one forward for each sequence, which processes that run every
            layer together need.
        backend: backend of the loss.
        around_loss: context manager around each loss, to measure it.

    Returns:
        Scalar loss of each sequence: mean over heads and queries. Gradients are those of the sum over
        heads and sequences.
    """
    rule = model.rtpurbo_config.attention
    packed = packed and not on_student and takes_packed_documents(model.config)
    longest = max(settings.lengths) if packed else 0
    losses: list[Tensor] = []
    for group in pack(sequences, longest):
        documents = [sequence.input_ids for sequence in sequences[group]]
        choice = choose_queries(sequences[group], rule, settings, seeds[group], model.device)
        by_layer: list[tuple[Tensor, int]] = []
        train = partial(_train_layer, by_layer, choice, rule, backend, around_loss)
        run_backbone(model, documents, train, dense=not on_student)
        num_heads = sum(count for _, count in by_layer)
        losses += (torch.stack([total for total, _ in by_layer]).sum(0) / num_heads).unbind()
    return losses


def _train_layer(
    by_layer: list[tuple[Tensor, int]],
    choice: QueryChoice,
    rule: AttentionRule,
    backend: str,
    around_loss: Callable[[], AbstractContextManager[None]],
    seen: CapturedHeads,
) -> None:
    """Trains on one layer and records the losses of its documents and its number of heads."""
    with around_loss():
        total = backpropagate(seen, choice, rule, backend=backend)
    by_layer.append((total, len(seen.names)))
