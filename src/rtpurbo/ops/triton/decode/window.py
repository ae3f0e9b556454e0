"""Window attention of one query token: one split of sinks and window for the query heads of a KV head.

The query heads of a group are batched into one matrix product, so each key is loaded once. Their windows may
differ, because retrieval heads can have a `retrieval_window` of their own.

B sequences, H query heads, D head_dim; GROUP query heads of a KV head, padded to GROUP_WIDTH (at least 16,
the smallest tile of a tensor core).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.device_functions import (
    IEEE,
    head_start,
    log_sum_exp,
    slot_offsets,
    update_softmax,
)


@triton.jit
def window_slots(entries, query_position, first_slot, num_sinks, widest_window):
    """Positions and slots of near keys `entries`, numbered with the sinks first and the window after them."""
    window_start = tl.maximum(query_position - widest_window + 1, num_sinks)
    positions = tl.where(entries < num_sinks, entries, window_start + entries - num_sinks)
    return positions, positions + first_slot


@triton.jit
def window_split(
    queries,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    block_table,
    table_row,
    slot_positions,
    position_stride,
    num_entries,
    sequence,
    split,
    key_value_head,
    first_head,
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
    split_keys,
    num_retrieval,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,
):
    """Attention of GROUP query heads from `first_head` on over split `split`, of `split_keys` near keys.

    In a ring buffer (RING) an entry is a slot, whose position is in `slot_positions` int64 [B, slots];
    otherwise entries are numbered as in `window_slots`. `scale` includes log2(e).

    Writes `log_sums` [B, H, splits] to base 2 and `outputs` [B, H, splits, D].
    """
    members = tl.arange(0, GROUP_WIDTH)
    dims = tl.arange(0, WIDTH)
    in_head = dims[None, :] < HEAD_DIM
    heads = first_head + members
    in_group = members < GROUP
    group_queries = tl.load(
        queries
        + sequence.to(tl.int64) * query_strides[0]
        + heads.to(tl.int64)[:, None] * query_strides[1]
        + dims[None, :],
        mask=in_group[:, None] & in_head,
        other=0.0,
    )
    if RING:
        windows = members * 0 + sliding_window
    else:
        ranks = tl.arange(0, RETRIEVAL_WIDTH)
        retrieving = tl.load(retrieval_heads + ranks, mask=ranks < num_retrieval, other=-1)
        retrieves = tl.max((heads[:, None] == retrieving[None, :]).to(tl.int32), 1) > 0
        windows = tl.where(retrieves, near_window, sliding_window)
    before_window = query_position - windows

    keys = head_start(keys, sequence, key_value_head, key_strides, PAGE_SIZE)
    values = head_start(values, sequence, key_value_head, value_strides, PAGE_SIZE)
    peak = tl.full([GROUP_WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_WIDTH], tl.float32)
    accumulator = tl.zeros([GROUP_WIDTH, WIDTH], tl.float32)
    first_entry = split * split_keys
    # A split beyond the keys in use runs no tile and writes an empty result.
    num_tiles = tl.maximum(0, tl.cdiv(tl.minimum(num_entries - first_entry, split_keys), TILE))
    for tile in range(num_tiles):
        entries = first_entry + tile * TILE + tl.arange(0, TILE)
        in_use = entries < num_entries
        if RING:
            slots = entries
            positions = tl.load(
                slot_positions + sequence.to(tl.int64) * position_stride + entries,
                mask=in_use,
                other=-1,
            ).to(tl.int32)
        else:
            positions, slots = window_slots(
                entries, query_position, first_slot, num_sinks, widest_window
            )
        seen = in_use & (positions >= 0) & (positions <= query_position)
        loaded = seen[:, None] & in_head
        key_offsets = slot_offsets(slots, seen, key_strides, block_table, table_row, PAGE_SIZE)
        value_offsets = slot_offsets(slots, seen, value_strides, block_table, table_row, PAGE_SIZE)
        # Keys and values may be float8.
        tile_keys = tl.load(keys + key_offsets[:, None] + dims[None, :], mask=loaded, other=0.0).to(
            group_queries.dtype
        )
        tile_values = tl.load(
            values + value_offsets[:, None] + dims[None, :], mask=loaded, other=0.0
        ).to(group_queries.dtype)
        logits = tl.dot(group_queries, tile_keys.T, input_precision=IEEE) * scale
        near = (positions < num_sinks)[None, :] | (positions[None, :] > before_window[:, None])
        logits = tl.where(seen[None, :] & near, logits, float("-inf"))
        accumulator, peak, total = update_softmax(
            accumulator, peak, total, logits, tile_values, True
        )

    places = (sequence.to(tl.int64) * num_heads + heads) * num_splits + split
    tl.store(log_sums + places, log_sum_exp(peak, total), mask=in_group)
    tl.store(
        outputs + places[:, None] * HEAD_DIM + dims[None, :],
        accumulator / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=in_group[:, None] & in_head,
    )
