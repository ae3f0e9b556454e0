"""Stage 1 at length: the indexers of a layer learn as it passes, so that no layer's states are kept."""

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
from rtpurbo.training.packing import RowChoice, choose_rows, pack
from rtpurbo.training.sequences import TrainingSequence


def train_as_layers_pass(
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
    """One forward over some sequences, in which every layer's indexers get their gradients.

    Sequences are packed as far as they are no longer together than the longest that training meets;
    what each teaches does not depend on what it is packed with.

    Args:
        model: sparse, with indexers that are trained.
        sequences: what to learn from.
        settings: rows and their weights.
        seeds: for each sequence, of the choice of its rows.
        on_student: learn from the sparse model itself, sequence by sequence.
        packed: pack them; False makes as many forwards as there are sequences, as processes need who
            have to run them together.
        backend: of the loss.
        around_loss: entered whenever a loss is computed, to measure it.

    Returns:
        For each sequence its loss, a scalar: mean over heads and rows. Gradients are those of the sum
        over heads and sequences.
    """
    rule = model.rtpurbo_config.attention
    packed = packed and not on_student and takes_packed_documents(model.config)
    longest = max(settings.lengths) if packed else 0
    losses: list[Tensor] = []
    for group in pack(sequences, longest):
        documents = [sequence.input_ids for sequence in sequences[group]]
        choice = choose_rows(sequences[group], rule, settings, seeds[group], model.device)
        of_layers: list[tuple[Tensor, int]] = []
        learn = partial(_learn, of_layers, choice, rule, backend, around_loss)
        run_backbone(model, documents, learn, dense=not on_student)
        num_heads = sum(count for _, count in of_layers)
        losses += (torch.stack([total for total, _ in of_layers]).sum(0) / num_heads).unbind()
    return losses


def _learn(
    of_layers: list[tuple[Tensor, int]],
    choice: RowChoice,
    rule: AttentionRule,
    backend: str,
    around_loss: Callable[[], AbstractContextManager[None]],
    seen: CapturedHeads,
) -> None:
    """Learns from a layer, and notes the losses of its documents and its number of heads."""
    with around_loss():
        total = backpropagate(seen, choice, rule, backend=backend)
    of_layers.append((total, len(seen.names)))
