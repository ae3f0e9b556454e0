"""Prefill kernels: window attention of each head, then block-sparse attention over block lists.

One program holds a block of queries of one head and iterates over tiles of keys. Keys are addressed by
position; `first_slots` maps positions to slots, so that left padding and a chunk after a ring buffer are the
plain case with an offset.

B sequences, H heads in the table, T queries, D head_dim (padded to a power of two);
M queries of a block, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.device_functions import (
    IEEE,
    LN_2,
    LOG2_E,
    head_and_block,
    head_start,
    log_sum_exp,
    slot_offsets,
    update_softmax,
)


@triton.jit
def _load_tile(
    states, strides, place, slot, first, end, N: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """States [N, D] of one head from `slot` on; zero outside. `states` is a descriptor, or pages (also of float8).

    `place` is (sequence, KV head, head_dim, block table, table stride). Pages are read from slot `first` up to `end`,
    exclusive: between sinks and window, those of a windowed head may belong to another sequence by now.
    """
    sequence, head, head_dim, block_table, table_stride = place
    if PAGE_SIZE == 0:
        tile = states.load([sequence, head, slot, 0]).reshape([N, D])
    else:
        slots, dims = slot + tl.arange(0, N), tl.arange(0, D)
        in_use = (slots >= first) & (slots < end)
        offsets = slot_offsets(
            slots, in_use, strides, block_table, sequence * table_stride, PAGE_SIZE
        )
        pointers = head_start(states, sequence, head, strides, PAGE_SIZE) + offsets
        loaded = in_use[:, None] & (dims < head_dim)[None, :]
        tile = tl.load(pointers[:, None] + dims[None, :], mask=loaded, other=0.0)
    return tile


@triton.jit
def _add_tile(
    accumulator, peak, total, queries, keys, values, place, start, slots, lowest, highest, scale,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Adds N keys from position `start` on; if MASKED, query i sees positions lowest[i] to highest[i].

    `keys` and `values` are states with their strides, and `slots` the slot of position 0, and the first and the end of
    the slots that pages are read from; see `_load_tile`.
    """
    shift, first, end = slots
    tile_keys = _load_tile(keys[0], keys[1], place, start + shift, first, end, N, D, PAGE_SIZE)
    scores = tl.dot(queries, tile_keys.to(queries.dtype).T, input_precision=IEEE) * scale
    tile_values = _load_tile(
        values[0], values[1], place, start + shift, first, end, N, D, PAGE_SIZE
    ).to(queries.dtype)
    if MASKED:
        columns = start + tl.arange(0, N)
        visible = (columns[None, :] >= lowest[:, None]) & (columns[None, :] <= highest[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return update_softmax(accumulator, peak, total, scores, tile_values, MASKED)


@triton.jit
def _store(
    output_ptr, lse_ptr, accumulator, peak, total, in_call, head_dim,
    stride_t, stride_d, query_indices, D: tl.constexpr,
):  # fmt: skip
    """Writes a block's output and natural log-sum-exp; queries without keys get 0 and minus infinity."""
    dims = tl.arange(0, D)
    output = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output_ptr + query_indices[:, None] * stride_t + dims[None, :] * stride_d,
        output.to(output_ptr.dtype.element_ty),
        mask=in_call[:, None] & (dims < head_dim)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + query_indices, log_sum_exp(peak, total) * LN_2, mask=in_call)


@triton.jit
def window_kernel(
    query_descriptor, key_states, key_strides, value_states, value_strides, block_table, table_stride,
    output_ptr, lse_ptr,
    heads_ptr, key_value_heads_ptr, windows_ptr, query_starts_ptr, first_slots_ptr, sink_slots_ptr,
    query_offsets_ptr, query_counts_ptr,
    T, H, num_dense, head_dim, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_od, stride_lb, stride_lh,
    PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Window attention (sinks and window) of one query block of one head; arguments as in `portable`.

    With `query_counts_ptr`, queries of all sequences are packed along one dimension: a sequence has its count of
    them, at most T, from its offset on.
    """
    program, sequence = tl.program_id(0), tl.program_id(1)
    entry, tile = head_and_block(program, tl.cdiv(T, M), H, num_dense)
    num_queries, query_offset, batch = T, 0, sequence
    if query_counts_ptr is not None:
        num_queries = tl.load(query_counts_ptr + sequence)
        query_offset = tl.load(query_offsets_ptr + sequence)
        batch = sequence * 0
        if tile * M >= num_queries:
            return
    head = tl.load(heads_ptr + entry)
    key_value_head = tl.load(key_value_heads_ptr + entry)
    window = tl.load(windows_ptr + entry)
    query_start = tl.load(query_starts_ptr + sequence)
    first_position, length = query_start + tile * M, query_start + num_queries
    slot_shift = tl.load(first_slots_ptr + sequence) if first_slots_ptr is not None else 0
    sink_shift = tl.load(sink_slots_ptr + sequence) if sink_slots_ptr is not None else 0

    keys, values = (key_states, key_strides), (value_states, value_strides)
    place = (sequence, key_value_head, head_dim, block_table, table_stride)
    queries = query_descriptor.load([batch, head, query_offset + tile * M, 0]).reshape([M, D])
    positions = first_position + tl.arange(0, M)
    lowest = tl.maximum(positions - window + 1, num_sinks)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    accumulator = tl.zeros([M, D], tl.float32)

    # Interior tiles, where every query sees every key, end at the block's own positions.
    all_see_from = tl.maximum(first_position + M - window, num_sinks)
    interior = first_position - tl.maximum((first_position - all_see_from) // N, 0) * N
    first_seen = tl.maximum(first_position - window + 1, num_sinks)
    edge = interior - tl.cdiv(tl.maximum(interior - first_seen, 0), N) * N
    window_slots = (slot_shift, first_seen, length)

    for start in tl.range(first_position, first_position + M, N, num_stages=1):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, keys, values, place, start, window_slots,
            lowest, positions, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    for start in tl.range(edge, interior, N, num_stages=1):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, keys, values, place, start, window_slots,
            lowest, positions, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    first_key = tl.zeros([M], tl.int32)
    last_sink = tl.minimum(positions, num_sinks - 1)
    sink_slots = (sink_shift, 0, tl.minimum(length, num_sinks))
    for start in tl.range(0, num_sinks, N, num_stages=1):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, keys, values, place, start, sink_slots,
            first_key, last_sink, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    for start in tl.range(interior, first_position, N, num_stages=STAGES):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, keys, values, place, start, window_slots,
            lowest, positions, scale, False, N, D, PAGE_SIZE,
        )  # fmt: skip

    query_indices = (tile * M + tl.arange(0, M)).to(tl.int64)
    output_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    if query_counts_ptr is not None:
        output_ptr += tl.cast(query_offset, tl.int64) * stride_ot
    if lse_ptr is not None:
        lse_ptr += batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + query_offset
    _store(
        output_ptr, lse_ptr, accumulator, peak, total, query_indices < num_queries, head_dim,
        stride_ot, stride_od, query_indices, D,
    )  # fmt: skip


@triton.jit
def block_sparse_kernel(
    query_descriptor, key_descriptor, value_descriptor, output_ptr, lse_ptr,
    heads_ptr, key_value_heads_ptr, windows_ptr, query_starts_ptr, first_slots_ptr,
    blocks_ptr, counts_ptr,
    T, H, query_offset, head_dim, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_od, stride_lb, stride_lh,
    stride_bb, stride_bh, stride_bt, stride_cb, stride_ch, stride_ct,
    STAGES: tl.constexpr, EDGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Block-sparse attention over listed far keys, added to the window attention of one query block."""
    program, sequence = tl.program_id(0), tl.program_id(1)
    entry, tile = head_and_block(program, tl.num_programs(0) // H, H, 0)
    head = tl.load(heads_ptr + entry)
    key_value_head = tl.load(key_value_heads_ptr + entry)
    window = tl.load(windows_ptr + entry)
    first_query = query_offset + tile * M
    first_position = tl.load(query_starts_ptr + sequence) + first_query
    slot_shift = tl.load(first_slots_ptr + sequence) if first_slots_ptr is not None else 0
    blocks_ptr += (
        sequence.to(tl.int64) * stride_bb + entry.to(tl.int64) * stride_bh + tile * stride_bt
    )
    counts_ptr += sequence * stride_cb + entry * stride_ch + tile * stride_ct
    num_edge, num_whole = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    if num_edge + num_whole == 0:
        return

    # The online softmax continues from the result of window attention.
    output_ptr += sequence.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    lse_ptr += sequence.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    query_indices = (first_query + tl.arange(0, M)).to(tl.int64)
    in_call = query_indices < T
    dims = tl.arange(0, D)
    accumulator = tl.load(
        output_ptr + query_indices[:, None] * stride_ot + dims[None, :] * stride_od,
        mask=in_call[:, None] & (dims < head_dim)[None, :],
        other=0.0,
    ).to(tl.float32)
    peak = tl.load(lse_ptr + query_indices, mask=in_call, other=float("-inf")) * LOG2_E
    total = tl.where(peak == float("-inf"), 0.0, 1.0)

    keys, values = (key_descriptor, None), (value_descriptor, None)
    place = (sequence, key_value_head, head_dim, None, 0)
    slots = (slot_shift, 0, 0)
    queries = query_descriptor.load([sequence, head, first_query, 0]).reshape([M, D])
    positions = first_position + tl.arange(0, M)
    lowest = tl.zeros([M], tl.int32) + num_sinks
    highest = positions - window
    for i in tl.range(0, num_edge, num_stages=1):
        start = tl.load(blocks_ptr + i) * N
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, keys, values, place, start, slots,
            lowest, highest, scale, True, N, D, 0,
        )  # fmt: skip
    for i in tl.range(EDGE, EDGE + num_whole, num_stages=STAGES):
        start = tl.load(blocks_ptr + i) * N
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, keys, values, place, start, slots,
            lowest, highest, scale, False, N, D, 0,
        )  # fmt: skip
    _store(
        output_ptr, lse_ptr, accumulator, peak, total, in_call, head_dim,
        stride_ot, stride_od, query_indices, D,
    )  # fmt: skip
