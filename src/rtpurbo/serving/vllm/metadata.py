"""Attention metadata of a step, and vLLM's builder for it."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from rtpurbo.serving.vllm.checkpoint import read_config
from rtpurbo.serving.vllm.pages import Batch


class HeadwiseMetadata(Batch, AttentionMetadata):
    """Batch, in the form that vLLM passes from the builder to the layers."""


class HeadwiseMetadataBuilder(AttentionMetadataBuilder[HeadwiseMetadata]):
    """Builder of the metadata from vLLM's description of a batch."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        largest = max(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self._rule = read_config(vllm_config.model_config.hf_config).attention
        # CUDA graphs read the prompt lengths at a fixed address.
        self._prompt_lengths = torch.zeros(largest, dtype=torch.int32, device=device)
        support = self.get_cudagraph_support(vllm_config, kv_cache_spec)
        self._serves_uniform = device.type != "cpu" and support != AttentionCGSupport.NEVER

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """CUDA graph support: steps in which every request has one query.

        In a graph, the kernels must read all keys for the last query of a prompt. That works if tokens are selected,
        but not with blocks: partial blocks at the ends of the far keys have lower scores than whole ones. And it works
        only if `min_tokens` selects the best level of scores, whatever its mass.
        """
        rule = read_config(vllm_config.model_config.hf_config).attention
        prompts_select = rule.prefill_mode != "dense"
        if not prompts_select and (rule.granularity != "token" or rule.min_tokens == 0):
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadwiseMetadata:
        """Builds the metadata of a step."""
        batch = common_attn_metadata
        lengths = batch.seq_lens_cpu_upper_bound
        assert lengths is not None
        # Both model runners pass prompt lengths on the CPU, one of them because of `PromptLengths`, but not for the
        # dummy requests of a capture.
        prompt_lengths = batch.rswa_prefix_lens
        if prompt_lengths is None:
            prompt_lengths = torch.zeros(batch.num_reqs, dtype=torch.int32)
        kept = self._prompt_lengths[: prompt_lengths.shape[0]]
        kept.copy_(prompt_lengths, non_blocking=True)
        metadata = HeadwiseMetadata(
            batch.query_start_loc_cpu,
            lengths,
            prompt_lengths,
            batch.block_table_tensor,
            batch.slot_mapping,
            batch.seq_lens,
            # There may be padding after the requests.
            self._prompt_lengths[: batch.seq_lens.shape[0]],
        )
        if self._serves_uniform and batch.max_query_len == 1:
            # vLLM replays a CUDA graph of such a step in any case: a prompt's last query then keeps to its window.
            metadata.uniform = not (
                self._rule.has_dense_queries and metadata.dense_queries(self._rule)[1].any()
            )
        return metadata


class HeadwiseBackend(AttentionBackend):
    """Attention backend that provides the builder; the layers of `models` compute the attention."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's log."""
        return "RTPURBO"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        """Not implemented: no attention layer of vLLM uses this backend."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[HeadwiseMetadataBuilder]:
        """Builder of the metadata."""
        return HeadwiseMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Supported block sizes: multiples of 16, as in a plan."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layout with blocks as the outermost dimension, so that groups of different sizes share the pool."""
        return (KVCacheLayout.BLHNC,)
