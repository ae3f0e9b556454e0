"""The launches of a decoding step, with their grids, tile sizes and scratch memory.

All of these depend on shapes alone, so that a step can be captured in a CUDA graph, and replayed
while the sequences grow within their capacity.

B sequences, H query heads, R retrieval heads, D head_dim, I index_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from rtpurbo.ops.triton import decode_overlap
from rtpurbo.ops.triton.decode_far import far_kernel
from rtpurbo.ops.triton.decode_histogram import BINS, histogram_kernel
from rtpurbo.ops.triton.decode_merge import merge_kernel
from rtpurbo.ops.triton.decode_read import read_kernel
from rtpurbo.ops.triton.decode_states import FullStates, Selection

LOG2_E = 1.4426950408889634

# Near keys of one program, and how many tiles of them are in flight or in use; index keys of one;
# entries that one program counts.
SPLIT = 256
NEAR_STAGES = 3
CHUNK_TOKENS = 1024
HISTOGRAM_ENTRIES = 2048
# Programs that share the far keys of a head: one for so many keys, up to a number for each head, and
# up to a number for all heads together.
FAR_TOKENS = 1024
FAR_PROGRAMS = 64
FAR_PROGRAMS_IN_ALL = 1024
# Consecutive keys that go to the same of these programs.
RUN_TOKENS = 64
# Elements of a tile that four warps hold in registers without spilling.
TILE_ELEMENTS = 16384
# Sizes that grow with the context are compiled for powers of two, but for none below these.
LEAST_CHUNKS = 128
LEAST_SPLITS = 64
LEAST_TOKENS = 1024
LEAST_BLOCKS = 128


@dataclass(frozen=True)
class Parts:
    """Partial results of some heads, each over a part of its keys.

    Attributes:
        log_sums: fp32 [heads, parts], log-sum-exp to base 2.
        outputs: fp32 [heads, parts, D].
    """

    log_sums: Tensor
    outputs: Tensor

    @classmethod
    def allocate(cls, like: Tensor, heads: int, parts: int) -> Parts:
        """Room for so many parts of so many heads, whose outputs are as wide as `like`."""
        return cls(
            like.new_empty(heads, parts, dtype=torch.float32),
            like.new_empty(heads, parts, like.shape[-1], dtype=torch.float32),
        )

    def __len__(self) -> int:
        return self.log_sums.shape[1]


@dataclass(frozen=True)
class Index:
    """What the indexer says of the far keys, and sizes that launches share.

    Attributes:
        scores: fp32 [planes * B * R, entries]; see `decode_scan`.
        chunk_peaks: fp32 [planes * B * R, chunks].
        chunk_sums: likewise.
        histogram: int32 [planes * B * R, bins].
        num_entries: tokens or blocks that a sequence has room for.
        num_chunks: programs that score them.
        block: tokens of an entry.
        planes: 2 if near keys are scored too.
    """

    scores: Tensor
    chunk_peaks: Tensor
    chunk_sums: Tensor
    histogram: Tensor
    num_entries: int
    num_chunks: int
    block: int
    planes: int


def _allocate_index(
    rule: AttentionRule, capacity: int, batch: int, num_retrieval: int, like: Tensor
) -> Index:
    block = rule.block_size if rule.granularity == "block" else 1
    planes = 2 if rule.reading == "paper" else 1
    num_entries = triton.cdiv(capacity, block)
    num_chunks = triton.cdiv(num_entries, _entries_of_chunk(block))
    heads = planes * batch * num_retrieval

    def empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return like.new_empty(heads, size, dtype=dtype)

    return Index(
        empty(num_entries),
        empty(num_chunks),
        empty(num_chunks),
        empty(BINS.value, torch.int32),
        num_entries,
        num_chunks,
        block,
        planes,
    )


def _entries_of_chunk(block: int) -> int:
    return max(1, CHUNK_TOKENS // triton.next_power_of_2(block))


def _strides(states: Tensor | None) -> tuple[int, int, int]:
    if states is None:
        return 0, 0, 0
    outer, head, slot = states.stride()[:3]
    return outer, head, slot


def read(
    queries: Tensor,
    full: FullStates,
    bounded: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    scaling: float,
) -> tuple[Parts, Index]:
    """Near attention of B * H heads, and index scores."""
    batch, num_heads, _, head_dim = queries.shape
    num_full, num_ring = layout.full_key_value_heads.numel(), layout.bounded_key_value_heads.numel()
    num_retrieval = len(layout.retrieval)
    scan = num_retrieval > 0 and rule.top_p < 1
    index = _allocate_index(rule, full.capacity, batch, num_retrieval if scan else 0, queries)

    widest = max(rule.near_window, rule.sliding_window if len(layout.local_full) else 0)
    num_near = min(rule.num_sink_tokens + widest, full.capacity) if num_full else 0
    ring_slots = bounded.keys.shape[2] if num_ring else 0
    num_splits = max(1, triton.cdiv(max(num_near, ring_slots), SPLIT))
    near = Parts.allocate(queries, batch * num_heads, num_splits)

    group = num_heads // (num_full + num_ring)
    width = max(16, triton.next_power_of_2(head_dim))
    # fp32 is multiplied without tensor cores, and needs more registers.
    near_tile = TILE_ELEMENTS // (2 if queries.element_size() == 2 else 8) // width
    near_tile = max(16, min(64, near_tile))
    index_dim = 1 if index_queries is None else index_queries.shape[-1]
    index_width = triton.next_power_of_2(index_dim)
    block_width = triton.next_power_of_2(index.block)
    chunk_tokens = _entries_of_chunk(index.block) * block_width
    scan_tile = max(block_width, min(chunk_tokens, TILE_ELEMENTS // index_width))
    table = full.block_table
    programs = (num_full + num_ring) * num_splits + num_retrieval * scan * index.num_chunks
    read_kernel[(programs, batch)](
        queries,
        queries.stride()[:2],
        full.keys,
        _strides(full.keys),
        full.values,
        _strides(full.values),
        bounded.keys,
        _strides(bounded.keys),
        bounded.values,
        _strides(bounded.values),
        bounded.positions,
        bounded.positions.stride(0),
        index_queries,
        (0, 0) if index_queries is None else index_queries.stride()[:2],
        full.index_keys,
        _strides(full.index_keys),
        table,
        0 if table is None else table.stride(0),
        full.lengths,
        full.first_slots,
        layout.full_key_value_heads,
        layout.bounded_key_value_heads,
        layout.retrieval.heads,
        near.log_sums,
        near.outputs,
        index.scores,
        index.chunk_peaks,
        index.chunk_sums,
        index.histogram,
        full.capacity,
        batch,
        num_heads,
        num_full,
        num_ring,
        num_retrieval,
        ring_slots,
        num_splits,
        index.num_entries,
        index.num_chunks,
        rule.num_sink_tokens,
        rule.near_window,
        rule.sliding_window,
        widest,
        scaling * LOG2_E,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        RETRIEVAL_WIDTH=triton.next_power_of_2(max(1, num_retrieval)),
        HEAD_DIM=head_dim,
        WIDTH=width,
        NEAR_TILE=near_tile,
        SPLIT=SPLIT,
        INDEX_DIM=index_dim,
        INDEX_WIDTH=index_width,
        BLOCK=index.block,
        BLOCK_WIDTH=block_width,
        SCAN_TILE=scan_tile,
        SCAN_TILES=chunk_tokens // scan_tile,
        BINS=BINS.value,
        PLANES=index.planes,
        PAGE_SIZE=full.page_size,
        SCAN=scan,
        OVERLAP=decode_overlap.OVERLAP_LAUNCHES,
        num_warps=4,
        num_stages=NEAR_STAGES,
    )
    return near, index


def read_far(
    queries: Tensor,
    full: FullStates,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    near: Parts,
    index: Index,
) -> tuple[Parts, Selection | None]:
    """Far attention of B * R heads, and what they selected: None if everything."""
    batch, num_heads, _, head_dim = queries.shape
    num_retrieval = len(layout.retrieval)
    heads_of_plane = batch * num_retrieval
    everything = rule.top_p >= 1
    chunk_width = max(LEAST_CHUNKS, triton.next_power_of_2(index.num_chunks))
    if not everything:
        histogram_kernel[(triton.cdiv(index.num_entries, HISTOGRAM_ENTRIES), heads_of_plane)](
            index.scores,
            index.chunk_peaks,
            index.histogram,
            full.lengths,
            full.first_slots,
            full.capacity,
            num_retrieval,
            index.num_entries,
            index.num_chunks,
            rule.num_sink_tokens,
            rule.near_window,
            heads_of_plane,
            CHUNK_WIDTH=chunk_width,
            BLOCK=index.block,
            ENTRIES=HISTOGRAM_ENTRIES,
            PLANES=index.planes,
            PAGE_SIZE=full.page_size,
            OVERLAP=decode_overlap.OVERLAP_LAUNCHES,
            num_warps=4,
            **decode_overlap.launch_options(),
        )
    programs = min(
        triton.cdiv(full.capacity, FAR_TOKENS),
        FAR_PROGRAMS,
        max(1, FAR_PROGRAMS_IN_ALL // heads_of_plane),
    )
    run = max(1, RUN_TOKENS // triton.next_power_of_2(index.block))
    share = triton.next_power_of_2(triton.cdiv(index.num_entries, programs))
    entries = max(LEAST_TOKENS if index.block == 1 else LEAST_BLOCKS, min(2048, share))
    list_length = triton.cdiv(index.num_entries, programs * entries) * entries
    selection = None
    lists = list_lengths = near.log_sums
    if not everything:
        shape = (batch, num_retrieval, programs)
        lists = queries.new_empty(*shape, list_length, dtype=torch.int32)
        list_lengths = queries.new_empty(shape, dtype=torch.int32)
        selection = Selection(lists, list_lengths, index.block)
    far = Parts.allocate(queries, heads_of_plane, programs)
    width = triton.next_power_of_2(head_dim)
    table = full.block_table
    far_kernel[(programs, heads_of_plane)](
        queries,
        queries.stride()[:2],
        full.keys,
        _strides(full.keys),
        full.values,
        _strides(full.values),
        table,
        0 if table is None else table.stride(0),
        full.lengths,
        full.first_slots,
        layout.retrieval.heads,
        layout.retrieval.key_value_heads,
        near.log_sums,
        index.scores,
        index.chunk_peaks,
        index.chunk_sums,
        index.histogram,
        lists,
        list_lengths,
        far.log_sums,
        far.outputs,
        full.capacity,
        num_heads,
        num_retrieval,
        len(near),
        index.num_entries,
        index.num_chunks,
        list_length,
        heads_of_plane,
        rule.num_sink_tokens,
        rule.near_window,
        rule.top_p,
        rule.far_floor,
        triton.cdiv(rule.min_tokens, index.block),
        scaling * LOG2_E,
        CHUNK_WIDTH=chunk_width,
        SPLIT_WIDTH=max(LEAST_SPLITS, triton.next_power_of_2(len(near))),
        HEAD_DIM=head_dim,
        WIDTH=width,
        TILE=max(16, min(64, TILE_ELEMENTS // 2 // width)),
        BLOCK=index.block,
        RUN=run,
        ENTRIES=entries,
        PLANES=index.planes,
        READING=rule.reading,
        PAGE_SIZE=full.page_size,
        EVERYTHING=everything,
        OVERLAP=decode_overlap.OVERLAP_LAUNCHES,
        num_warps=4,
        **decode_overlap.launch_options(),
    )
    return far, selection


def merge(
    queries: Tensor,
    layout: HeadLayout,
    near: Parts,
    far: Parts,
    return_log_sum_exp: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, H, 1, D] and log-sum-exp [B, H, 1] of all heads, in head order."""
    batch, num_heads, _, head_dim = queries.shape
    output = queries.new_empty(batch, num_heads, 1, head_dim)
    log_sum_exp = None
    if return_log_sum_exp:
        log_sum_exp = queries.new_empty(batch, num_heads, 1, dtype=torch.float32)
    width = triton.next_power_of_2(head_dim)
    merge_kernel[(num_heads, batch)](
        near.log_sums,
        near.outputs,
        far.log_sums,
        far.outputs,
        layout.retrieval.heads,
        output,
        log_sum_exp,
        num_heads,
        len(layout.retrieval),
        len(near),
        len(far),
        RETRIEVAL_WIDTH=triton.next_power_of_2(max(1, len(layout.retrieval))),
        HEAD_DIM=head_dim,
        WIDTH=width,
        TILE=max(16, min(64, TILE_ELEMENTS // 2 // width)),
        OVERLAP=decode_overlap.OVERLAP_LAUNCHES,
        num_warps=4,
        **decode_overlap.launch_options(),
    )
    return output, log_sum_exp
