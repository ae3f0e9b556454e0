"""The states that stage 1 learns from: one forward over the frozen model, kept for the retrieval heads alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.attention import HeadwiseAttention, LayerObservation
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.models.sparsify import headwise_modules, observing
from rtpurbo.ops.eager.attend import attention_logits


@dataclass
class CapturedLayer:
    """States of a layer's retrieval heads over one sequence; O(length) memory.

    Attributes:
        indexer: the layer's indexer, which is to be trained.
        layer: the layer's number.
        heads: the retrieval heads, in the order of dim 1 below.
        queries: [1, num_retrieval_heads, length, head_dim], after RoPE.
        keys: the same shape: each head's KV head.
        query_features: [1, num_retrieval_heads, length, features], what the indexer projects.
        key_features: likewise.
        positions: int64 [1, length].
        scaling: factor on the dot products.
    """

    indexer: TokenIndexer
    layer: int
    heads: list[int]
    queries: Tensor
    keys: Tensor
    query_features: Tensor
    key_features: Tensor
    positions: Tensor
    scaling: float

    def logits(self, rows: Tensor) -> Tensor:
        """Exact attention logits of some query rows: [1, heads, rows, length]."""
        return attention_logits(self.queries[:, :, rows], self.keys, self.scaling)


def capture_layers(model: PreTrainedModel, input_ids: list[int], *, dense: bool = True) -> list[CapturedLayer]:
    """Runs the frozen model over a sequence and keeps what the retrieval heads' indexers need.

    Args:
        model: sparse.
        input_ids: the sequence.
        dense: attention of the teacher; False takes the sparse student as it is.
    """
    modules: dict[int, HeadwiseAttention] = {module.layer_idx: module for module in headwise_modules(model)}
    captured: list[CapturedLayer] = []

    def keep(seen: LayerObservation) -> None:
        module = modules[seen.layer]
        if not module.retrieval_heads:
            return
        heads = torch.tensor(module.retrieval_heads, device=seen.queries.device)
        readers = heads // (module.num_attention_heads // module.num_key_value_heads)
        queries, keys = seen.queries[:, heads], seen.keys[:, readers]
        captured.append(
            CapturedLayer(
                module.indexer,
                seen.layer,
                module.retrieval_heads,
                queries,
                keys,
                module.indexer.features(seen.queries_before_rotation[:, heads], queries).float(),
                module.indexer.features(seen.keys_before_rotation[:, readers], keys).float(),
                seen.positions,
                seen.scaling,
            )
        )

    with torch.no_grad(), observing(model, keep, dense=dense):
        model.base_model(torch.tensor([input_ids], device=model.device), use_cache=False)
    return captured
