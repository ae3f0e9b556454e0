"""The attention of a sparse model on vLLM: one module that stands in for every family's own.

T rows of all requests together, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from rtpurbo.config import RTPurboConfig
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.ops import HeadLayout
from rtpurbo.serving.vllm import cuda, eager
from rtpurbo.serving.vllm.caches import Caches, PagedCache
from rtpurbo.serving.vllm.layout import LayerHeads
from rtpurbo.serving.vllm.pages import LayerCache

OPERATOR = "rtpurbo::serve_attention"
"""The one operator of a layer, opaque to compilers: graphs of the model are cut there."""


class ServedAttention(nn.Module):
    """Takes over the projections of a family's attention and attends by head.

    Args:
        original: the family's attention module, of which everything but the attention itself is kept,
            under the same names.
        heads: the rank's heads of this layer.
        config: rule and indexer settings.
        indexer: of the rank's retrieval heads; None if no head of the layer retrieves on any rank.
        layer: the layer's number.
        caches: of the model.
    """

    # Norms are there in some families, an indexer in some layers.
    qkv_proj: nn.Module
    o_proj: nn.Module
    rotary_emb: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    indexer: TokenIndexer

    def __init__(
        self,
        original: Any,
        heads: LayerHeads,
        config: RTPurboConfig,
        indexer: TokenIndexer | None,
        layer: int,
        caches: Caches,
    ) -> None:
        super().__init__()
        for name, child in original.named_children():
            if name != "attn":
                setattr(self, name, child)
        if indexer is not None:
            self.indexer = indexer
        self.name = original.attn.layer_name.removesuffix(".attn")
        self.layer = layer
        self.head_dim: int = original.head_dim
        self.scaling: float = original.scaling
        self.sizes = [original.q_size, original.kv_size, original.kv_size]
        self.rule = config.attention
        self.before_rotation = config.indexer.index_space == "pre_rope" and indexer is not None
        self.heads = heads
        self.full = caches.full if heads.num_full else None
        self.windowed = caches.windowed[layer] if heads.num_windowed else None
        self._layouts: dict[torch.device, HeadLayout] = {}

    def layout(self, device: torch.device) -> HeadLayout:
        """The rank's heads of the layer as index tensors on a device."""
        if device not in self._layouts:
            self._layouts[device] = HeadLayout.build(
                self.heads.retrieval,
                self.heads.num_attention_heads,
                self.heads.num_key_value_heads,
                device,
            )
        return self._layouts[device]

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """As every family's: [T, hidden_size] of [T, hidden_size]."""
        projected, _ = self.qkv_proj(hidden_states)
        queries, keys, values = projected.split(self.sizes, -1)
        if hasattr(self, "q_norm"):
            queries, keys = (
                norm(states.unflatten(-1, (-1, self.head_dim))).flatten(-2)
                for norm, states in ((self.q_norm, queries), (self.k_norm, keys))
            )
        unrotated: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.before_rotation:
            # The rotary embedding may write where it reads.
            unrotated = queries.clone(), keys.clone()
        queries, keys = self.rotary_emb(positions, queries, keys)
        output = torch.empty_like(queries)
        torch.ops.rtpurbo.serve_attention(queries, keys, values, *unrotated, output, self.name)
        attended, _ = self.o_proj(output)
        return attended

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        unrotated_queries: Tensor,
        unrotated_keys: Tensor,
        output: Tensor,
    ) -> None:
        """Stores a step's tokens and writes its attention; all are [T, heads, D]."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            output.zero_()  # vLLM measures memory, before there is a cache
            return
        layout = self.layout(queries.device)
        full, windowed = self._cache(self.full, metadata), self._cache(self.windowed, metadata)
        for cache, kept, kv_head_index in (
            (full, layout.full_key_value_heads, layout.retrieval.key_value_heads),
            (windowed, layout.windowed_key_value_heads, None),
        ):
            if cache is None:
                continue
            # Batches are padded, in graphs beyond what has a slot.
            rows = cache.batch.slots.shape[0]
            index_keys = None
            if kv_head_index is not None:
                index_keys = self._index_keys(
                    unrotated_keys[:rows], keys[:rows], kept[kv_head_index]
                )
            cache.pages.write(
                cache.batch.slots[: keys.shape[0]],
                keys[:rows, kept],
                values[:rows, kept],
                index_keys,
            )
        index_queries = None
        if full is not None:
            index_queries = self._index_queries(unrotated_queries, queries, layout.retrieval.heads)
        attend = cuda.attend if queries.is_cuda else eager.attend
        attend(queries, index_queries, full, windowed, layout, self.rule, self.scaling, output)

    def _cache(self, cache: PagedCache | None, metadata: Any) -> LayerCache | None:
        if cache is None:
            return None
        return LayerCache(cache.pages[self.layer], metadata[cache.name])

    def _index_keys(self, unrotated: Tensor, keys: Tensor, kv_head_index: Tensor) -> Tensor:
        """[T, retrieval heads, index_dim]."""
        before, after = (
            states[:, kv_head_index].transpose(0, 1)[None] for states in (unrotated, keys)
        )
        features = self.indexer.features(after, lambda _: before)
        return self.indexer.index_keys(features)[0].transpose(0, 1)

    def _index_queries(self, unrotated: Tensor, queries: Tensor, heads: Tensor) -> Tensor:
        """[retrieval heads, T, index_dim]."""
        before, after = (states[:, heads].transpose(0, 1)[None] for states in (unrotated, queries))
        return self.indexer.index_queries(self.indexer.features(after, lambda _: before))[0]


def serve_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    unrotated_queries: Tensor | None,
    unrotated_keys: Tensor | None,
    output: Tensor,
    name: str,
) -> None:
    """The operator: the layer of this name stores the tokens and writes `output`.

    Args:
        queries: [T, query heads * D], after RoPE.
        keys: [T, KV heads * D], after RoPE.
        values: the same shape.
        unrotated_queries: before RoPE, where the indexer reads those.
        unrotated_keys: likewise.
        output: as `queries`, written.
        name: of the layer, in vLLM's context.
    """
    layer = get_forward_context().no_compile_layers[name]
    queries, keys, values, output = (
        states.unflatten(-1, (-1, layer.head_dim)) for states in (queries, keys, values, output)
    )
    raw_queries, raw_keys = queries, keys
    if unrotated_queries is not None and unrotated_keys is not None:
        raw_queries = unrotated_queries.unflatten(-1, (-1, layer.head_dim))
        raw_keys = unrotated_keys.unflatten(-1, (-1, layer.head_dim))
    layer.attend(queries, keys, values, raw_queries, raw_keys, output)


def _nothing(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    unrotated_queries: Tensor | None,
    unrotated_keys: Tensor | None,
    output: Tensor,
    name: str,
) -> None:
    """What the operator tells a compiler: it returns nothing."""


# The operator lives as long as its library.
_library = Library("rtpurbo", "FRAGMENT")
direct_register_custom_op(
    "serve_attention",
    serve_attention,
    mutates_args=["output"],
    fake_impl=_nothing,
    target_lib=_library,
)
