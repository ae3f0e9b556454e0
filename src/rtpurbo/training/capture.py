"""The states that stage 1 learns from: one forward over the frozen model, kept for the retrieval heads alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.attention import HeadwiseAttention, LayerObservation
from rtpurbo.models.sparsify import headwise_modules, observing, packing
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.selection import index_scores
from rtpurbo.ops.packed import document_starts


@dataclass
class CapturedHeads:
    """States of some retrieval heads over one sequence of packed documents; O(length) memory.

    Attributes:
        names: (layer, head) of each head, in the order of dim 1 below.
        query_weights: the indexer weights to be trained, [heads of a layer, index_dim, features] for each layer.
        key_weights: likewise; with shared keys [full KV heads of a layer, index_dim, features].
        key_weight_heads: for each layer, int64 [heads of a layer], the entry of its key weight that
            each head uses; None if each has its own.
        queries: [1, heads, length, head_dim], after RoPE.
        keys: the same shape: each head's KV head.
        query_features: [1, heads, length, features], what the indexer projects.
        key_features: likewise.
        positions: int64 [1, length], from 0 on in each document.
        starts: int64 [length], the place where each token's document begins.
        num_documents: how many there are.
        scaling: factor on the dot products.
    """

    names: list[tuple[int, int]]
    query_weights: list[Tensor]
    key_weights: list[Tensor]
    key_weight_heads: list[Tensor | None]
    queries: Tensor
    keys: Tensor
    query_features: Tensor
    key_features: Tensor
    positions: Tensor
    starts: Tensor
    num_documents: int
    scaling: float

    def logits(self, rows: Tensor) -> Tensor:
        """Exact attention logits of some query rows: [1, heads, rows, length]."""
        return attention_logits(self.queries[:, :, rows], self.keys, self.scaling)

    def index_queries(self, rows: Tensor) -> Tensor:
        """Index queries of some rows: [heads, rows, index_dim]; gradients flow to the weights."""
        return _projected(self.query_features[0, :, rows], self.query_weights)

    def index_keys(self) -> Tensor:
        """All index keys: [heads, length, index_dim]; gradients flow to the weights."""
        weights = [
            weight if heads is None else weight[heads]
            for weight, heads in zip(self.key_weights, self.key_weight_heads, strict=True)
        ]
        return _projected(self.key_features[0], weights)

    def index_scores(self, rows: Tensor) -> Tensor:
        """The indexers' scores of some query rows: [1, heads, rows, length]; gradients flow to the weights."""
        return index_scores(self.index_queries(rows), self.index_keys())[None]


def _projected(features: Tensor, weights: list[Tensor]) -> Tensor:
    return features @ torch.cat(weights).to(features.dtype).transpose(-1, -2)


def merge_heads(captured: list[CapturedHeads]) -> list[CapturedHeads]:
    """Heads of all layers side by side, as far as they have equally many features: fewer and larger operations."""
    groups: dict[int, list[CapturedHeads]] = {}
    for seen in captured:
        groups.setdefault(seen.query_features.shape[-1], []).append(seen)
    return [
        CapturedHeads(
            [name for seen in group for name in seen.names],
            [weight for seen in group for weight in seen.query_weights],
            [weight for seen in group for weight in seen.key_weights],
            [heads for seen in group for heads in seen.key_weight_heads],
            torch.cat([seen.queries for seen in group], 1),
            torch.cat([seen.keys for seen in group], 1),
            torch.cat([seen.query_features for seen in group], 1),
            torch.cat([seen.key_features for seen in group], 1),
            group[0].positions,
            group[0].starts,
            group[0].num_documents,
            group[0].scaling,
        )
        for group in groups.values()
    ]


def capture_heads(
    model: PreTrainedModel, input_ids: list[int], *, dense: bool = True
) -> list[CapturedHeads]:
    """Runs the frozen model over a sequence and keeps what the retrieval heads' indexers need.

    Args:
        model: sparse.
        input_ids: the sequence.
        dense: attention of the teacher; False takes the sparse student as it is.
    """
    captured: list[CapturedHeads] = []
    run_backbone(model, [input_ids], captured.append, dense=dense)
    # A CPU is faster on states that fit its caches.
    return merge_heads(captured) if model.device.type == "cuda" else captured


def run_backbone(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    meet: Callable[[CapturedHeads], None],
    *,
    dense: bool = True,
) -> None:
    """Runs the frozen model over packed documents and shows the states of each layer as it passes.

    No logits are computed, and no layer's states outlive it, unless `meet` keeps them.

    Args:
        model: sparse.
        documents: their tokens; each has positions from 0 on and sees itself alone.
        meet: called for every layer that has retrieval heads.
        dense: attention of the teacher; False takes the sparse student as it is, for a single document.
    """
    modules: dict[int, HeadwiseAttention] = {
        module.layer_idx: module for module in headwise_modules(model)
    }
    lengths = [len(document) for document in documents]
    assert dense or len(lengths) == 1, "the student takes documents one by one"
    device = model.device
    ids = torch.tensor([[token for document in documents for token in document]], device=device)
    starts = document_starts(lengths, device)
    positions = (torch.arange(ids.shape[1], device=device) - starts)[None]

    def observe(seen: LayerObservation) -> None:
        module = modules[seen.layer]
        if module.retrieval_heads:
            meet(_heads_of(module, seen, positions, starts, len(lengths)))

    with (
        torch.no_grad(),
        observing(model, observe, dense=dense),
        packing(model, lengths if len(lengths) > 1 else None),
    ):
        model.base_model(ids, position_ids=positions, use_cache=False)


def _heads_of(
    module: HeadwiseAttention,
    seen: LayerObservation,
    positions: Tensor,
    starts: Tensor,
    num_documents: int,
) -> CapturedHeads:
    # Already on the device: making an index there would wait for all that it has to do.
    layout = module.layout(seen.queries.device)
    heads = layout.retrieval.heads
    readers = layout.full_key_value_heads[layout.retrieval.key_value_heads]
    queries, keys = seen.queries[:, heads], seen.keys[:, readers]
    indexer = module.indexer
    return CapturedHeads(
        [(seen.layer, head) for head in module.retrieval_heads],
        [indexer.query_weight],
        [indexer.key_weight],
        [layout.retrieval.key_value_heads if indexer.settings.shared_keys else None],
        queries,
        keys,
        indexer.features(seen.queries_before_rotation[:, heads], queries).float(),
        indexer.features(seen.keys_before_rotation[:, readers], keys).float(),
        positions,
        starts,
        num_documents,
        seen.scaling,
    )
