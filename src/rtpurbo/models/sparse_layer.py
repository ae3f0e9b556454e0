"""Sparse layer that is attached to an attention module: heads, rule, indexer and observers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.cache_layers import HeadwiseLayer, NewStates
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.models.probe import AttentionTraits
from rtpurbo.models.rotation import Embeddings, invertible
from rtpurbo.ops import HeadLayout, KeyValueStates, SelectionStatistics, Selector
from rtpurbo.ops.api import attend_with, chosen_backend
from rtpurbo.ops.eager.heavy_hitters import attention_after_prompts, heavy_hitters
from rtpurbo.ops.eager.local import causal_attention
from rtpurbo.ops.packed import packed_attention
from rtpurbo.ops.states import AttentionCall

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of a layer's first tokens: [batch, num_key_value_heads, tokens, head_dim] each."""


def sparse_layer_of(module: nn.Module) -> SparseAttention | None:
    """Returns the sparse layer that is attached to an attention module; None if there is none."""
    return vars(module).get("_rtpurbo")


def note_rotation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of attention modules that keeps the rotary embedding, for features before RoPE."""
    layer = sparse_layer_of(module)
    assert layer is not None
    layer.embeddings = kwargs.get("position_embeddings")


@dataclass
class LayerObservation:
    """States of one forward, as shown to an observer of a layer.

    Attributes:
        layer: the layer's number.
        queries: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        keys: [batch, num_key_value_heads, q_len, head_dim], after RoPE.
        positions: int64 [batch, q_len], -1 for padding.
        scaling: factor on the dot products.
        undo_rotation: function of queries or keys that returns them before RoPE, after QK-norm.
        sinks: learned sinks [num_attention_heads]; None if the model has none.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    positions: Tensor
    scaling: float
    undo_rotation: Callable[[Tensor], Tensor]
    sinks: Tensor | None = None


class SparseAttention(AttentionTraits):
    """Sparse attention of one layer, attached to the attention module, which is not changed.

    Only the indexer becomes a submodule of the attention module, so that it is part of the model's
    state dict.

    Args:
        traits: properties of the layer's attention.
        layer: the layer's number.
        config: head map, rule and indexer settings of the whole model.

    Attributes, beside those of `AttentionTraits`:
        layer_idx: the layer's number.
        rule: windows and selection.
        dense: run dense attention.
        document_lengths: tokens of packed documents; only where `dense`.
        num_decode_queries: number of last queries of a forward that select as decode steps do.
        backend: backend of `rtpurbo.ops`.
        used_backend: backend of the last call.
        statistics: counts the selected keys.
        selector: selects far keys instead of the rule.
        observer: called with the states of each forward.
        gates: mix full and windowed attention, [num_key_value_heads] or [num_attention_heads].
        answer_spans: first query and end of each answer, in which the gates act; None for all queries.
        prompt: keys and values of the tokens before those of a forward with gates, in a model without learned sinks;
            None if the forward has all tokens.
        kept_prompt: number of first tokens whose keys and values dense forwards keep, and by layer where.
        embeddings: rotary embedding of the current forward.
        hook: handle of `note_rotation`.
    """

    hook: RemovableHandle

    def __init__(self, traits: AttentionTraits, layer: int, config: RTPurboConfig) -> None:
        super().__init__(**vars(traits))
        self.layer_idx = layer
        self.retrieval_heads = list(config.head_map.retrieval_heads[layer] or ())
        self.rule = config.attention.for_layer(layer)
        self.dense = False
        self.document_lengths: tuple[int, ...] | None = None
        self.num_decode_queries = 0
        self.backend = "auto"
        self.used_backend: str | None = None
        self.statistics: SelectionStatistics | None = None
        self.selector: Selector | None = None
        self.observer: Callable[[LayerObservation], None] | None = None
        self.gates: Tensor | None = None
        self.answer_spans: Sequence[tuple[int, int]] | None = None
        self.prompt: KeysAndValues | None = None
        self.kept_prompt: tuple[int, dict[int, KeysAndValues]] | None = None
        self.embeddings: Embeddings | None = None
        self._layouts: dict[torch.device, HeadLayout] = {}

    @property
    def indexer(self) -> TokenIndexer:
        """Token indexer of a layer with retrieval heads."""
        indexer: TokenIndexer = self.module.get_submodule("indexer")  # type: ignore[assignment]
        return indexer

    @property
    def device(self) -> torch.device:
        """Device of the attention module."""
        return next(self.module.parameters()).device

    def layout(self, device: torch.device) -> HeadLayout:
        """Returns the layer's heads as index tensors on a device."""
        if device not in self._layouts:
            self._layouts[device] = HeadLayout.build(
                self.retrieval_heads, self.num_attention_heads, self.num_key_value_heads, device
            )
        return self._layouts[device]

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | NewStates,
        values: Tensor | NewStates,
        mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one forward; arguments as in `sparse_attention`.

        Returns:
            [batch, num_attention_heads, q_len, value_dim].
        """
        embeddings, self.embeddings = self.embeddings, None
        if mask is not None and mask.ndim != 2 and self.document_lengths is None:
            raise RTPurboError(
                "sparse attention supports only causal attention over whole sequences: put each document into a "
                "row of its own instead of restarting position_ids, and pass no other mask."
            )
        past: HeadwiseLayer | None = None
        if isinstance(keys, NewStates):
            new = keys
            past, keys, values = new.layer, new.keys, new.values
            if self.dense:
                raise RTPurboError(
                    "a model that is being observed runs without a cache: pass use_cache=False."
                )
            past.check_rule(self.rule)
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        # Under autocast, RoPE in float32 leaves queries and keys in another dtype than values.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        positions = self._query_positions(queries, mask, past)
        key_positions = positions
        if self.prompt is not None:
            num_before, num_new = self.prompt[0].shape[2], queries.shape[2]
            keys, values = (
                torch.cat(both, 2) for both in zip(self.prompt, (keys, values), strict=True)
            )
            key_positions = torch.arange(num_before + num_new, device=queries.device)[None]
            positions = key_positions[:, num_before:]
        undo_rotation = partial(self._undo_rotation, embeddings=embeddings)
        if self.observer is not None:
            self.observer(
                LayerObservation(
                    self.layer_idx, queries, keys, positions, self.scaling, undo_rotation, sinks
                )
            )
        if past is None:
            states = KeyValueStates(
                keys, values, key_positions, in_order=mask is None or mask.ndim != 2
            )
            if self.dense:
                if self.kept_prompt is not None:
                    length, kept = self.kept_prompt
                    kept[self.layer_idx] = keys[:, :, :length], values[:, :, :length]
                return self._attend_densely(queries, positions, states, sinks)
            if self.gates is not None:
                return self._attend_gated(queries, positions, states, self.gates, sinks)
        index_queries, index_keys = self.index(queries, keys, undo_rotation, past is not None)
        if past is not None:
            full, windowed = past.append(keys, values, index_keys, self.layout(keys.device))
        else:
            full, windowed = self._divided(states, index_keys)
        dense_queries = self._dense_queries(queries.shape[2], past)
        rule = self.rule
        if dense_queries is not None and dense_queries.start == 0 and rule.prefill_mode == "dense":
            end = dense_queries.stop
            prompt = replace(windowed, keys=keys, values=values).tokens(slice(0, end))
            output = self._attend_densely(queries[:, :, :end], positions[:, :end], prompt, sinks)
            if end < queries.shape[2]:
                # FlexAttention needs a query for each key.
                sparse = self.attend(positions, queries, index_queries, full, windowed, sinks)
                output = torch.cat([output, sparse[:, :, end:]], 2)
        else:
            output = self.attend(
                positions, queries, index_queries, full, windowed, sinks, dense_queries
            )
        if dense_queries is None or not rule.num_heavy_hitters:
            return output
        return self._with_heavy_hitters(
            output, positions, queries, windowed, past, sinks, dense_queries.stop
        )

    def _dense_queries(self, length: int, past: HeadwiseLayer | None) -> slice | None:
        """Returns the last queries of a prompt that are dense in local heads; None if there are none.

        Without a cache, the queries before those that select as decode steps do are a prompt.
        """
        is_prompt = self.num_decode_queries > 0 if past is None else past.seen == length
        end = length - self.num_decode_queries
        if not (self.rule.has_dense_queries and is_prompt and end > 0):
            return None
        if length <= self.rule.sliding_window:
            return None
        return slice(end - self.rule.num_dense_queries(end), end)

    def _with_heavy_hitters(
        self,
        output: Tensor,
        positions: Tensor,
        queries: Tensor,
        windowed: KeyValueStates,
        past: HeadwiseLayer | None,
        sinks: Tensor | None,
        end: int,
    ) -> Tensor:
        """Replaces sinks by heavy hitters after a prompt of `end` queries, for those that follow it.

        They follow in later forwards, over the cache, or in this one, without a cache.
        """
        rule, group = self.rule, self.layout(queries.device).local_windowed
        if not len(group):
            return output
        if past is not None:
            prompt = windowed.tokens(slice(0, end))
            slots = heavy_hitters(
                queries[:, group.heads, :end],
                positions[:, :end],
                prompt,
                rule,
                scaling=self.scaling,
            )
            past.ring.replace_sinks(rule.num_fixed_sinks, prompt, slots)
            return output
        answers = end, queries.shape[2]
        part = attention_after_prompts(
            queries, positions, windowed, group, [answers], rule, scaling=self.scaling, sinks=sinks
        )
        output = output.clone()
        output[:, group.heads, end:] = part.to(output.dtype)
        return output

    @staticmethod
    def _query_positions(
        queries: Tensor, mask: Tensor | None, past: HeadwiseLayer | None
    ) -> Tensor:
        if past is not None:
            assert past.slots.query_positions is not None
            return past.slots.query_positions.to(queries.device)
        if mask is not None and mask.ndim == 2:
            return mask.to(queries.device)
        batch, length = queries.shape[0], queries.shape[2]
        return torch.arange(length, device=queries.device).expand(batch, length)

    def _undo_rotation(self, states: Tensor, embeddings: Embeddings | None) -> Tensor:
        rotation = invertible(self.layer_idx, None if embeddings is None else self.rotation)
        assert embeddings is not None
        return rotation.undo(states, embeddings)

    def index(
        self,
        queries: Tensor,
        keys: Tensor,
        undo_rotation: Callable[[Tensor], Tensor],
        caching: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns index queries of the queries that select, and index keys; None where they are not needed."""
        selecting = self.rule.num_selecting_queries(queries.shape[2], self.num_decode_queries)
        if not self.retrieval_heads or not (selecting or caching):
            return None, None
        layout, indexer = self.layout(keys.device), self.indexer
        kv_heads = layout.full_key_value_heads
        if not indexer.settings.shared_keys:
            kv_heads = kv_heads[layout.retrieval.key_value_heads]
        with torch.no_grad():
            index_keys = indexer.index_keys(indexer.features(keys[:, kv_heads], undo_rotation))
            if self.rule.index_storage == "float8":
                # Larger values become NaN in this format.
                index_keys = index_keys.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
            if not selecting:
                return None, index_keys
            rows = queries[:, layout.retrieval.heads, -selecting:]
            return indexer.index_queries(indexer.features(rows, undo_rotation)), index_keys

    def attend(
        self,
        query_positions: Tensor,
        queries: Tensor,
        index_queries: Tensor | None,
        full: KeyValueStates,
        windowed: KeyValueStates,
        sinks: Tensor | None = None,
        dense_queries: slice | None = None,
    ) -> Tensor:
        """Computes the sparse attention of one forward, after new tokens were appended to the cache, if any."""
        call = AttentionCall(
            queries,
            query_positions,
            full,
            windowed,
            self.layout(queries.device),
            index_queries,
            self.rule,
            self.scaling,
            self.statistics,
            selector=self.selector,
            sinks=sinks,
            dense_queries=dense_queries,
        )
        self.used_backend = chosen_backend(self.backend, call)
        return attend_with(self.used_backend, call)[0]

    def _attend_densely(
        self, queries: Tensor, positions: Tensor, states: KeyValueStates, sinks: Tensor | None
    ) -> Tensor:
        if self.prompt is not None:
            # Without retrieval heads, these are the KV heads of all query heads.
            heads = self.layout(queries.device).local_windowed.key_value_heads
            return causal_attention(queries, positions, states, heads, scaling=self.scaling)[0]
        return packed_attention(
            queries,
            states.keys,
            states.values,
            self.document_lengths or (queries.shape[2],),
            scaling=self.scaling,
            positions=None if states.in_order else positions,
            first_slots=states.first_slots,
            sinks=sinks,
        )

    def _attend_gated(
        self,
        queries: Tensor,
        positions: Tensor,
        states: KeyValueStates,
        gates: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """Mixes full and windowed attention: gate * full + (1 - gate) * windowed.

        Of all queries, or of those of the answers, as when a dense prompt was read before each of them.
        """
        full = self._attend_densely(queries, positions, states, sinks)
        each = gates.repeat_interleave(self.num_attention_heads // gates.numel())
        each = each.to(full.dtype)[None, :, None, None]
        windowed_heads = self._divided(states, None)
        if self.answer_spans is None:
            windowed = self.attend(positions, queries, None, *windowed_heads, sinks)
            return windowed + each * (full - windowed)
        group = self.layout(queries.device).local_windowed
        windowed = attention_after_prompts(
            queries, positions, windowed_heads[1], group, self.answer_spans, self.rule,
            scaling=self.scaling, sinks=sinks,
        )  # fmt: skip
        parts, end = [], 0
        lengths = [stop - start for start, stop in self.answer_spans]
        for span, part in zip(self.answer_spans, windowed.split(lengths, 2), strict=True):
            parts.append(full[:, :, end : span[0]])
            parts.append(part + each * (full[:, :, slice(*span)] - part))
            end = span[1]
        return torch.cat([*parts, full[:, :, end:]], 2)

    def _divided(
        self, states: KeyValueStates, index_keys: Tensor | None
    ) -> tuple[KeyValueStates, KeyValueStates]:
        """Returns the states of full and of windowed KV heads."""
        layout = self.layout(states.keys.device)
        full, windowed = (
            replace(
                states,
                keys=states.keys[:, heads],
                values=states.values[:, heads],
                index_keys=index,
            )
            for heads, index in (
                (layout.full_key_value_heads, index_keys),
                (layout.windowed_key_value_heads, None),
            )
        )
        return full, windowed
