"""Attention of sparse models on vLLM: one module that replaces those of all model families.

T tokens of all requests in a step, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import AttentionSpec

from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.ops import HeadLayout
from rtpurbo.serving.vllm import cuda, eager
from rtpurbo.serving.vllm.caches import Caches, PagedCache
from rtpurbo.serving.vllm.heavy_hitters import choose_heavy_hitters
from rtpurbo.serving.vllm.pages import Batch, LayerCache
from rtpurbo.serving.vllm.rank_heads import LayerHeads
from rtpurbo.serving.vllm.specs import SinkWindowSpec
from rtpurbo.serving.vllm.versions import cache_scales, has_unit_offset, rotary_table
from rtpurbo.serving.vllm.warm_up import WarmUpStep, warm_up_steps

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

    # Only some families have norms or learned sinks, and only some layers an indexer.
    attn: nn.Module
    qkv_proj: nn.Module
    o_proj: nn.Module
    rotary_emb: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    indexer: TokenIndexer
    sinks: nn.Parameter

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
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if indexer is not None:
            self.indexer = indexer
        self.name = original.attn.layer_name.removesuffix(".attn")
        self.layer = layer
        self.head_dim: int = original.head_dim
        self.hidden_size: int = original.qkv_proj.input_size
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
        self.uses_kernels = current_platform.is_cuda()
        self.fuses_append = self.uses_kernels and table is not None
        self.heads = heads
        self.full = caches.full if heads.num_full else None
        self.windowed = caches.windowed[layer] if heads.num_windowed else None
        # Blocks of requests for heavy hitters, and the layer's columns in their block table.
        self.own_blocks = caches.own_blocks
        self.own_columns = caches.own_columns.get(layer, slice(0))
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
        queries, keys, values, *unrotated = self.project(positions, hidden_states)
        output = queries.new_empty(queries.shape)
        torch.ops.rtpurbo.serve_attention(
            queries, keys, values, positions, *unrotated, output, self.name
        )
        attended, _ = self.o_proj(output)
        return attended

    def project(
        self, positions: Tensor, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries, keys, values, and queries and keys before RoPE if the indexer reads those, [T, heads * D].

        Queries and keys are as projected if the layer fuses the append, else after norm and RoPE.
        """
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
        return queries, keys, values, *unrotated

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        unrotated_queries: Tensor | None,
        unrotated_keys: Tensor | None,
        full: LayerCache | None,
        windowed: LayerCache | None,
        output: Tensor,
    ) -> None:
        """Appends the tokens of a step to the caches and writes `output`.

        Args:
            queries: [T, query heads * D], as `project` returns them.
            keys: [T, KV heads * D].
            values: same shape.
            positions: int64 [T], position of each token.
            unrotated_queries: queries before RoPE, if the indexer reads those.
            unrotated_keys: keys before RoPE, if the indexer reads those.
            full: pages of the full KV heads with the step's batch; None if the layer has none.
            windowed: same for the windowed KV heads.
            output: shape of the queries, written.
        """
        queries, keys, values, output = (
            states.unflatten(-1, (-1, self.head_dim)) for states in (queries, keys, values, output)
        )
        raw_queries, raw_keys = queries, keys
        if unrotated_queries is not None and unrotated_keys is not None:
            raw_queries = unrotated_queries.unflatten(-1, (-1, self.head_dim))
            raw_keys = unrotated_keys.unflatten(-1, (-1, self.head_dim))
        layout = self.layout(queries.device)
        cache = full or windowed
        assert cache is not None
        # Batches are padded; in graphs there are more tokens than slots.
        count = min(queries.shape[0], cache.batch.slots.shape[0])
        if cache.batch.uniform:
            count = min(count, cache.batch.device_lengths.shape[0])
        queries, keys, values, positions, raw_queries, raw_keys = (
            states[:count] for states in (queries, keys, values, positions, raw_queries, raw_keys)
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
                queries, keys, values, raw_queries, raw_keys, full, windowed, layout
            )
        attend = cuda.attend if self.uses_kernels else eager.attend
        # Scales of stored keys and values are factors on the dot products and on the output.
        scaling, value_scale = self.scaling * cache.pages.key_scale, cache.pages.value_scale
        sinks = getattr(self, "sinks", None)
        if windowed is not None and windowed.own_blocks is not None and not cache.batch.uniform:
            choose_heavy_hitters(queries, windowed, layout, self.rule, scaling)
        attend(queries, index_queries, full, windowed, layout, self.rule, scaling, output, sinks)
        if value_scale != 1:
            output.mul_(value_scale)

    def bind(self) -> None:
        """Adds the scales of the checkpoint to the pages of the layer, once the caches have been allocated."""
        key_scale, value_scale = cache_scales(self.attn)
        for cache in (self.full, self.windowed):
            if cache is not None and cache.pages[self.layer].keys.dtype == torch.float8_e4m3fn:
                cache.pages[self.layer] = replace(
                    cache.pages[self.layer], key_scale=key_scale, value_scale=value_scale
                )

    @torch.inference_mode()
    def warm_up(self, vllm_config: VllmConfig) -> None:
        """Launches every kernel that the layer may need, before the first request.

        Args:
            vllm_config: configuration of the engine.
        """
        for step in self._warm_up_steps(vllm_config):
            self._run(step, vllm_config.model_config)

    def _run(self, step: WarmUpStep, model: ModelConfig) -> None:
        """Computes a step of zeros with the caches of the layer, of which it changes nothing."""
        longest = model.max_model_len
        device, count = next(self.parameters()).device, len(step.requests)
        hidden_states = torch.zeros(count, self.hidden_size, dtype=model.dtype, device=device)
        positions = torch.zeros(count, dtype=torch.int64, device=device)
        projected = self.project(positions, hidden_states)
        queries, keys, values, unrotated_queries, unrotated_keys = projected
        full, windowed = self.layer_caches(
            lambda cache: step.batch(cache.table_width(longest), device)
        )
        if full is not None and not step.has_workspace:
            full = replace(full, histograms=None)
        output = queries.new_empty(queries.shape)
        self.attend(
            queries,
            keys,
            values,
            positions,
            unrotated_queries,
            unrotated_keys,
            full,
            windowed,
            output,
        )

    def _warm_up_steps(self, vllm_config: VllmConfig) -> Iterator[WarmUpStep]:
        scheduler = vllm_config.scheduler_config
        largest = scheduler.max_num_batched_tokens
        if self.rule.prefill_mode == "dense":
            drafts = 1 + vllm_config.num_speculative_tokens
            largest = min(largest, scheduler.max_num_seqs * drafts)
        cache = self.full or self.windowed
        assert cache is not None
        support = (
            cache.get_attn_backend()
            .get_builder_cls()
            .get_cudagraph_support(vllm_config, cache.spec)
        )
        rows = 0 if self.histograms is None else len(self.histograms)
        return warm_up_steps(
            self.rule,
            vllm_config.model_config.max_model_len,
            uniform=support != AttentionCGSupport.NEVER,
            exceeds_workspace=largest * len(self.heads.retrieval) > rows,
        )

    def layer_caches(
        self, batch_of: Callable[[PagedCache], Batch]
    ) -> tuple[LayerCache | None, LayerCache | None]:
        """Pages of the full and of the windowed KV heads, each with the batch of its cache."""
        full, windowed = (
            None
            if cache is None
            else LayerCache(cache.pages[self.layer], batch_of(cache), self.histograms)
            for cache in (self.full, self.windowed)
        )
        if windowed is not None and self.own_blocks is not None and self.rule.num_heavy_hitters:
            assert self.windowed is not None
            windowed = replace(
                windowed,
                own_blocks=batch_of(self.own_blocks).block_table[:, self.own_columns],
                is_first=self.layer == min(self.windowed.parts),
            )
        return full, windowed

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
        shared = self.indexer.settings.shared_keys
        indexed = kept if shared else kept[retrieval.key_value_heads]
        index_keys = self._projected(self.indexer.index_keys, unrotated_keys, keys, indexed)
        full.pages.write(full.batch.slots[: len(keys)], keys[:, kept], values[:, kept], index_keys)
        index_queries = self._projected(
            self.indexer.index_queries, unrotated_queries, queries, retrieval.heads
        )
        if full.batch.uniform and self.rule.prefill_mode == "dense":
            assert full.batch.device_prompt_lengths is not None
            selects = full.batch.device_lengths > full.batch.device_prompt_lengths
            index_queries = index_queries * selects[: len(queries), None, None]
        # Kernels are compiled for the strides of contiguous index queries.
        return index_queries.clone(memory_format=torch.contiguous_format)

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
        dense_prompt_tokens=0,
        dense_prompt_queries=0,
        num_heavy_hitters=0,
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
    context = get_forward_context()
    metadata = context.attn_metadata
    if metadata is None:
        output.zero_()  # memory profiling of vLLM, before it allocates the cache
        return
    layer = context.no_compile_layers[name]
    full, windowed = layer.layer_caches(lambda cache: metadata[cache.name])
    layer.attend(
        queries, keys, values, positions, unrotated_queries, unrotated_keys, full, windowed, output
    )


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
