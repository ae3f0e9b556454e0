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
from rtpurbo.ops.states import HeadLayout, KeyValueStates, index_key_heads
from rtpurbo.ops.triton.decode.early import can_begin_early
from rtpurbo.ops.triton.decode.far import far_kernel
from rtpurbo.ops.triton.decode.levels import LEVELS
from rtpurbo.ops.triton.decode.merge import merge_kernel
from rtpurbo.ops.triton.decode.read import read_kernel
from rtpurbo.ops.triton.decode.select import select_kernel
from rtpurbo.ops.triton.decode.states import FullStates, Selection
from rtpurbo.ops.triton.softmax import LOG2_E

# Near keys of one program, and how many tiles of them are in flight or in use; index keys of one.
SPLIT = 128
NEAR_STAGES = 2
CHUNK_TOKENS = 1024
# Programs of one warp that list the selected entries of a head, the fewest entries of one, and the most
# that it looks at together.
SEGMENTS = 256
LEAST_SEGMENT = 256
LISTED_TOGETHER = 512
# Programs that share the far keys of a head: one for so many keys, up to a number for each head, and
# up to a number for all heads together; and the keys that one gathers together, at the most.
FAR_TOKENS = 512
FAR_PROGRAMS = 256
FAR_PROGRAMS_IN_ALL = 2048
FAR_TILE = 16
FAR_WARPS = 1
# Elements of an output that one program merges, and of how many parts at a time.
MERGED_DIMS = 32
MERGED_PARTS = 128
# Elements of a tile that four warps hold in registers without spilling.
TILE_ELEMENTS = 16384
# Sizes that grow with the context are compiled for powers of two, but for none below these.
LEAST_SEGMENTS = 64
LEAST_SPLITS = 64


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

    def with_sinks(self, sinks: Tensor) -> Parts:
        """The same and one more part for each head: a learned sink [H], whose output is zero."""
        count = self.log_sums.shape[0] // sinks.numel()
        logits = (sinks.float() * LOG2_E.value).repeat(count)[:, None]
        return Parts(
            torch.cat([self.log_sums, logits], 1),
            torch.nn.functional.pad(self.outputs, (0, 0, 0, 1)),
        )


@dataclass(frozen=True)
class Index:
    """What the indexer says of the far keys, and sizes that launches share.

    Attributes:
        levels: int16 [planes * B * R, segments * entries of one], scores as `levels` says; in
            whole segments and chunks.
        histogram: int32 [planes * B * R, LEVELS], how many entries have which level; zeros before.
        references: fp32 [B * R], scores that levels are measured from.
        num_chunks: programs that score the entries of a head.
        segment: entries of a program that selects.
        block: tokens of an entry.
        planes: 2 if near keys are scored too.
    """

    levels: Tensor
    histogram: Tensor
    references: Tensor
    num_chunks: int
    segment: int
    block: int
    planes: int

    @classmethod
    def allocate(
        cls, rule: AttentionRule, capacity: int, heads: int, like: Tensor, counters: Tensor | None
    ) -> Index:
        """Room for so many heads, of all sequences, that select from `capacity` tokens."""
        block = rule.block_size if rule.granularity == "block" else 1
        planes = 2 if rule.reading == "paper" else 1
        num_entries = triton.cdiv(capacity, block)
        chunk = _entries_of_chunk(block)
        share = triton.next_power_of_2(triton.cdiv(num_entries, SEGMENTS))
        segment = max(LEAST_SEGMENT, share)
        width = max(chunk, segment)
        row_entries = triton.cdiv(num_entries, width) * width
        if counters is None or counters.shape[0] != planes * heads:
            counters = new_counters(planes * heads, like.device)
        return cls(
            like.new_empty(planes * heads, row_entries, dtype=torch.int16),
            counters,
            like.new_empty(heads, dtype=torch.float32),
            triton.cdiv(num_entries, chunk),
            segment,
            block,
            planes,
        )


def new_counters(heads: int, device: torch.device) -> Tensor:
    """Zeros int32 [heads, LEVELS] for the histograms of so many heads of all sequences."""
    return torch.zeros(heads, LEVELS.value, dtype=torch.int32, device=device)


def _entries_of_chunk(block: int) -> int:
    return max(1, CHUNK_TOKENS // triton.next_power_of_2(block))


def _depending(queries: Tensor) -> dict[str, bool]:
    """Options of a launch that reads what the one before it writes."""
    # The interpreter does not know the option, so it is given only where it says something.
    early = can_begin_early(queries.device)
    return {"EARLY": early, **({"launch_pdl": True} if early else {})}


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
    num_full, num_ring = (
        layout.full_key_value_heads.numel(),
        layout.windowed_key_value_heads.numel(),
    )
    num_retrieval = len(layout.retrieval)
    scan = num_retrieval > 0 and rule.top_p < 1
    key_heads = None
    if scan:
        assert full.index_keys is not None
        key_heads = index_key_heads(full.index_keys, num_full, layout.retrieval.key_value_heads)
    heads = batch * num_retrieval * scan
    index = Index.allocate(rule, full.capacity, heads, queries, full.counters)

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
        key_heads,
        table,
        0 if table is None else table.stride(0),
        full.lengths,
        full.first_slots,
        layout.full_key_value_heads,
        layout.windowed_key_value_heads,
        layout.retrieval.heads,
        near.log_sums,
        near.outputs,
        index.levels,
        index.histogram,
        index.references,
        full.capacity,
        batch,
        num_heads,
        num_full,
        num_ring,
        num_retrieval,
        ring_slots,
        num_splits,
        index.levels.shape[1],
        index.num_chunks,
        rule.num_sink_tokens,
        rule.near_window,
        rule.sliding_window,
        widest,
        scaling * LOG2_E.value,
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
        PLANES=index.planes,
        PAGE_SIZE=full.page_size,
        SCAN=scan,
        EARLY=can_begin_early(queries.device),
        num_warps=4,
        num_stages=NEAR_STAGES,
    )
    return near, index


def select(
    queries: Tensor,
    full: FullStates,
    layout: HeadLayout,
    rule: AttentionRule,
    near: Parts,
    index: Index,
) -> Selection:
    """Which far entries B * R heads read."""
    batch, num_heads = queries.shape[:2]
    num_retrieval = len(layout.retrieval)
    num_segments = index.levels.shape[1] // index.segment
    shape = (batch, num_retrieval, num_segments)
    selection = Selection(
        queries.new_empty(*shape, index.segment, dtype=torch.int32),
        queries.new_empty(shape, dtype=torch.int32),
        index.block,
    )
    select_kernel[(num_segments, batch * num_retrieval)](
        index.levels,
        index.histogram,
        index.references,
        near.log_sums,
        layout.retrieval.heads,
        full.lengths,
        full.first_slots,
        selection.lists,
        selection.list_lengths,
        full.capacity,
        num_heads,
        num_retrieval,
        len(near),
        index.segment,
        batch * num_retrieval,
        rule.num_sink_tokens,
        rule.near_window,
        rule.top_p,
        rule.far_floor,
        triton.cdiv(rule.min_tokens, index.block),
        SPLIT_WIDTH=max(LEAST_SPLITS, triton.next_power_of_2(len(near))),
        BLOCK=index.block,
        ENTRIES=min(LISTED_TOGETHER, index.segment),
        PLANES=index.planes,
        READING=rule.reading,
        PAGE_SIZE=full.page_size,
        **_depending(queries),
        num_warps=1,
    )
    return selection


def read_far(
    queries: Tensor,
    full: FullStates,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    selection: Selection | None,
) -> Parts:
    """Attention of B * R heads over the far keys selected, or over all if there is no selection."""
    batch, _, _, head_dim = queries.shape
    num_retrieval = len(layout.retrieval)
    heads = batch * num_retrieval
    programs = min(
        triton.cdiv(full.capacity, FAR_TOKENS), FAR_PROGRAMS, max(1, FAR_PROGRAMS_IN_ALL // heads)
    )
    num_segments = segment_entries = 0
    if selection is not None:
        num_segments, segment_entries = selection.lists.shape[2:]
    far = Parts.allocate(queries, heads, programs)
    width = triton.next_power_of_2(head_dim)
    table = full.block_table
    far_kernel[(programs, heads)](
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
        None if selection is None else selection.lists,
        None if selection is None else selection.list_lengths,
        far.log_sums,
        far.outputs,
        full.capacity,
        num_retrieval,
        num_segments,
        segment_entries,
        rule.num_sink_tokens,
        rule.near_window,
        scaling * LOG2_E.value,
        SEGMENT_WIDTH=max(LEAST_SEGMENTS, triton.next_power_of_2(max(1, num_segments))),
        HEAD_DIM=head_dim,
        WIDTH=width,
        TILE=max(16, min(FAR_TILE, TILE_ELEMENTS // queries.element_size() // width)),
        BLOCK=1 if selection is None else selection.block,
        PAGE_SIZE=full.page_size,
        EVERYTHING=selection is None,
        **_depending(queries),
        num_warps=FAR_WARPS,
    )
    return far


def merge(
    queries: Tensor,
    layout: HeadLayout,
    near: Parts,
    far: Parts,
    counters: Tensor | None,
    return_log_sum_exp: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, H, 1, D] and log-sum-exp [B, H, 1] of all heads, in head order; zeros in `counters`."""
    batch, num_heads, _, head_dim = queries.shape
    output = queries.new_empty(batch, num_heads, 1, head_dim)
    log_sum_exp = None
    if return_log_sum_exp:
        log_sum_exp = queries.new_empty(batch, num_heads, 1, dtype=torch.float32)
    merge_kernel[(triton.cdiv(head_dim, MERGED_DIMS), num_heads, batch)](
        near.log_sums,
        near.outputs,
        far.log_sums,
        far.outputs,
        layout.retrieval.heads,
        output,
        log_sum_exp,
        counters,
        num_heads,
        len(layout.retrieval),
        len(near),
        len(far),
        RETRIEVAL_WIDTH=triton.next_power_of_2(max(1, len(layout.retrieval))),
        HEAD_DIM=head_dim,
        WIDTH=MERGED_DIMS,
        TILE=MERGED_PARTS,
        **_depending(queries),
        num_warps=4,
    )
    return output, log_sum_exp
