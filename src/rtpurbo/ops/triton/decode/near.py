"""Sinks and window of one query token: a split of the keys, for all query heads of a KV head.

The heads of a group are the rows of a matrix product, so each key is read once; their windows may
differ, because retrieval heads may have another one than local heads.

G query heads read one KV head, R rows hold them (at least 16, which a tensor core wants);
N keys of a tile, D head_dim, E the power of two that holds it; H query heads in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import head_start, row_offsets
from rtpurbo.ops.triton.softmax import fold_tile, log_sum_exp


@triton.jit
def near_slots(entries, query_position, first_slot, num_sinks, widest_window):
    """Positions and slots of the near keys, counted through: first the sinks, then the window."""
    window_start = tl.maximum(query_position - widest_window + 1, num_sinks)
    positions = tl.where(entries < num_sinks, entries, window_start + entries - num_sinks)
    return positions, positions + first_slot


@triton.jit
def attend_split(
    queries,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    block_table,
    table_row,
    labels,
    label_stride,
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
    num_retrieval,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,
):
    """Attention of query heads first_head.. over entries split * SPLIT.. of the near keys.

    In a ring an entry is a slot, and `labels` int64 [B, slots] tells its position. Elsewhere entries
    are counted as `near_slots` does. `scale` gives logits in powers of two.

    Writes `log_sums` [B, H, splits], to base 2, and `outputs` [B, H, splits, D].
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, WIDTH)
    in_row = dims[None, :] < HEAD_DIM
    heads = first_head + rows
    in_group = rows < GROUP
    query_rows = tl.load(
        queries
        + sequence.to(tl.int64) * query_strides[0]
        + heads.to(tl.int64)[:, None] * query_strides[1]
        + dims[None, :],
        mask=in_group[:, None] & in_row,
        other=0.0,
    )
    if RING:
        windows = rows * 0 + sliding_window
    else:
        ranks = tl.arange(0, RETRIEVAL_WIDTH)
        retrieving = tl.load(retrieval_heads + ranks, mask=ranks < num_retrieval, other=-1)
        retrieves = tl.max((heads[:, None] == retrieving[None, :]).to(tl.int32), 1) > 0
        windows = tl.where(retrieves, near_window, sliding_window)
    before_window = query_position - windows

    keys = head_start(keys, sequence, key_value_head, key_strides, PAGE_SIZE)
    values = head_start(values, sequence, key_value_head, value_strides, PAGE_SIZE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    first_entry = split * SPLIT
    # A split beyond the keys in use does nothing, and so writes an empty result.
    num_tiles = tl.maximum(0, tl.cdiv(tl.minimum(num_entries - first_entry, SPLIT), TILE))
    for tile in range(num_tiles):
        entries = first_entry + tile * TILE + tl.arange(0, TILE)
        in_use = entries < num_entries
        if RING:
            slots = entries
            positions = tl.load(
                labels + sequence.to(tl.int64) * label_stride + entries, mask=in_use, other=-1
            ).to(tl.int32)
        else:
            positions, slots = near_slots(
                entries, query_position, first_slot, num_sinks, widest_window
            )
        seen = in_use & (positions >= 0) & (positions <= query_position)
        loaded = seen[:, None] & in_row
        key_rows = row_offsets(slots, seen, key_strides, block_table, table_row, PAGE_SIZE)
        value_rows = row_offsets(slots, seen, value_strides, block_table, table_row, PAGE_SIZE)
        tile_keys = tl.load(keys + key_rows[:, None] + dims[None, :], mask=loaded, other=0.0)
        tile_values = tl.load(values + value_rows[:, None] + dims[None, :], mask=loaded, other=0.0)
        logits = tl.dot(query_rows, tile_keys.T, input_precision="ieee") * scale
        near = (positions < num_sinks)[None, :] | (positions[None, :] > before_window[:, None])
        logits = tl.where(seen[None, :] & near, logits, float("-inf"))
        accumulator, peak, total = fold_tile(accumulator, peak, total, logits, tile_values, True)

    places = (sequence.to(tl.int64) * num_heads + heads) * num_splits + split
    tl.store(log_sums + places, log_sum_exp(peak, total), mask=in_group)
    tl.store(
        outputs + places[:, None] * HEAD_DIM + dims[None, :],
        accumulator / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=in_group[:, None] & in_row,
    )
