"""The first launch of a decoding step: near attention and index scores, side by side.

Both only read memory, and neither needs the other: in one launch they fill the GPU together. The
programs that attend to near keys work longer, so they come first.

B sequences, H query heads, F full and K - F bounded KV heads, R retrieval heads; D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import sequence_extent
from rtpurbo.ops.triton.decode.early import let_next_begin
from rtpurbo.ops.triton.decode.near import attend_split
from rtpurbo.ops.triton.decode.scan import scan_chunk

# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = [
    "label_stride",
    "table_stride",
    "capacity",
    "batch",
    "num_heads",
    "num_full",
    "num_ring",
    "num_retrieval",
    "ring_slots",
    "num_splits",
    "row_entries",
    "num_chunks",
    "num_sinks",
    "near_window",
    "sliding_window",
    "widest_window",
]


@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    queries,
    query_strides,
    full_keys,
    full_key_strides,
    full_values,
    full_value_strides,
    ring_keys,
    ring_key_strides,
    ring_values,
    ring_value_strides,
    labels,
    label_stride,
    index_queries,
    index_query_strides,
    index_keys,
    index_key_strides,
    index_key_heads,
    block_table,
    table_stride,
    lengths,
    first_slots,
    full_heads,
    ring_heads,
    retrieval_heads,
    log_sums,
    outputs,
    levels,
    histogram,
    references,
    capacity,
    batch,
    num_heads,
    num_full,
    num_ring,
    num_retrieval,
    ring_slots,
    num_splits,
    row_entries,
    num_chunks,
    num_sinks,
    near_window,
    sliding_window,
    widest_window,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NEAR_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SCAN_TILE: tl.constexpr,
    SCAN_TILES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs (full KV head, split), then (bounded KV head, split), then (chunk, retrieval head).

    Heads that share index keys follow each other, so that they find a chunk of them in the L2 cache.
    """
    let_next_begin(EARLY)
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    query_position, first_slot = sequence_extent(
        sequence, capacity, lengths, first_slots, PAGE_SIZE
    )
    table_row = sequence * table_stride
    near_programs = (num_full + num_ring) * num_splits
    if program < num_full * num_splits:
        key_value_head = program // num_splits
        in_window = tl.maximum(query_position - num_sinks + 1, 0)
        attend_split(
            queries,
            query_strides,
            full_keys,
            full_key_strides,
            full_values,
            full_value_strides,
            block_table,
            table_row,
            labels,
            label_stride,
            tl.minimum(query_position + 1, num_sinks) + tl.minimum(in_window, widest_window),
            sequence,
            program % num_splits,
            key_value_head,
            tl.load(full_heads + key_value_head).to(tl.int32) * GROUP,
            retrieval_heads,
            query_position,
            first_slot,
            num_sinks,
            near_window,
            sliding_window,
            widest_window,
            scale,
            log_sums,
            outputs,
            num_heads,
            num_splits,
            num_retrieval,
            GROUP,
            ROWS,
            RETRIEVAL_WIDTH,
            HEAD_DIM,
            WIDTH,
            NEAR_TILE,
            SPLIT,
            PAGE_SIZE,
            False,
        )
    elif program < near_programs:
        key_value_head = program // num_splits - num_full
        attend_split(
            queries,
            query_strides,
            ring_keys,
            ring_key_strides,
            ring_values,
            ring_value_strides,
            block_table,
            table_row,
            labels,
            label_stride,
            ring_slots,
            sequence,
            program % num_splits,
            key_value_head,
            tl.load(ring_heads + key_value_head).to(tl.int32) * GROUP,
            retrieval_heads,
            query_position,
            first_slot,
            num_sinks,
            near_window,
            sliding_window,
            widest_window,
            scale,
            log_sums,
            outputs,
            num_heads,
            num_splits,
            num_retrieval,
            GROUP,
            ROWS,
            RETRIEVAL_WIDTH,
            HEAD_DIM,
            WIDTH,
            NEAR_TILE,
            SPLIT,
            0,
            True,
        )
    elif SCAN:
        scan_chunk(
            index_queries,
            index_query_strides,
            index_keys,
            index_key_strides,
            index_key_heads,
            block_table,
            table_row,
            sequence,
            (program - near_programs) % num_retrieval,
            (program - near_programs) // num_retrieval,
            query_position,
            first_slot,
            num_sinks,
            near_window,
            levels,
            histogram,
            references,
            batch,
            num_retrieval,
            row_entries,
            INDEX_DIM,
            INDEX_WIDTH,
            BLOCK,
            BLOCK_WIDTH,
            SCAN_TILE,
            SCAN_TILES,
            PLANES,
            PAGE_SIZE,
        )
