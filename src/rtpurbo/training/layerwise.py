"""Loss and gradients of stage 1, and layer-wise training: each layer during the forward pass, without kept states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule
from rtpurbo.models.architecture import takes_packed_documents
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.ops.packed import divergence_backend, indexer_divergence
from rtpurbo.settings import IndexerTrainingSettings
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

    Sequences are packed up to the length of the longest training sequence. Losses and gradients of a sequence
    do not depend on what it is packed with. Unpacked, each has a forward of its own, which processes that run
    every layer together need, and which `on_student` takes: its target is the attention of the sparse model
    itself. Each sequence has a seed of the choice of its queries. `around_loss` measures each loss.

    Returns:
        Scalar loss of each sequence: mean over heads and queries. Gradients are those of the sum over
        heads and sequences.
    """
    rule = model.rtpurbo_config.attention
    packed = packed and not on_student and takes_packed_documents(model.config)
    longest = max(settings.lengths) if packed else 0
    losses: list[Tensor] = []
    by_layer: list[tuple[Tensor, int]] = []

    def train(seen: CapturedHeads) -> None:
        with around_loss():
            total = backpropagate(seen, choice, rule, backend=backend)
        by_layer.append((total, len(seen.names)))

    for group in pack(sequences, longest):
        documents = [sequence.input_ids for sequence in sequences[group]]
        choice = choose_queries(sequences[group], rule, settings, seeds[group], model.device)
        by_layer.clear()
        run_backbone(model, documents, train, dense=not on_student)
        num_heads = sum(count for _, count in by_layer)
        losses += (torch.stack([total for total, _ in by_layer]).sum(0) / num_heads).unbind()
    return losses


def backpropagate(
    seen: CapturedHeads, choice: QueryChoice, rule: AttentionRule, *, backend: str = "auto"
) -> Tensor:
    """Computes the loss of stage 1 and adds its gradients to those of the indexers' weights.

    Returns:
        fp32 [documents], loss of each document: mean over its queries, sum over the heads.
    """
    losses = torch.zeros(seen.num_documents, device=seen.queries.device)
    if not choice.positions.numel():
        return losses
    if seen.sinks is not None and backend == "auto":
        backend = "eager"  # kernels do not support learned sinks
    with torch.enable_grad():
        projected = seen.index_queries(choice.positions), seen.index_keys()
        # Gradients of the index states are summed first and pass through the projections once.
        index_queries, index_keys = (states.detach().requires_grad_() for states in projected)
        for chunk in _chunks(seen, choice.positions, index_queries, backend):
            part = choice.part(chunk)
            divergence = indexer_divergence(
                seen.queries_of(part.positions)[0],
                seen.keys[0],
                seen.key_value_heads,
                index_queries[:, chunk],
                index_keys,
                part.positions,
                seen.starts,
                rule,
                scaling=seen.scaling,
                sinks=seen.sinks,
                backend=backend,
            )
            (divergence * part.weights).sum().backward()
            per_query = (divergence.detach() * part.report_weights).sum(0).to(losses.dtype)
            losses.index_add_(0, part.documents, per_query)
        gradients = [index_queries.grad, index_keys.grad]
        torch.autograd.backward(projected, gradients)
    return losses


def _chunks(
    seen: CapturedHeads, positions: Tensor, index_queries: Tensor, backend: str
) -> Iterator[slice]:
    """Yields slices of the queries: one for the kernels, several for plain PyTorch to bound its memory."""
    if divergence_backend(seen.queries, seen.keys, index_queries, backend) == "triton":
        return iter([slice(None)])
    return query_chunks(positions.numel(), len(seen.names) * seen.keys.shape[2])
