"""The states that stage 1 learns from: one forward over the frozen model, kept for the retrieval heads alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
        key_weights: likewise.
        queries: [1, heads, rows, head_dim], after RoPE.
        keys: [1, heads, length, head_dim]: each head's KV head.
        query_features: [1, heads, rows, features], what the indexer projects.
        key_features: [1, heads, length, features].
        positions: int64 [1, length], from 0 on in each document.
        starts: int64 [length], the place where each token's document begins.
        num_documents: how many there are.
        scaling: factor on the dot products.
        rows: int64 [rows], ascending, those whose queries were kept; None for all of them.
    """

    names: list[tuple[int, int]]
    query_weights: list[Tensor]
    key_weights: list[Tensor]
    queries: Tensor
    keys: Tensor
    query_features: Tensor
    key_features: Tensor
    positions: Tensor
    starts: Tensor
    num_documents: int
    scaling: float
    rows: Tensor | None = None

    def queries_of(self, rows: Tensor) -> Tensor:
        """Queries of some rows: [1, heads, rows, head_dim]."""
        return self.queries[:, :, self._places(rows)]

    def logits(self, rows: Tensor) -> Tensor:
        """Exact attention logits of some query rows: [1, heads, rows, length]."""
        return attention_logits(self.queries_of(rows), self.keys, self.scaling)

    def index_queries(self, rows: Tensor) -> Tensor:
        """Index queries of some rows: [heads, rows, index_dim]; gradients flow to the weights."""
        return _projected(self.query_features[0, :, self._places(rows)], self.query_weights)

    def index_keys(self) -> Tensor:
        """All index keys: [heads, length, index_dim]; gradients flow to the weights."""
        return _projected(self.key_features[0], self.key_weights)

    def index_scores(self, rows: Tensor) -> Tensor:
        """The indexers' scores of some query rows: [1, heads, rows, length]; gradients flow to the weights."""
        return index_scores(self.index_queries(rows), self.index_keys())[None]

    def _places(self, rows: Tensor) -> Tensor:
        """Where the queries of some rows are kept."""
        return rows if self.rows is None else torch.searchsorted(self.rows, rows)


def _projected(features: Tensor, weights: list[Tensor]) -> Tensor:
    """Projections in at least fp32: training needs more than half precision."""
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    return exact @ torch.cat(weights).to(exact.dtype).transpose(-1, -2)


def merge_heads(captured: list[CapturedHeads]) -> list[CapturedHeads]:
    """Heads of all layers side by side, as far as they have equally many features: fewer and larger operations.

    The states given are released as they are joined, so that little more than one copy exists.
    """
    groups: dict[int, list[CapturedHeads]] = {}
    for seen in captured:
        groups.setdefault(seen.query_features.shape[-1], []).append(seen)
    return [
        CapturedHeads(
            [name for seen in group for name in seen.names],
            [weight for seen in group for weight in seen.query_weights],
            [weight for seen in group for weight in seen.key_weights],
            _joined(group, "queries"),
            _joined(group, "keys"),
            _joined(group, "query_features"),
            _joined(group, "key_features"),
            group[0].positions,
            group[0].starts,
            group[0].num_documents,
            group[0].scaling,
            group[0].rows,
        )
        for group in groups.values()
    ]


def _joined(group: list[CapturedHeads], name: str) -> Tensor:
    joined = torch.cat([getattr(seen, name) for seen in group], 1)
    for seen in group:
        setattr(seen, name, joined[:, :0])
    return joined


def capture_heads(
    model: PreTrainedModel,
    input_ids: list[int],
    *,
    dense: bool = True,
    rows: Tensor | None = None,
) -> list[CapturedHeads]:
    """Runs the frozen model over a sequence and keeps what the retrieval heads' indexers need.

    Args:
        model: sparse.
        input_ids: the sequence.
        dense: attention of the teacher; False takes the sparse student as it is.
        rows: int64, ascending, the rows whose queries will be needed; None keeps all.
    """
    captured: list[CapturedHeads] = []

    def keep(seen: CapturedHeads) -> None:
        captured.append(seen if rows is None else _with_rows(seen, rows))

    run_backbone(model, [input_ids], keep, dense=dense)
    # A CPU is faster on states that fit its caches.
    return merge_heads(captured) if model.device.type == "cuda" else captured


def _with_rows(seen: CapturedHeads, rows: Tensor) -> CapturedHeads:
    """The same heads with the queries of some rows alone."""
    return replace(
        seen,
        queries=seen.queries[:, :, rows],
        query_features=seen.query_features[:, :, rows],
        rows=rows,
    )


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
        queries,
        keys,
        indexer.features(seen.queries_before_rotation[:, heads], queries),
        indexer.features(seen.keys_before_rotation[:, readers], keys),
        positions,
        starts,
        num_documents,
        seen.scaling,
    )
