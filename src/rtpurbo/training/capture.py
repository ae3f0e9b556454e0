"""States that stage 1 trains on: one forward of the frozen model, kept for the retrieval heads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layer import LayerObservation, SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing, runtime
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.selection import index_scores
from rtpurbo.ops.packed import document_starts


@dataclass
class CapturedHeads:
    """States of a layer's retrieval heads over one sequence of packed documents; O(length) memory.

    Attributes:
        names: (layer, head) of each head, in the order of dimension 1 below.
        query_weight: trained query weights of the indexer, [heads, index_dim, features].
        key_weight: trained key weights, of the same shape, or with shared keys [full KV heads,
            index_dim, features].
        key_weight_heads: int64 [heads], the entry of the key weights that each head uses; None if each
            head has its own.
        queries: [1, heads, queries, head_dim], after RoPE.
        keys: [1, KV heads, length, head_dim], of KV heads with a retrieval head; query heads share them.
        query_features: [1, heads, queries, features], input of the indexer.
        key_features: [1, KV heads, length, features].
        key_value_heads: int64 [heads], KV head index of each head in `keys`, ascending.
        group_sizes: number of these heads of each KV head.
        positions: int64 [1, length], position in the document, from 0.
        starts: int64 [length], index at which each token's document begins.
        num_documents: number of documents.
        scaling: factor on the dot products.
        query_positions: int64 [queries], ascending positions whose queries were kept; None for all of them.
        sinks: learned sinks [heads], additional logits of the teacher's softmax; None if there are none.
    """

    names: list[tuple[int, int]]
    query_weight: Tensor
    key_weight: Tensor
    key_weight_heads: Tensor | None
    queries: Tensor
    keys: Tensor
    query_features: Tensor
    key_features: Tensor
    key_value_heads: Tensor
    group_sizes: list[int]
    positions: Tensor
    starts: Tensor
    num_documents: int
    scaling: float
    query_positions: Tensor | None = None
    sinks: Tensor | None = None

    def queries_of(self, query_positions: Tensor) -> Tensor:
        """Returns the queries at some positions: [1, heads, queries, head_dim]."""
        return self.queries[:, :, self._places(query_positions)]

    def logits(self, query_positions: Tensor) -> Tensor:
        """Returns exact attention logits of some queries: [1, heads, queries, length]."""
        # One product for each KV head: copies of its keys for every query head would be larger.
        queries = self.queries_of(query_positions)[0]
        logits = [
            attention_logits(own.flatten(0, 1), keys, self.scaling)
            for own, keys in zip(queries.split(self.group_sizes), self.keys[0], strict=True)
        ]
        return torch.cat(logits).unflatten(0, queries.shape[:2])[None]

    def index_queries(self, query_positions: Tensor) -> Tensor:
        """Returns index queries at some positions: [heads, queries, index_dim]; gradients flow to the weights."""
        features = _exact(self.query_features[0, :, self._places(query_positions)])
        return features @ self.query_weight.to(features.dtype).transpose(-1, -2)

    def index_keys(self) -> Tensor:
        """Returns all index keys: [heads, length, index_dim]; gradients flow to the weights."""
        features = _exact(self.key_features[0])
        of_heads = self.key_weight
        if self.key_weight_heads is not None:
            of_heads = of_heads[self.key_weight_heads]
        groups = of_heads.to(features.dtype).transpose(-1, -2).split(self.group_sizes)
        return torch.cat([own @ weights for own, weights in zip(features, groups, strict=True)])

    def index_scores(self, query_positions: Tensor) -> Tensor:
        """Returns the indexers' scores of some queries: [1, heads, queries, length]; gradients flow to the weights."""
        return index_scores(self.index_queries(query_positions), self.index_keys())[None]

    def _places(self, query_positions: Tensor) -> Tensor:
        """Returns the indices at which some queries are kept."""
        return (
            query_positions
            if self.query_positions is None
            else torch.searchsorted(self.query_positions, query_positions)
        )


def _exact(features: Tensor) -> Tensor:
    """Returns features in at least fp32, because training needs more than half precision."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def capture_heads(
    model: PreTrainedModel,
    input_ids: list[int],
    *,
    dense: bool = True,
    query_positions: Tensor | None = None,
) -> list[CapturedHeads]:
    """Runs the frozen model over a sequence and keeps the states that each layer's indexers need.

    Args:
        model: sparse.
        input_ids: tokens of the sequence.
        dense: as in `run_backbone`.
        query_positions: int64, ascending positions of the queries to keep; None keeps all.
    """
    captured: list[CapturedHeads] = []

    def keep(seen: CapturedHeads) -> None:
        if query_positions is not None:
            seen = replace(
                seen,
                queries=seen.queries[:, :, query_positions],
                query_features=seen.query_features[:, :, query_positions],
                query_positions=query_positions,
            )
        captured.append(seen)

    run_backbone(model, [input_ids], keep, dense=dense)
    return captured


def run_backbone(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    observe_heads: Callable[[CapturedHeads], None],
    *,
    dense: bool = True,
) -> None:
    """Runs the frozen model over packed documents and passes on the states of each layer.

    No logits are computed, and the states of a layer are freed after it unless `observe_heads` keeps them.

    Args:
        model: sparse.
        documents: tokens of each document, which has positions from 0 and attends to itself only.
        observe_heads: called for every layer that has retrieval heads.
        dense: use the teacher's dense attention; False uses the sparse student's, for a single document.
    """
    modules: dict[int, SparseAttention] = {
        module.layer_idx: module for module in headwise_modules(model)
    }
    lengths = [len(document) for document in documents]
    assert dense or len(lengths) == 1, "the student runs one document at a time"
    device = model.device
    ids = torch.tensor([[token for document in documents for token in document]], device=device)
    starts = document_starts(lengths, device)
    positions = (torch.arange(ids.shape[1], device=device) - starts)[None]

    def observe(seen: LayerObservation) -> None:
        module = modules[seen.layer]
        if module.retrieval_heads:
            observe_heads(_heads_of(module, seen, positions, starts, len(lengths)))

    with (
        torch.no_grad(),
        observing(model, observe, dense=dense),
        runtime(model).packed(lengths if len(lengths) > 1 else None),
    ):
        decoder_of(model)(ids, position_ids=positions, use_cache=False)


def _heads_of(
    module: SparseAttention,
    seen: LayerObservation,
    positions: Tensor,
    starts: Tensor,
    num_documents: int,
) -> CapturedHeads:
    # Already on the device: copying an index there would synchronise with the host.
    layout = module.layout(seen.queries.device)
    heads = layout.retrieval.heads
    kv_heads = layout.full_key_value_heads
    queries, keys = seen.queries[:, heads], seen.keys[:, kv_heads]
    indexer, group = module.indexer, module.num_attention_heads // module.num_key_value_heads
    return CapturedHeads(
        names=[(seen.layer, head) for head in module.retrieval_heads],
        query_weight=indexer.query_weight,
        key_weight=indexer.key_weight,
        key_weight_heads=(
            layout.retrieval.key_value_heads if indexer.settings.shared_keys else None
        ),
        queries=queries,
        keys=keys,
        query_features=indexer.features(queries, seen.undo_rotation),
        key_features=indexer.features(keys, seen.undo_rotation),
        key_value_heads=layout.retrieval.key_value_heads,
        group_sizes=list(Counter(head // group for head in module.retrieval_heads).values()),
        positions=positions,
        starts=starts,
        num_documents=num_documents,
        scaling=seen.scaling,
        sinks=None if seen.sinks is None else seen.sinks.detach()[heads],
    )
