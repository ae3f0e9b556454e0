"""Attention of many query rows: sinks and window of each head, then blocks from a list.

One program holds the queries of one tile of rows of one head and walks over tiles of keys. Places
are *positions*; `first_slots` turns them into slots of the tensors, so left padding and a chunk
behind a ring are the plain case with an offset.

B sequences, H heads in the table, T query rows, D head_dim (a power of two at least as large);
M rows of a tile, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import head_start, place_of, row_offsets
from rtpurbo.ops.triton.softmax import LN_2, LOG2_E, fold_tile, log_sum_exp


@triton.jit
def _load_queries(descriptor, sequence, head, row, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] of one head; zero outside the tensor."""
    return descriptor.load([sequence, head, row, 0]).reshape([ROWS, D])


@triton.jit
def _load_tile(
    states, strides, block_table, table_stride, sequence, head, slot, length, head_dim,
    ROWS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] of one head from a slot on; zero outside. States are a descriptor, or in pages."""
    if PAGE_SIZE == 0:
        tile = states.load([sequence, head, slot, 0]).reshape([ROWS, D])
    else:
        slots, dims = slot + tl.arange(0, ROWS), tl.arange(0, D)
        held = (slots >= 0) & (slots < length)
        offsets = row_offsets(slots, held, strides, block_table, sequence * table_stride, PAGE_SIZE)
        rows = head_start(states, sequence, head, strides, PAGE_SIZE) + offsets
        loaded = held[:, None] & (dims < head_dim)[None, :]
        tile = tl.load(rows[:, None] + dims[None, :], mask=loaded, other=0.0)
    return tile


@triton.jit
def _add_tile(
    accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
    block_table, table_stride, sequence, key_value_head, start, shift, length, head_dim,
    lowest, highest, scale,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Adds N keys from a position on; if MASKED, row i sees those from lowest[i] to highest[i]."""
    keys = _load_tile(
        key_states, key_strides, block_table, table_stride, sequence, key_value_head,
        start + shift, length, head_dim, N, D, PAGE_SIZE,
    )  # fmt: skip
    scores = tl.dot(queries, keys.T, input_precision="ieee") * scale
    values = _load_tile(
        value_states, value_strides, block_table, table_stride, sequence, key_value_head,
        start + shift, length, head_dim, N, D, PAGE_SIZE,
    )  # fmt: skip
    if MASKED:
        columns = start + tl.arange(0, N)
        visible = (columns[None, :] >= lowest[:, None]) & (columns[None, :] <= highest[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return fold_tile(accumulator, peak, total, scores, values, MASKED)


@triton.jit
def _store(
    output_ptr, lse_ptr, accumulator, peak, total, in_call, head_dim,
    stride_t, stride_d, row_offsets, lse_offsets, D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Writes a tile's output and its natural log-sum-exp; blind rows get 0 and minus infinity."""
    dims = tl.arange(0, D)
    output = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output_ptr + row_offsets[:, None] * stride_t + dims[None, :] * stride_d,
        output.to(output_ptr.dtype.element_ty),
        mask=in_call[:, None] & (dims < head_dim)[None, :],
    )
    if HAS_LSE:
        tl.store(lse_ptr + lse_offsets, log_sum_exp(peak, total) * LN_2, mask=in_call)


@triton.jit
def window_kernel(
    query_descriptor, key_states, key_strides, value_states, value_strides, block_table, table_stride,
    output_ptr, lse_ptr,
    heads_ptr, key_value_heads_ptr, windows_ptr, query_starts_ptr, first_slots_ptr, sink_slots_ptr,
    T, H, num_dense, head_dim, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_od, stride_lb, stride_lh,
    HAS_SLOTS: tl.constexpr, HAS_LSE: tl.constexpr, PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sinks and window of one tile of rows of one head; `portable` says what each argument means."""
    program, sequence = tl.program_id(0), tl.program_id(1)
    entry, tile = place_of(program, tl.cdiv(T, M), H, num_dense)
    head = tl.load(heads_ptr + entry)
    key_value_head = tl.load(key_value_heads_ptr + entry)
    window = tl.load(windows_ptr + entry)
    query_start = tl.load(query_starts_ptr + sequence)
    first_row, length = query_start + tile * M, query_start + T
    slot_shift = tl.load(first_slots_ptr + sequence) if HAS_SLOTS else 0
    sink_shift = tl.load(sink_slots_ptr + sequence) if HAS_SLOTS else 0

    queries = _load_queries(query_descriptor, sequence, head, tile * M, M, D)
    rows = first_row + tl.arange(0, M)
    lowest = tl.maximum(rows - window + 1, num_sinks)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    accumulator = tl.zeros([M, D], tl.float32)

    # Interior tiles, in which every row sees every key, end where the tile's own rows begin.
    all_see_from = tl.maximum(first_row + M - window, num_sinks)
    interior = first_row - tl.maximum((first_row - all_see_from) // N, 0) * N
    first_seen = tl.maximum(first_row - window + 1, num_sinks)
    edge = interior - tl.cdiv(tl.maximum(interior - first_seen, 0), N) * N

    for start in tl.range(first_row, first_row + M, N, num_stages=1):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
            block_table, table_stride, sequence, key_value_head, start, slot_shift, length, head_dim,
            lowest, rows, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    for start in tl.range(edge, interior, N, num_stages=1):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
            block_table, table_stride, sequence, key_value_head, start, slot_shift, length, head_dim,
            lowest, rows, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    first_key = tl.zeros([M], tl.int32)
    last_sink = tl.minimum(rows, num_sinks - 1)
    for start in tl.range(0, num_sinks, N, num_stages=1):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
            block_table, table_stride, sequence, key_value_head, start, sink_shift, length, head_dim,
            first_key, last_sink, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    for start in tl.range(interior, first_row, N, num_stages=STAGES):
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
            block_table, table_stride, sequence, key_value_head, start, slot_shift, length, head_dim,
            lowest, rows, scale, False, N, D, PAGE_SIZE,
        )  # fmt: skip

    call_rows = (tile * M + tl.arange(0, M)).to(tl.int64)
    _store(
        output_ptr + sequence.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh,
        lse_ptr + sequence.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh,
        accumulator, peak, total, call_rows < T, head_dim,
        stride_ot, stride_od, call_rows, call_rows, D, HAS_LSE,
    )  # fmt: skip


@triton.jit
def listed_kernel(
    query_descriptor, key_states, key_strides, value_states, value_strides, block_table, table_stride,
    output_ptr, lse_ptr,
    heads_ptr, key_value_heads_ptr, windows_ptr, query_starts_ptr, first_slots_ptr,
    blocks_ptr, counts_ptr,
    T, H, row_offset, head_dim, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_od, stride_lb, stride_lh,
    stride_bb, stride_bh, stride_bt, stride_cb, stride_ch, stride_ct,
    HAS_SLOTS: tl.constexpr, PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Far keys of listed blocks, added to what the near keys gave a tile of rows of one head."""
    program, sequence = tl.program_id(0), tl.program_id(1)
    entry, tile = place_of(program, tl.num_programs(0) // H, H, 0)
    head = tl.load(heads_ptr + entry)
    key_value_head = tl.load(key_value_heads_ptr + entry)
    window = tl.load(windows_ptr + entry)
    first_call_row = row_offset + tile * M
    query_start = tl.load(query_starts_ptr + sequence)
    first_row, length = query_start + first_call_row, query_start + T
    slot_shift = tl.load(first_slots_ptr + sequence) if HAS_SLOTS else 0
    blocks_ptr += (
        sequence.to(tl.int64) * stride_bb + entry.to(tl.int64) * stride_bh + tile * stride_bt
    )
    counts_ptr += sequence * stride_cb + entry * stride_ch + tile * stride_ct
    num_edge, num_whole = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    if num_edge + num_whole == 0:
        return

    # The near keys' result is where the softmax goes on from.
    output_ptr += sequence.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    lse_ptr += sequence.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    call_rows = (first_call_row + tl.arange(0, M)).to(tl.int64)
    in_call = call_rows < T
    dims = tl.arange(0, D)
    accumulator = tl.load(
        output_ptr + call_rows[:, None] * stride_ot + dims[None, :] * stride_od,
        mask=in_call[:, None] & (dims < head_dim)[None, :],
        other=0.0,
    ).to(tl.float32)
    peak = tl.load(lse_ptr + call_rows, mask=in_call, other=float("-inf")) * LOG2_E
    total = tl.where(peak == float("-inf"), 0.0, 1.0)

    queries = _load_queries(query_descriptor, sequence, head, first_call_row, M, D)
    rows = first_row + tl.arange(0, M)
    lowest = tl.zeros([M], tl.int32) + num_sinks
    highest = rows - window
    for i in tl.range(0, num_edge, num_stages=1):
        start = tl.load(blocks_ptr + i) * N
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
            block_table, table_stride, sequence, key_value_head, start, slot_shift, length, head_dim,
            lowest, highest, scale, True, N, D, PAGE_SIZE,
        )  # fmt: skip
    for i in tl.range(EDGE, EDGE + num_whole, num_stages=STAGES):
        start = tl.load(blocks_ptr + i) * N
        accumulator, peak, total = _add_tile(
            accumulator, peak, total, queries, key_states, key_strides, value_states, value_strides,
            block_table, table_stride, sequence, key_value_head, start, slot_shift, length, head_dim,
            lowest, highest, scale, False, N, D, PAGE_SIZE,
        )  # fmt: skip
    _store(
        output_ptr, lse_ptr, accumulator, peak, total, in_call, head_dim,
        stride_ot, stride_od, call_rows, call_rows, D, True,
    )  # fmt: skip
