"""Cache spec and manager for sinks and window in vLLM.

vLLM's sliding window frees the first tokens, and its prefix caching does not require them. The manager here keeps the
blocks of the sinks for the lifetime of a request, and reuses a cached prefix only if they are cached. With dense
queries at the end of prompts, it keeps all blocks of a request until its prompt has been read. The spec is not a
subclass of vLLM's `SlidingWindowSpec`, which vLLM splits and promotes by rules of its own.

Sinks are shared by requests with the same prefix, so heavy hitters, which replace some of them, are stored in blocks
that a request shares with no other: those of a group of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

# Otherwise the first registration in a process would prevent that of the built-in specs.
KVCacheSpecRegistry._ensure_registered()


class SinkWindowManager(SlidingWindowManager):
    """Blocks of requests in a group that keeps sinks and window."""

    kv_cache_spec: SinkWindowSpec

    def __init__(self, kv_cache_spec: SinkWindowSpec, **options: Any) -> None:
        # vLLM passes this bound to managers of its own specs only. Without it, a prompt whose blocks would
        # exceed the pool if none were freed is never admitted.
        options["max_admission_blocks_per_request"] = kv_cache_spec.max_blocks
        super().__init__(kv_cache_spec, **options)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest cached prefix whose sinks and last window are cached.

        With `keeps_prompts`, its other blocks are reused up to the first one that is not cached. The last
        `num_recomputed_tokens` tokens of the request are not reused.

        Returns:
            Blocks of the prefix per group, null blocks where none is reused, and its length in tokens.
        """
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        assert not drop_eagle_block, "speculative decoding is rejected at start"
        block_size = kv_cache_spec.block_size
        block_hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, block_size, alignment_tokens=alignment_tokens
        )

        def cached(number: int) -> list[KVCacheBlock] | None:
            return block_pool.get_cached_block(block_hashes[number], kv_cache_group_ids)

        # Hashes are those of the request's whole blocks.
        hashed = len(block_hashes) * block_size
        max_length = min(max_length, max(0, hashed - kv_cache_spec.num_recomputed_tokens))
        end = max_length // block_size
        leading = end if kv_cache_spec.keeps_prompts else min(kv_cache_spec.num_sink_blocks, end)
        found: dict[int, list[KVCacheBlock]] = {}
        for number in range(leading):
            blocks = cached(number)
            if blocks is None:
                leading = number
                if number < kv_cache_spec.num_sink_blocks:
                    end = number
                break
            found[number] = blocks

        aligned = max(1, alignment_tokens // block_size)
        end = end // aligned * aligned
        while end:
            first = max(0, end - kv_cache_spec.num_window_blocks)
            number = end
            while number > first and (blocks := cached(number - 1)) is not None:
                number -= 1
                found[number] = blocks
            if number == first:
                break
            # The block before `number` is missing: a shorter prefix ends before it.
            end = (number - 1) // aligned * aligned

        hits = tuple([block_pool.null_block] * end for _ in kv_cache_group_ids)
        first = max(0, end - kv_cache_spec.num_window_blocks)
        for number, blocks in found.items():
            if number < end and (number >= first or number < leading):
                for hit, block in zip(hits, blocks, strict=True):
                    hit[number] = block
        return hits, end * block_size

    @classmethod
    def reachable_block_mask(cls, *arguments: Any, **options: Any) -> None:
        """Returns None: every block may be reused for a prefix."""
        return

    def cache_blocks(self, request: Request, *arguments: Any, **options: Any) -> None:
        """Caches whole blocks, and prevents a preempted request from skipping its prompt.

        The last queries of its prompt must choose heavy hitters again, because it loses those that it has.
        """
        has_read = request.num_computed_tokens >= request.num_prompt_tokens
        if has_read and self.kv_cache_spec.num_recomputed_tokens:
            request.skip_reading_prefix_cache = True
        super().cache_blocks(request, *arguments, **options)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Number of first tokens that a request with computed tokens does not need when it is scheduled first."""
        if self.kv_cache_spec.keeps_prompts:
            return 0
        skipped: int = super().get_num_skipped_tokens(num_computed_tokens)
        return skipped

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *arguments: Any,
        **options: Any,
    ) -> int:
        """Number of blocks to allocate, with cached sinks, which leave the queue of free blocks when reused."""
        number = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            *arguments,
            **options,
        )
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        sinks = new_computed_blocks[: min(self.kv_cache_spec.num_sink_blocks, skipped)]
        return number + self._get_num_evictable_blocks(sinks)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Adds computed blocks, with cached sinks that the window alone would skip."""
        sinks = list(new_computed_blocks[: self.kv_cache_spec.num_sink_blocks])
        super().add_local_computed_blocks(request_id, new_computed_blocks, *arguments, **options)
        request_blocks = self.req_to_blocks[request_id]
        for number, block in enumerate(sinks):
            if request_blocks[number].is_null and not block.is_null:
                self.block_pool.touch([block])
                request_blocks[number] = block

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees the blocks between sinks and window, with `keeps_prompts` only after the prompt has been read."""
        first = self.kv_cache_spec.num_sink_blocks
        if self.kv_cache_spec.keeps_prompts:
            assert num_prompt_tokens is not None, "vLLM passes the length of the prompt"
            if processed_computed_tokens < num_prompt_tokens:
                return
        skipped = super().get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        blocks = self.req_to_blocks[request_id]
        end = min(skipped, len(blocks))
        self._remove_blocks_in_range(request_id, first, end)
        if first < end and not blocks[first].is_null:
            # vLLM frees from the end up to a null block. A reused prefix has some before its window.
            gap = next(number for number in range(first, end) if blocks[number].is_null)
            self._remove_blocks_in_range(request_id, first, gap)


@register_kv_cache_spec(manager_class=SinkWindowManager)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(AttentionSpec):
    """Spec of a group that keeps the first and the most recent tokens of each request.

    Attributes:
        sliding_window: tokens of the window, including the last one.
        num_sink_tokens: first tokens that are kept.
        group: number of the group; groups are not merged.
        max_blocks: largest number of blocks of a request.
        keeps_prompts: blocks before the window are kept until the prompt has been read.
        num_recomputed_tokens: last tokens of a prompt that are computed even if they are cached.
        extra_retained_tokens: required by vLLM's manager; 0.
    """

    sliding_window: int
    num_sink_tokens: int
    group: int
    max_blocks: int
    keeps_prompts: bool = False
    num_recomputed_tokens: int = 0
    extra_retained_tokens: int = 0

    @property
    def num_sink_blocks(self) -> int:
        """Blocks with sinks."""
        return -(-self.num_sink_tokens // self.block_size)

    @property
    def num_window_blocks(self) -> int:
        """Largest number of blocks before a token's own block that its window may reach into."""
        return -(-(self.sliding_window - 1) // self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Largest number of bytes of one request."""
        return self.max_blocks * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Returns True if all specs may share a block table."""
        return all(
            isinstance(spec, SinkWindowSpec) and spec.group == self.group
            for spec in kv_cache_specs.values()
        )


class OwnBlocksManager(SingleTypeKVCacheManager):
    """Blocks that a request has for its lifetime and shares with no other."""

    kv_cache_spec: OwnBlocksSpec

    def get_num_blocks_to_allocate(self, request_id: str, *arguments: Any, **options: Any) -> int:
        """Number of blocks to allocate: all of them at first."""
        return self.kv_cache_spec.num_blocks - len(self.req_to_blocks.get(request_id, ()))

    def allocate_new_blocks(
        self, request_id: str, *arguments: Any, **options: Any
    ) -> list[KVCacheBlock]:
        """Allocates the blocks of a new or resumed request."""
        new = self.block_pool.get_new_blocks(self.get_num_blocks_to_allocate(request_id))
        self.req_to_blocks[request_id].extend(new)
        return new

    def add_local_computed_blocks(self, *arguments: Any, **options: Any) -> None:
        """Adds nothing: no block is part of a cached prefix."""

    @classmethod
    def find_longest_cache_hit(cls, *arguments: Any, **options: Any) -> Any:
        """Not implemented: vLLM leaves groups that are not cached out of the search."""
        raise NotImplementedError


@register_kv_cache_spec(manager_class=OwnBlocksManager)
@dataclass(frozen=True, kw_only=True)
class OwnBlocksSpec(AttentionSpec):
    """Spec of a group with a fixed number of blocks per request, which are in no prefix cache.

    Attributes:
        num_blocks: blocks of a request.
    """

    num_blocks: int

    @property
    def prefix_cacheable(self) -> bool:
        """False: no block may be reused for a prefix."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Largest number of bytes of one request."""
        return self.num_blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the block table, in which the first model runner also looks up a slot for each token."""
        return max(self.num_blocks, super().max_num_blocks_per_req(vllm_config, max_len))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Returns True if all specs may share a block table."""
        return all(isinstance(spec, OwnBlocksSpec) for spec in kv_cache_specs.values())
