"""Caches of a sparse model on vLLM: one per group of the plan instead of one per layer.

vLLM queries the spec of every cache and allocates a tensor of blocks for it. This module defines the layout of a
block: for each layer of the group keys, values and, in the full group, index keys, each part contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from rtpurbo.config import RTPurboConfig
from rtpurbo.ops.eager.heavy_hitters import OBSERVED_QUERIES
from rtpurbo.serving.vllm.checkpoint import own_window
from rtpurbo.serving.vllm.cuda import new_histograms
from rtpurbo.serving.vllm.layout import CachePlan, Group, plan_cache
from rtpurbo.serving.vllm.metadata import HeadwiseBackend
from rtpurbo.serving.vllm.pages import Part, divide
from rtpurbo.serving.vllm.rank_heads import FLOAT8_CACHE_DTYPES, LayerHeads, TokenBytes
from rtpurbo.serving.vllm.specs import OwnBlocksSpec, SinkWindowSpec
from rtpurbo.serving.vllm.versions import block_table_width


class PagedCache(AttentionLayerBase):
    """Blocks of one group.

    Args:
        name: name of the cache in vLLM; contains one number, as vLLM requires.
        spec: vLLM's description of what the cache stores.
        parts: keys, values and, in the full group, index keys of each layer of the group on this rank.

    Attributes:
        when_bound: called when vLLM has allocated the blocks; may be called again, with other blocks.
    """

    def __init__(
        self, name: str, spec: AttentionSpec, parts: Mapping[int, tuple[Part, ...]]
    ) -> None:
        self.name = name
        self.spec = spec
        self.parts = dict(parts)
        self.when_bound: Callable[[], None] | None = None
        self.kv_cache = torch.empty(0)

    @property
    def kv_cache(self) -> Tensor:
        """Blocks allocated by vLLM, which frees them by assigning an empty tensor."""
        return self._blocks

    @kv_cache.setter
    def kv_cache(self, blocks: Tensor) -> None:
        self._blocks = blocks
        self.pages = divide(blocks, self.parts) if blocks.numel() else {}
        if self.pages and self.when_bound is not None:
            self.when_bound()

    def table_width(self, max_model_len: int) -> int:
        """Blocks of a request in the block table of vLLM's model runners."""
        width = block_table_width(self.spec.block_size, max_model_len)
        return max(width, self.spec.num_blocks) if isinstance(self.spec, OwnBlocksSpec) else width

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Backend that builds the metadata of a step."""
        return HeadwiseBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """Spec of the cache."""
        return self.spec


@dataclass(frozen=True)
class Caches:
    """All caches of a model.

    Attributes:
        plan: layout of the caches.
        full: cache of the full KV heads; None without retrieval heads.
        windowed: cache of each layer that has windowed KV heads on some rank.
        own_blocks: cache with the blocks of requests for their heavy hitters, of which the block table matters only:
            windowed caches read and write them; None without heavy hitters.
        own_columns: of each windowed layer, its columns in the block table of `own_blocks`.
        histograms: histogram workspace of the decode kernels; None without a GPU or without retrieval heads.
    """

    plan: CachePlan
    full: PagedCache | None
    windowed: Mapping[int, PagedCache]
    own_blocks: PagedCache | None
    own_columns: Mapping[int, slice]
    histograms: Tensor | None

    def when_all_bound(self, callback: Callable[[], None]) -> None:
        """Calls back whenever vLLM has allocated the blocks of all caches."""
        caches = {self.full, *self.windowed.values()} - {None}

        def bound() -> None:
            if all(cache is None or cache.pages for cache in caches):
                callback()

        for cache in caches:
            if cache is not None:
                cache.when_bound = bound


def plan_of(config: RTPurboConfig, vllm_config: VllmConfig) -> tuple[CachePlan, TokenBytes]:
    """Plans the caches of a model on an engine.

    Args:
        config: head map, attention rule and indexer settings.
        vllm_config: configuration of the engine.

    Returns:
        The plan, and the bytes of a token of a head.
    """
    model = vllm_config.model_config
    assert isinstance(model.dtype, torch.dtype)
    token_bytes = TokenBytes.of(
        config,
        model.get_head_size(),
        model.dtype.itemsize,
        vllm_config.cache_config.cache_dtype,
    )
    plan = plan_cache(
        config,
        token_bytes,
        tokens=model.max_model_len,
        in_flight=vllm_config.max_in_flight_tokens,
        world_size=vllm_config.parallel_config.tensor_parallel_size,
        lone_block_size=vllm_config.cache_config.block_size,
        own_window=own_window(model.hf_config),
    )
    return plan, token_bytes


def make_caches(
    config: RTPurboConfig,
    heads: list[LayerHeads],
    head_dim: int,
    prefix: str,
    vllm_config: VllmConfig,
) -> Caches:
    """Plans the caches of a model and registers them with vLLM.

    Args:
        config: head map, attention rule and indexer settings.
        heads: heads of each layer on this rank.
        head_dim: dimensions of a head.
        prefix: prefix of the names of the caches.
        vllm_config: configuration of the engine.
    """
    plan, _ = plan_of(config, vllm_config)
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    in_float8 = vllm_config.cache_config.cache_dtype in FLOAT8_CACHE_DTYPES
    cache_dtype = torch.float8_e4m3fn if in_float8 else dtype
    longest = vllm_config.model_config.max_model_len
    in_flight = vllm_config.max_in_flight_tokens
    index_dtype = index_dtype_of(config, dtype)

    def parts_of(layer: int, *, full: bool) -> tuple[Part, ...]:
        of_layer = heads[layer]
        states = Part(of_layer.num_full if full else of_layer.num_windowed, head_dim, cache_dtype)
        num_index_keys = of_layer.num_index_keys(config.indexer.shared_keys)
        index = Part(num_index_keys, config.indexer.index_dim, index_dtype)
        return (states, states, index) if full else (states, states)

    def registered(
        number: int, planned: Group, spec_type: type[AttentionSpec], *, full: bool, **fields: Any
    ) -> PagedCache:
        spec = spec_type(
            block_size=planned.block_size,
            # In vLLM's terms, a token has one head of `token_bytes` bytes.
            num_kv_heads=1,
            num_head_slots=1,
            head_size=head_dim,
            state_content_bytes=planned.token_bytes,
            dtype=torch.uint8 if in_float8 else dtype,
            **fields,
        )
        parts = {layer: parts_of(layer, full=full) for layer in planned.layers}
        cache = PagedCache(f"{prefix}.{number}", spec, parts)
        context = vllm_config.compilation_config.static_forward_context
        assert cache.name not in context
        context[cache.name] = cache
        return cache

    full = registered(0, plan.full, FullAttentionSpec, full=True) if plan.full else None
    windowed: dict[int, PagedCache] = {}
    own_columns: dict[int, slice] = {}
    last = 0
    for number, group in enumerate(plan.windowed, start=1):
        window, sinks, keeps_prompts = plan.retention(group)
        cache = registered(
            number,
            group,
            SinkWindowSpec,
            full=False,
            sliding_window=window,
            num_sink_tokens=sinks,
            group=number,
            max_blocks=plan.num_windowed_blocks(group, longest, in_flight),
            keeps_prompts=keeps_prompts,
            num_recomputed_tokens=OBSERVED_QUERIES if plan.heavy_hitter_blocks(group) else 0,
        )
        windowed |= dict.fromkeys(group.layers, cache)
        first, last = last, last + len(plan.heavy_hitter_blocks(group))
        own_columns |= dict.fromkeys(group.layers, slice(first, last))
    own_blocks = None
    if last:
        # All groups share one pool, so any windowed cache finds its part in such a block.
        group = replace(plan.windowed[0], layers=())
        own_blocks = registered(
            len(plan.windowed) + 1, group, OwnBlocksSpec, full=False, num_blocks=last
        )
    histograms = new_histograms(heads) if full and current_platform.is_cuda() else None
    return Caches(plan, full, windowed, own_blocks, own_columns, histograms)


def index_dtype_of(config: RTPurboConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype of cached index keys in a model of this dtype; see `TokenIndexer`."""
    if config.attention.index_storage == "float8":
        return torch.float8_e4m3fn
    return torch.float16 if dtype == torch.bfloat16 else dtype
