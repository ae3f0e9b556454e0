"""HeadwiseAttention: the one module that stands in for every family's self-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.entering import enter, enters_by_kernel
from rtpurbo.models.families import Family, window_covers_context
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.models.slots import positions_of
from rtpurbo.ops import (
    HeadLayout,
    KeyValueStates,
    SelectionStatistics,
    Selector,
    causal_attention,
    headwise_attention,
)
from rtpurbo.ops.api import chosen_backend
from rtpurbo.ops.packed import packed_attention

IMPLEMENTATION = "rtpurbo"

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def key_positions_as_mask(
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers hands to the layers as their attention mask: the position of every key.

    Positions are all a head-wise layer needs, and they cost k_len numbers where a mask costs
    q_len x k_len.

    Returns:
        int64 [batch, kv_length], -1 for padding; None without a mask; or the usual mask for a layer
        that keeps its own sliding window.
    """
    if local_size is not None and not window_covers_context(config, local_size):
        return sdpa_mask(
            kv_length=kv_length,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    return None if attention_mask is None else positions_of(attention_mask[:, :kv_length])


AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, key_positions_as_mask)


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of states [batch, heads, length, head_dim].

    Cosines and sines are [batch, length, rotary_dim].
    """
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    rotary_dim = cosines.shape[-1]
    turned, kept = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat([-second, first], -1) * sines
    return torch.cat([turned.to(states.dtype), kept], -1)


@dataclass
class LayerObservation:
    """What an observer of a layer is shown: the states of one forward.

    Attributes:
        layer: the layer's number.
        queries_before_rotation: [batch, num_attention_heads, q_len, head_dim], after QK-norm,
            before RoPE.
        queries: the same after RoPE.
        keys_before_rotation: [batch, num_key_value_heads, q_len, head_dim].
        keys: the same after RoPE.
        positions: int64 [batch, q_len], -1 for padding.
        scaling: factor on the dot products.
    """

    layer: int
    queries_before_rotation: Tensor
    queries: Tensor
    keys_before_rotation: Tensor
    keys: Tensor
    positions: Tensor
    scaling: float


class HeadwiseAttention(nn.Module):
    """Self-attention in which each query head sees what it needs.

    It takes over the projections and norms of the original module (the same objects under the same
    names, so state-dict keys do not change), computes pre-RoPE states itself, applies the model's
    own rotary embedding, fills the cache and calls `rtpurbo.ops`.

    Args:
        original: the family's own attention module.
        family: how it is built.
        config: head map, rule and indexer settings of the whole model.
        indexer: the layer's token indexer; None if no head of the layer retrieves.
    """

    # Which of them there are depends on the family.
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    indexer: TokenIndexer

    def __init__(
        self, original: Any, family: Family, config: RTPurboConfig, indexer: TokenIndexer | None
    ) -> None:
        super().__init__()
        for name, child in original.named_children():
            setattr(self, name, child)
        if indexer is not None:
            self.indexer = indexer
        # In a tuple, so that it does not become a submodule and add keys to the state dict.
        self._original = (original,)
        self.family = family
        self.layer_idx: int = original.layer_idx
        self.head_dim: int = original.head_dim
        self.scaling: float = original.scaling
        self.uses_rotary: bool = bool(getattr(original, "use_rope", True))
        self.num_attention_heads = config.head_map.num_attention_heads
        self.num_key_value_heads = config.head_map.num_key_value_heads
        self.retrieval_heads = list(config.head_map.retrieval_heads[self.layer_idx] or ())
        self.rule = config.attention
        self.dense = False
        self.document_lengths: tuple[int, ...] | None = None
        self.num_decode_rows = 0
        self.backend = "auto"
        self.used_backend: str | None = None
        self.statistics: SelectionStatistics | None = None
        self.selector: Selector | None = None
        self.observer: Callable[[LayerObservation], None] | None = None
        self.gates: Tensor | None = None
        self._layouts: dict[torch.device, HeadLayout] = {}

    @property
    def original(self) -> nn.Module:
        """The dense module this one stands in for."""
        return self._original[0]

    def layout(self, device: torch.device) -> HeadLayout:
        """The layer's heads as index tensors on a device."""
        if device not in self._layouts:
            self._layouts[device] = HeadLayout.build(
                self.retrieval_heads, self.num_attention_heads, self.num_key_value_heads, device
            )
        return self._layouts[device]

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, heads, length, head_dim], before `normed`."""
        if self.family.fused_projection:
            sizes = [self.num_attention_heads, self.num_key_value_heads, self.num_key_value_heads]
            fused = self.qkv_proj(hidden_states)
            query, key, value = fused.split([heads * self.head_dim for heads in sizes], -1)
        else:
            query, key, value = (
                self.q_proj(hidden_states),
                self.k_proj(hidden_states),
                self.v_proj(hidden_states),
            )
        if self.family.query_key_norm == "whole":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        return query, key, value

    def normed(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as `project` gives them, each head normed if the family does so."""
        if self.family.query_key_norm != "per_head":
            return queries, keys
        queries = self.q_norm(queries.transpose(1, 2)).transpose(1, 2)
        return queries, self.k_norm(keys.transpose(1, 2)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the original's, whichever name its cache goes by.

        Without a cache, `attention_mask` holds key positions (`key_positions_as_mask`); a cache
        knows them itself.
        """
        batch, q_len, _ = hidden_states.shape
        past = self._cache_layer(past_key_values if cache is None else cache)
        if past is not None:
            assert past.slots.query_positions is not None
            query_positions = past.slots.query_positions.to(hidden_states.device)
        elif attention_mask is not None:
            query_positions = attention_mask
        else:
            query_positions = torch.arange(q_len, device=hidden_states.device).expand(batch, q_len)

        queries, keys, values = self.project(hidden_states)
        if past is not None and enters_by_kernel(self, queries, past):
            entered = enter(self, queries, keys, values, position_embeddings, past)
            output = self._attend(query_positions, *entered)
        else:
            raw_queries, raw_keys = queries, keys = self.normed(queries, keys)
            if self.uses_rotary:
                assert position_embeddings is not None
                queries, keys = (
                    rotate(states, *position_embeddings) for states in (raw_queries, raw_keys)
                )
            if self.observer is not None:
                self.observer(
                    LayerObservation(
                        self.layer_idx,
                        raw_queries,
                        queries,
                        raw_keys,
                        keys,
                        query_positions,
                        self.scaling,
                    )
                )
            if past is None:
                in_order = attention_mask is None
                states = KeyValueStates(keys, values, query_positions, in_order=in_order)
            if self.gates is not None and not self.dense:
                output = self._attend_gated(queries, query_positions, states, self.gates)
            elif self.dense:
                output = self._attend_densely(queries, query_positions, states)
            else:
                index_queries, index_keys = self._index(
                    raw_queries, queries, raw_keys, keys, past is not None
                )
                layout = self.layout(keys.device)
                if past is not None:
                    full, bounded = past.append(keys, values, index_keys, layout)
                else:
                    full, bounded = self._divided(states, index_keys)
                output = self._attend(query_positions, queries, index_queries, full, bounded)
        return self.o_proj(output.transpose(1, 2).reshape(batch, q_len, -1)), None

    def _attend_densely(
        self, queries: Tensor, query_positions: Tensor, states: KeyValueStates
    ) -> Tensor:
        if states.in_order:
            lengths = self.document_lengths or (queries.shape[2],)
            return packed_attention(
                queries, states.keys, states.values, lengths, scaling=self.scaling
            )
        readers = torch.arange(self.num_attention_heads, device=queries.device)
        readers = readers // (self.num_attention_heads // self.num_key_value_heads)
        output, _ = causal_attention(
            queries, query_positions, states, readers, scaling=self.scaling
        )
        return output

    def _attend_gated(
        self, queries: Tensor, query_positions: Tensor, states: KeyValueStates, gates: Tensor
    ) -> Tensor:
        """Full attention times the gate of a head plus windowed attention times what is left.

        Args:
            queries: [batch, num_attention_heads, q_len, head_dim].
            query_positions: int64 [batch, q_len].
            states: keys and values of all KV heads.
            gates: [num_key_value_heads] or [num_attention_heads], from 0 to 1.
        """
        full = self._attend_densely(queries, query_positions, states)
        windowed = self._attend(query_positions, queries, None, *self._divided(states, None))
        each = gates.repeat_interleave(self.num_attention_heads // gates.numel())
        return windowed + each.to(full.dtype)[None, :, None, None] * (full - windowed)

    def _attend(
        self,
        query_positions: Tensor,
        queries: Tensor,
        index_queries: Tensor | None,
        full: KeyValueStates,
        bounded: KeyValueStates,
    ) -> Tensor:
        self.used_backend = chosen_backend(
            self.backend,
            queries,
            full,
            bounded,
            index_queries,
            self.rule,
            self.statistics,
            self.selector,
        )
        output, _ = headwise_attention(
            queries,
            query_positions,
            full,
            bounded,
            self.layout(queries.device),
            index_queries,
            self.rule,
            scaling=self.scaling,
            statistics=self.statistics,
            selector=self.selector,
            backend=self.used_backend,
        )
        return output

    def _divided(
        self, states: KeyValueStates, index_keys: Tensor | None
    ) -> tuple[KeyValueStates, KeyValueStates]:
        """States of full KV heads and of bounded ones."""
        layout = self.layout(states.keys.device)
        full, bounded = (
            replace(
                states,
                keys=states.keys[:, heads],
                values=states.values[:, heads],
                index_keys=index,
            )
            for heads, index in (
                (layout.full_key_value_heads, index_keys),
                (layout.bounded_key_value_heads, None),
            )
        )
        return full, bounded

    def _index(
        self,
        raw_queries: Tensor,
        queries: Tensor,
        raw_keys: Tensor,
        keys: Tensor,
        caching: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Index queries of the rows that select and index keys, where something will read them."""
        selecting = self.rule.num_selecting_rows(queries.shape[2], self.num_decode_rows)
        if not self.retrieval_heads or not (selecting or caching):
            return None, None
        layout = self.layout(keys.device)
        heads, readers = layout.retrieval.heads, layout.full_key_value_heads
        if not self.indexer.settings.shared_keys:
            readers = readers[layout.retrieval.key_value_heads]
        with torch.no_grad():
            index_keys = self.indexer.index_keys(
                self.indexer.features(raw_keys[:, readers], keys[:, readers])
            )
            if self.rule.index_storage == "float8":
                # Beyond the largest number of the format lies NaN.
                index_keys = index_keys.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
            if not selecting:
                return None, index_keys
            features = self.indexer.features(
                raw_queries[:, heads, -selecting:], queries[:, heads, -selecting:]
            )
            return self.indexer.index_queries(features), index_keys

    def _cache_layer(self, past_key_values: Any) -> HeadwiseLayer | None:
        if past_key_values is None:
            return None
        if self.dense:
            raise RTPurboError(
                "a model that is being observed runs without a cache: pass use_cache=False."
            )
        if not isinstance(past_key_values, HeadwiseCache):
            raise RTPurboError(
                f"a sparse model needs a HeadwiseCache, not a {type(past_key_values).__name__}: "
                "pass rtpurbo.HeadwiseCache(model), or none."
            )
        past = past_key_values.layers[self.layer_idx]
        past.check_rule(self.rule)
        return past
