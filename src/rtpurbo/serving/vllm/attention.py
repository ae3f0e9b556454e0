"""Attention of sparse models on vLLM: one module that replaces those of all model families.

T tokens of all requests in a step, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.kv_cache_interface import AttentionSpec

from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.ops import HeadLayout
from rtpurbo.serving.vllm import cuda, eager
from rtpurbo.serving.vllm.caches import Caches, PagedCache
from rtpurbo.serving.vllm.layout import LayerHeads
from rtpurbo.serving.vllm.pages import LayerCache
from rtpurbo.serving.vllm.specs import SinkWindowSpec
from rtpurbo.serving.vllm.versions import cache_scales, has_unit_offset, rotary_table

OPERATOR = "rtpurbo::serve_attention"
"""Custom operator of a layer, opaque to compilers: vLLM splits the graphs of the model there."""


class ServedAttention(nn.Module):
    """Head-wise attention with the projections of the original attention module.

    Args:
        original: attention module of the model family; its submodules are kept under their names. vLLM's attention
            layer among them computes nothing, but loads the scales of a float8 cache.
        heads: heads of this layer on this rank.
        config: attention rule and indexer settings.
        indexer: indexer of the rank's retrieval heads; None if the layer has none on any rank.
        layer: index of the layer.
        caches: caches of the model.
    """

    # Only some families have norms, and only some layers an indexer.
    attn: nn.Module
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
            setattr(self, name, child)
        if indexer is not None:
            self.indexer = indexer
        self.name = original.attn.layer_name.removesuffix(".attn")
        self.layer = layer
        self.head_dim: int = original.head_dim
        self.scaling: float = original.scaling
        self.sizes = [original.q_size, original.kv_size, original.kv_size]
        self.rule = config.attention.for_layer(layer)
        if config.head_map.retrieval_heads[layer] is None:
            self.rule = _own_rule(self.rule, caches.windowed[layer].spec)
        self.norms: tuple[Any, Any, bool] | None = None
        if hasattr(self, "q_norm"):
            self.norms = self.q_norm, self.k_norm, has_unit_offset(self.q_norm)
        self.before_rotation = config.indexer.index_space == "pre_rope" and indexer is not None
        table = rotary_table(self.rotary_emb, self.head_dim)
        self.fuses_append = current_platform.is_cuda() and table is not None
        self.heads = heads
        self.full = caches.full if heads.num_full else None
        self.windowed = caches.windowed[layer] if heads.num_windowed else None
        self.histograms = caches.histograms
        self._layouts: dict[torch.device, HeadLayout] = {}

    def layout(self, device: torch.device) -> HeadLayout:
        """Head layout of the layer on this rank, on a device."""
        if device not in self._layouts:
            self._layouts[device] = HeadLayout.build(
                self.heads.retrieval,
                self.heads.num_attention_heads,
                self.heads.num_key_value_heads,
                device,
            )
        return self._layouts[device]

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attention block: [T, hidden_size] to [T, hidden_size]."""
        projected, _ = self.qkv_proj(hidden_states)
        queries, keys, values = projected.split(self.sizes, -1)
        unrotated: tuple[Tensor | None, Tensor | None] = (None, None)
        if not self.fuses_append:
            if hasattr(self, "q_norm"):
                queries, keys = (
                    norm(states.unflatten(-1, (-1, self.head_dim))).flatten(-2)
                    for norm, states in ((self.q_norm, queries), (self.k_norm, keys))
                )
            if self.before_rotation:
                # The rotary embedding may work in place.
                unrotated = queries.clone(), keys.clone()
            queries, keys = self.rotary_emb(positions, queries, keys)
        output = queries.new_empty(queries.shape)
        torch.ops.rtpurbo.serve_attention(
            queries, keys, values, positions, *unrotated, output, self.name
        )
        attended, _ = self.o_proj(output)
        return attended

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        unrotated_queries: Tensor,
        unrotated_keys: Tensor,
        output: Tensor,
    ) -> None:
        """Appends the tokens of a step to the caches and writes `output`; all states are [T, heads, D]."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            output.zero_()  # memory profiling of vLLM, before it allocates the cache
            return
        layout = self.layout(queries.device)
        full, windowed = self._cache(self.full, metadata), self._cache(self.windowed, metadata)
        cache = full or windowed
        assert cache is not None
        # Batches are padded; in graphs there are more tokens than slots.
        count = min(queries.shape[0], cache.batch.slots.shape[0])
        if cache.batch.uniform:
            count = min(count, cache.batch.device_lengths.shape[0])
        queries, keys, values, positions, unrotated_queries, unrotated_keys = (
            states[:count]
            for states in (queries, keys, values, positions, unrotated_queries, unrotated_keys)
        )
        if self.fuses_append:
            table = rotary_table(self.rotary_emb, self.head_dim)
            assert table is not None
            queries, index_queries = cuda.append(
                queries,
                keys,
                values,
                (table, positions),
                self.norms,
                getattr(self, "indexer", None),
                full,
                windowed,
                layout,
                self.rule,
            )
        else:
            index_queries = self._append(
                queries, keys, values, unrotated_queries, unrotated_keys, full, windowed, layout
            )
        attend = cuda.attend if queries.is_cuda else eager.attend
        # Scales of stored keys and values are factors on the dot products and on the output.
        scaling, value_scale = self.scaling * cache.pages.key_scale, cache.pages.value_scale
        attend(queries, index_queries, full, windowed, layout, self.rule, scaling, output)
        if value_scale != 1:
            output.mul_(value_scale)

    def _append(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        unrotated_queries: Tensor,
        unrotated_keys: Tensor,
        full: LayerCache | None,
        windowed: LayerCache | None,
        layout: HeadLayout,
    ) -> Tensor | None:
        """Appends tokens after norm and RoPE, and returns the index queries [T, retrieval heads, index_dim]."""
        if windowed is not None:
            kept = layout.windowed_key_value_heads
            windowed.pages.write(windowed.batch.slots[: len(keys)], keys[:, kept], values[:, kept])
        if full is None:
            return None
        kept, retrieval = layout.full_key_value_heads, layout.retrieval
        index_keys = self._projected(
            self.indexer.index_keys, unrotated_keys, keys, kept[retrieval.key_value_heads]
        )
        full.pages.write(full.batch.slots[: len(keys)], keys[:, kept], values[:, kept], index_keys)
        index_queries = self._projected(
            self.indexer.index_queries, unrotated_queries, queries, retrieval.heads
        )
        if full.batch.uniform and self.rule.prefill_mode == "dense":
            assert full.batch.device_prompt_lengths is not None
            selects = full.batch.device_lengths > full.batch.device_prompt_lengths
            index_queries = index_queries * selects[: len(queries), None, None]
        return index_queries

    def _cache(self, cache: PagedCache | None, metadata: Any) -> LayerCache | None:
        if cache is None:
            return None
        pages = cache.pages[self.layer]
        if pages.keys.dtype == torch.float8_e4m3fn:
            key_scale, value_scale = cache_scales(self.attn)
            pages = replace(pages, key_scale=key_scale, value_scale=value_scale)
        return LayerCache(pages, metadata[cache.name], self.histograms)

    def _projected(
        self, project: Callable[[Tensor], Tensor], unrotated: Tensor, states: Tensor, heads: Tensor
    ) -> Tensor:
        """Index states [T, heads, index_dim] of some heads."""
        before, after = (part[:, heads].transpose(0, 1)[None] for part in (unrotated, states))
        features = self.indexer.features(after, lambda _: before)
        return project(features)[0].transpose(0, 1)


def _own_rule(rule: AttentionRule, spec: AttentionSpec) -> AttentionRule:
    """Rule of a layer that is not converted and keeps its sliding window."""
    assert isinstance(spec, SinkWindowSpec)
    window = spec.sliding_window
    return replace(
        rule,
        sliding_window=window,
        num_sink_tokens=spec.num_sink_tokens,
        retrieval_window=None,
        dense_prompt_queries=0,
        block_size=min(rule.block_size, window),
    )


def serve_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    unrotated_queries: Tensor | None,
    unrotated_keys: Tensor | None,
    output: Tensor,
    name: str,
) -> None:
    """Custom operator: the layer `name` appends the tokens to its caches and writes `output`.

    Args:
        queries: [T, query heads * D], after RoPE; as projected if the layer fuses the append.
        keys: [T, KV heads * D], as the queries.
        values: same shape.
        positions: int64 [T], position of each token.
        unrotated_queries: queries before RoPE, if the indexer reads those.
        unrotated_keys: keys before RoPE, if the indexer reads those.
        output: shape of the queries, written.
        name: name of the layer in vLLM's forward context.
    """
    layer = get_forward_context().no_compile_layers[name]
    queries, keys, values, output = (
        states.unflatten(-1, (-1, layer.head_dim)) for states in (queries, keys, values, output)
    )
    raw_queries, raw_keys = queries, keys
    if unrotated_queries is not None and unrotated_keys is not None:
        raw_queries = unrotated_queries.unflatten(-1, (-1, layer.head_dim))
        raw_keys = unrotated_keys.unflatten(-1, (-1, layer.head_dim))
    layer.attend(queries, keys, values, positions, raw_queries, raw_keys, output)


def _serve_attention_fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    unrotated_queries: Tensor | None,
    unrotated_keys: Tensor | None,
    output: Tensor,
    name: str,
) -> None:
    """Fake implementation for compilers: the operator only writes its output."""


# The operator is unregistered when its library is freed.
_library = Library("rtpurbo", "FRAGMENT")
direct_register_custom_op(
    "serve_attention",
    serve_attention,
    mutates_args=["output"],
    fake_impl=_serve_attention_fake,
    target_lib=_library,
)
