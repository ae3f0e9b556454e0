"""What a step's attention is told about its batch."""

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

from rtpurbo.serving.vllm.pages import Batch


class HeadwiseMetadata(Batch, AttentionMetadata):
    """A batch, as vLLM passes it from the builder to the layers."""


class HeadwiseMetadataBuilder(AttentionMetadataBuilder[HeadwiseMetadata]):
    """Takes from vLLM's description of a batch what `attention` needs."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadwiseMetadata:
        """The metadata of a step."""
        batch = common_attn_metadata
        lengths = batch.seq_lens_cpu_upper_bound
        prompt_lengths = batch.rswa_prefix_lens
        # Both runners tell the lengths of prompts to models that have `rswa_window`.
        assert lengths is not None
        assert prompt_lengths is not None
        return HeadwiseMetadata(
            batch.query_start_loc_cpu.tolist(),
            lengths.tolist(),
            prompt_lengths.tolist(),
            batch.block_table_tensor,
            batch.slot_mapping,
            batch.seq_lens,
        )


class HeadwiseBackend(AttentionBackend):
    """Names the above to vLLM; attention itself is done by the layers of `models`."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """For vLLM's log."""
        return "RTPURBO"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        """None: no layer of vLLM's own uses this backend."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[HeadwiseMetadataBuilder]:
        """Who makes the metadata."""
        return HeadwiseMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Blocks of any size of the plan."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost, so that groups of different sizes can share them."""
        return (KVCacheLayout.BLHNC,)
