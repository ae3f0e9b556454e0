"""The states that stage 1 learns from: one forward over the frozen model, kept for the retrieval heads alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.attention import HeadwiseAttention, LayerObservation
from rtpurbo.models.sparsify import headwise_modules, observing
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.selection import index_scores


@dataclass
class CapturedHeads:
    """States of some retrieval heads over one sequence; O(length) memory.

    Attributes:
        names: (layer, head) of each head, in the order of dim 1 below.
        query_weights: the indexer weights to be trained, [heads of a layer, index_dim, features] for each layer.
        key_weights: likewise.
        queries: [1, heads, length, head_dim], after RoPE.
        keys: the same shape: each head's KV head.
        query_features: [1, heads, length, features], what the indexer projects.
        key_features: likewise.
        positions: int64 [1, length].
        scaling: factor on the dot products.
    """

    names: list[tuple[int, int]]
    query_weights: list[Tensor]
    key_weights: list[Tensor]
    queries: Tensor
    keys: Tensor
    query_features: Tensor
    key_features: Tensor
    positions: Tensor
    scaling: float

    def logits(self, rows: Tensor) -> Tensor:
        """Exact attention logits of some query rows: [1, heads, rows, length]."""
        return attention_logits(self.queries[:, :, rows], self.keys, self.scaling)

    def index_scores(self, rows: Tensor) -> Tensor:
        """The indexers' scores of some query rows: [1, heads, rows, length]; gradients flow to the weights."""
        queries = self.query_features[:, :, rows] @ torch.cat(self.query_weights).transpose(-1, -2)
        keys = self.key_features @ torch.cat(self.key_weights).transpose(-1, -2)
        return index_scores(queries, keys)


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
            torch.cat([seen.queries for seen in group], 1),
            torch.cat([seen.keys for seen in group], 1),
            torch.cat([seen.query_features for seen in group], 1),
            torch.cat([seen.key_features for seen in group], 1),
            group[0].positions,
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
    modules: dict[int, HeadwiseAttention] = {
        module.layer_idx: module for module in headwise_modules(model)
    }
    captured: list[CapturedHeads] = []

    def keep(seen: LayerObservation) -> None:
        module = modules[seen.layer]
        if not module.retrieval_heads:
            return
        heads = torch.tensor(module.retrieval_heads, device=seen.queries.device)
        readers = heads // (module.num_attention_heads // module.num_key_value_heads)
        queries, keys = seen.queries[:, heads], seen.keys[:, readers]
        indexer = module.indexer
        captured.append(
            CapturedHeads(
                [(seen.layer, head) for head in module.retrieval_heads],
                [indexer.query_weight],
                [indexer.key_weight],
                queries,
                keys,
                indexer.features(seen.queries_before_rotation[:, heads], queries).float(),
                indexer.features(seen.keys_before_rotation[:, readers], keys).float(),
                seen.positions,
                seen.scaling,
            )
        )

    with torch.no_grad(), observing(model, keep, dense=dense):
        model.base_model(torch.tensor([input_ids], device=model.device), use_cache=False)
    # A CPU is faster on states that fit its caches.
    return merge_heads(captured) if model.device.type == "cuda" else captured
