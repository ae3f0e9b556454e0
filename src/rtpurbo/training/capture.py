"""The states that stage 1 learns from: one forward over the frozen model, kept for the retrieval heads alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layer import LayerObservation, SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing, packing
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
        queries: [1, heads, rows, head_dim], after RoPE.
        keys: [1, KV heads, length, head_dim], of KV heads that a retrieval head reads: query heads share them.
        query_features: [1, heads, rows, features], what the indexer projects.
        key_features: [1, KV heads, length, features].
        key_value_heads: int64 [heads], the place of each head's KV head, ascending.
        group_places: int64 [heads], the place of each head among those of its KV head.
        group_size: the most heads of a KV head.
        positions: int64 [1, length], from 0 on in each document.
        starts: int64 [length], the place where each token's document begins.
        num_documents: how many there are.
        scaling: factor on the dot products.
        rows: int64 [rows], ascending, those whose queries were kept; None for all of them.
        sinks: learned sinks [heads], logits that take part in the teacher's softmax; None if there are none.
    """

    names: list[tuple[int, int]]
    query_weights: list[Tensor]
    key_weights: list[Tensor]
    key_weight_heads: list[Tensor | None]
    queries: Tensor
    keys: Tensor
    query_features: Tensor
    key_features: Tensor
    key_value_heads: Tensor
    group_places: Tensor
    group_size: int
    positions: Tensor
    starts: Tensor
    num_documents: int
    scaling: float
    rows: Tensor | None = None
    sinks: Tensor | None = None

    def queries_of(self, rows: Tensor) -> Tensor:
        """Queries of some rows: [1, heads, rows, head_dim]."""
        return self.queries[:, :, self._places(rows)]

    def logits(self, rows: Tensor) -> Tensor:
        """Exact attention logits of some query rows: [1, heads, rows, length]."""
        queries = self._by_group(self.queries_of(rows)[0])
        logits = attention_logits(queries.flatten(1, 2), self.keys[0], self.scaling)
        return self._by_head(logits.unflatten(1, queries.shape[1:3]))[None]

    def index_queries(self, rows: Tensor) -> Tensor:
        """Index queries of some rows: [heads, rows, index_dim]; gradients flow to the weights."""
        features = _exact(self.query_features[0, :, self._places(rows)])
        return features @ torch.cat(self.query_weights).to(features.dtype).transpose(-1, -2)

    def index_keys(self) -> Tensor:
        """All index keys: [heads, length, index_dim]; gradients flow to the weights."""
        features = _exact(self.key_features[0])
        of_heads = [
            weight if heads is None else weight[heads]
            for weight, heads in zip(self.key_weights, self.key_weight_heads, strict=True)
        ]
        weights = self._by_group(torch.cat(of_heads).to(features.dtype))
        # One product for each KV head: copies of its features for every query head would be larger.
        keys = features @ weights.flatten(1, 2).transpose(-1, -2)
        return self._by_head(keys.unflatten(-1, weights.shape[1:3]).movedim(1, 2))

    def index_scores(self, rows: Tensor) -> Tensor:
        """The indexers' scores of some query rows: [1, heads, rows, length]; gradients flow to the weights."""
        return index_scores(self.index_queries(rows), self.index_keys())[None]

    def _places(self, rows: Tensor) -> Tensor:
        """Where the queries of some rows are kept."""
        return rows if self.rows is None else torch.searchsorted(self.rows, rows)

    def _by_group(self, values: Tensor) -> Tensor:
        """From [heads, ...] to [KV heads, group size, ...], with zeros where a group is smaller."""
        kv_heads = self.keys.shape[1]
        if len(values) == kv_heads * self.group_size:
            return values.unflatten(0, (kv_heads, self.group_size))
        grouped = values.new_zeros(kv_heads, self.group_size, *values.shape[1:])
        return grouped.index_put((self.key_value_heads, self.group_places), values)

    def _by_head(self, grouped: Tensor) -> Tensor:
        """From [KV heads, group size, ...] to [heads, ...]."""
        if grouped.shape[0] * self.group_size == len(self.names):
            return grouped.flatten(0, 1)
        return grouped[self.key_value_heads, self.group_places]


def _exact(features: Tensor) -> Tensor:
    """Features in at least fp32: training needs more than half precision."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def merge_heads(captured: list[CapturedHeads]) -> list[CapturedHeads]:
    """Heads of all layers side by side, as far as they have equally many features: fewer and larger operations.

    The states given are released as they are joined, so that little more than one copy exists.
    """
    groups: dict[int, list[CapturedHeads]] = {}
    for seen in captured:
        groups.setdefault(seen.query_features.shape[-1], []).append(seen)
    return [_merged(group) for group in groups.values()]


def _merged(group: list[CapturedHeads]) -> CapturedHeads:
    first_kv_heads = accumulate((seen.keys.shape[1] for seen in group), initial=0)
    return replace(
        group[0],
        names=[name for seen in group for name in seen.names],
        query_weights=[weight for seen in group for weight in seen.query_weights],
        key_weights=[weight for seen in group for weight in seen.key_weights],
        key_weight_heads=[heads for seen in group for heads in seen.key_weight_heads],
        # Before the keys, whose number these depend on, are released.
        key_value_heads=torch.cat(
            [
                seen.key_value_heads + first
                for seen, first in zip(group, first_kv_heads, strict=False)
            ]
        ),
        group_places=torch.cat([seen.group_places for seen in group]),
        group_size=max(seen.group_size for seen in group),
        queries=_joined(group, "queries"),
        keys=_joined(group, "keys"),
        query_features=_joined(group, "query_features"),
        key_features=_joined(group, "key_features"),
        sinks=None
        if group[0].sinks is None
        else torch.cat([seen.sinks for seen in group if seen.sinks is not None]),
    )


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
    modules: dict[int, SparseAttention] = {
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
        decoder_of(model)(ids, position_ids=positions, use_cache=False)


def _heads_of(
    module: SparseAttention,
    seen: LayerObservation,
    positions: Tensor,
    starts: Tensor,
    num_documents: int,
) -> CapturedHeads:
    # Already on the device: making an index there would wait for all that it has to do.
    layout = module.layout(seen.queries.device)
    heads = layout.retrieval.heads
    kv_heads = layout.full_key_value_heads
    if "group_places" not in layout.derived:
        layout.derived["group_places"] = _group_places(module, seen.queries.device)
    places, size = layout.derived["group_places"]
    queries, keys = seen.queries[:, heads], seen.keys[:, kv_heads]
    indexer = module.indexer
    return CapturedHeads(
        [(seen.layer, head) for head in module.retrieval_heads],
        [indexer.query_weight],
        [indexer.key_weight],
        [layout.retrieval.key_value_heads if indexer.settings.shared_keys else None],
        queries,
        keys,
        indexer.features(queries, seen.undo_rotation),
        indexer.features(keys, seen.undo_rotation),
        layout.retrieval.key_value_heads,
        places,
        size,
        positions,
        starts,
        num_documents,
        seen.scaling,
        sinks=None if seen.sinks is None else seen.sinks.detach()[heads],
    )


def _group_places(module: SparseAttention, device: torch.device) -> tuple[Tensor, int]:
    """The place of each retrieval head among those of its KV head, and the most heads of a KV head."""
    group = module.num_attention_heads // module.num_key_value_heads
    counts: Counter[int] = Counter()
    places = []
    for head in module.retrieval_heads:
        places.append(counts[head // group])
        counts[head // group] += 1
    return torch.tensor(places, device=device), max(counts.values())
