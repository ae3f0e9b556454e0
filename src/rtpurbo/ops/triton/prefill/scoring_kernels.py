"""Which blocks of far keys a tile of query rows reads: the rule `row_peak`, on the device.

Four small steps, over a chunk of rows whose scratch fits: the strongest index score of every block
for every row (one matrix product and a maximum; no exponential for a key); what each row must see to
count (its mass, times the share); which blocks any row of the tile wants; and the lists of those.

B sequences, H retrieval heads, T query rows, I index_dim (a power of two, at least 16);
M rows of a tile, of which every STRIDE-th is asked; N keys of a block, G blocks of a step, R blocks
of a range (what one program walks over).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import head_start, row_offsets
from rtpurbo.ops.triton.softmax import LN_2, LOG2_E, log_sum_exp, measured_from


@triton.jit
def _num_far_blocks(start, call_row, T, window, M: tl.constexpr, N: tl.constexpr):
    """Blocks in which some row of the tile that begins at row `call_row` has a far key."""
    last_row = start + tl.minimum(call_row + M, T) - 1
    return tl.maximum(last_row - window + N, 0) // N


@triton.jit
def _scored_rows(call_row, T, lanes, STRIDE: tl.constexpr):
    """Rows of a tile that are asked: every so many, counted back from the last row of the call."""
    return call_row + (T - 1 - call_row) % STRIDE + lanes * STRIDE


@triton.jit
def _larger_of_two(left, right):
    """Elementwise maximum of fp16, two at a time: half the instructions."""
    return tl.inline_asm_elementwise(
        "max.f16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _fold_columns(scores, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """[LINES, COLUMNS] to [LINES, COLUMNS / 2]: the larger of the left and the right half."""
    halves = scores.reshape([LINES, 2, COLUMNS // 2]).permute([0, 2, 1])
    left, right = tl.split(halves)
    return _larger_of_two(left, right)


@triton.jit
def _strongest(scores, M: tl.constexpr, G: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr):
    """Maximum of each block: fp32 [M, G] of scores [M, G * N]."""
    lines = scores.reshape([M * G, N])
    if PACKED:
        lines = _fold_columns(lines, M * G, N)
        if N >= 32:
            lines = _fold_columns(lines, M * G, N // 2)
        if N >= 64:
            lines = _fold_columns(lines, M * G, N // 4)
    return tl.max(lines, 1).reshape([M, G]).to(tl.float32)


@triton.jit
def peaks_kernel(
    index_queries_ptr, index_keys, index_strides, key_heads_ptr, block_table, table_stride, peaks_ptr, sums_ptr,
    windows_ptr, query_starts_ptr, first_slots_ptr,
    T, H, ranges, row_offset, index_dim, num_sinks,
    stride_qb, stride_qh, stride_qt,
    stride_pb, stride_ph, stride_pt, stride_pn, stride_sb, stride_sh, stride_st, stride_sr,
    HAS_SLOTS: tl.constexpr, PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr, STRIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, G: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Peaks fp16 [B, H, tiles, blocks, rows], and each range's log2 of summed peaks [.., ranges, rows]."""
    tile, part = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    start = tl.load(query_starts_ptr + sequence)
    call_row = row_offset + tile * M
    first_row = start + call_row
    window = tl.load(windows_ptr + entry)
    num_blocks = _num_far_blocks(start, call_row, T, window, M, N)
    if part * R >= num_blocks:
        return
    slot_shift = tl.load(first_slots_ptr + sequence) if HAS_SLOTS else 0
    index_queries_ptr += sequence.to(tl.int64) * stride_qb + entry.to(tl.int64) * stride_qh
    key_head = entry
    if key_heads_ptr is not None:
        key_head = tl.load(key_heads_ptr + entry)
    index_keys = head_start(index_keys, sequence, key_head, index_strides, PAGE_SIZE)
    peaks_ptr += (
        sequence.to(tl.int64) * stride_pb + entry.to(tl.int64) * stride_ph + tile.to(tl.int64) * stride_pt
    )  # fmt: skip
    sums_ptr += (
        sequence.to(tl.int64) * stride_sb + entry * stride_sh + tile * stride_st + part * stride_sr
    )

    LANES: tl.constexpr = M // STRIDE
    lanes, dims, in_step, group = (
        tl.arange(0, LANES),
        tl.arange(0, I),
        tl.arange(0, G * N),
        tl.arange(0, G),
    )
    call_rows = _scored_rows(call_row, T, lanes, STRIDE)
    in_index = (dims < index_dim)[None, :]
    queries = tl.load(
        index_queries_ptr + call_rows[:, None].to(tl.int64) * stride_qt + dims[None, :],
        mask=(call_rows < T)[:, None] & in_index,
        other=0.0,
    )
    rows = start + call_rows
    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    # Blocks whose keys are far for every row need no mask.
    whole_from = tl.cdiv(num_sinks, N)
    whole_to = tl.maximum(first_row - window + 1, 0) // N
    for block in tl.range(part * R, tl.minimum(part * R + R, num_blocks), G, num_stages=STAGES):
        columns = block * N + in_step
        slots = columns + slot_shift
        held = columns < start + T
        offsets = row_offsets(
            slots, held, index_strides, block_table, sequence * table_stride, PAGE_SIZE
        )
        keys = tl.load(
            index_keys + offsets[:, None] + dims[None, :],
            mask=held[:, None] & in_index,
            other=0.0,
        )
        if PACKED:
            scores = tl.dot(queries, keys.T, out_dtype=tl.float16)
        else:
            scores = tl.dot(queries, keys.T, input_precision="ieee")
        if (block < whole_from) | (block + G > whole_to):
            far = (columns >= num_sinks)[None, :] & (columns[None, :] <= rows[:, None] - window)
            scores = tl.where(far, scores, float("-inf")).to(scores.dtype)
        strongest = _strongest(scores, LANES, G, N, PACKED)
        numbers = block + group
        tl.store(
            peaks_ptr + numbers[None, :].to(tl.int64) * stride_pn + lanes[:, None],
            strongest.to(tl.float16),
            mask=(numbers < num_blocks)[None, :],
        )
        strongest *= LOG2_E
        new_peak = tl.maximum(peak, tl.max(strongest, 1))
        base = measured_from(new_peak)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(strongest - base[:, None]), 1)
        peak = new_peak
    tl.store(sums_ptr + lanes, log_sum_exp(peak, total))


@triton.jit
def bars_kernel(
    sums_ptr, lse_ptr, bars_ptr, heads_ptr, windows_ptr, query_starts_ptr,
    T, H, row_offset, log_share,
    stride_sb, stride_sh, stride_st, stride_sr, stride_lb, stride_lh,
    STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The least index score that counts for each row that is asked, fp32 [B, H, tiles, rows]."""
    tile = tl.program_id(0)
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    head = tl.load(heads_ptr + entry)
    window = tl.load(windows_ptr + entry)
    start = tl.load(query_starts_ptr + sequence)
    call_row = row_offset + tile * M
    ranges = tl.cdiv(_num_far_blocks(start, call_row, T, window, M, N), R)
    LANES: tl.constexpr = M // STRIDE
    lanes = tl.arange(0, LANES)
    call_rows = _scored_rows(call_row, T, lanes, STRIDE)
    near = tl.load(
        lse_ptr + sequence.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + call_rows,
        mask=call_rows < T,
        other=float("-inf"),
    )
    peak = near * LOG2_E
    total = tl.where(near == float("-inf"), 0.0, 1.0)
    sums_ptr += sequence.to(tl.int64) * stride_sb + entry * stride_sh + tile * stride_st
    for part in tl.range(0, ranges):
        partial = tl.load(sums_ptr + part * stride_sr + lanes)
        new_peak = tl.maximum(peak, partial)
        base = measured_from(new_peak)
        total = total * tl.exp2(peak - base) + tl.exp2(partial - base)
        peak = new_peak
    bar = (peak + tl.log2(tl.maximum(total, 1e-30))) * LN_2 + log_share
    # Rows outside the sequence or the call want nothing.
    wants = (call_rows < T) & (start + call_rows >= 0)
    bar = tl.where(wants, bar, float("inf"))
    tl.store(
        bars_ptr + (tl.program_id(1) * tl.num_programs(0) + tile).to(tl.int64) * LANES + lanes, bar
    )


@triton.jit
def flags_kernel(
    peaks_ptr, bars_ptr, flags_ptr, windows_ptr, query_starts_ptr,
    T, H, ranges, row_offset, blocks, flag_tile, flag_tiles,
    stride_pb, stride_ph, stride_pt, stride_pn,
    LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Whether any row of a tile wants a block: int8 [B, H, tiles, blocks]."""
    tiles = tl.num_programs(0) // ranges
    tile, part = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    start = tl.load(query_starts_ptr + sequence)
    call_row = row_offset + tile * M
    num_blocks = _num_far_blocks(start, call_row, T, tl.load(windows_ptr + entry), M, N)
    numbers = part * R + tl.arange(0, R)
    lanes = tl.arange(0, LANES)
    bars = tl.load(bars_ptr + (tl.program_id(1) * tiles + tile).to(tl.int64) * LANES + lanes)
    peaks_ptr += (
        sequence.to(tl.int64) * stride_pb + entry.to(tl.int64) * stride_ph + tile.to(tl.int64) * stride_pt
    )  # fmt: skip
    exist = numbers < num_blocks
    peaks = tl.load(
        peaks_ptr + numbers[:, None].to(tl.int64) * stride_pn + lanes[None, :],
        mask=exist[:, None],
        other=float("-inf"),
    ).to(tl.float32)
    wanted = tl.max(((peaks >= bars[None, :]) & (peaks > float("-inf"))).to(tl.int32), 1)
    flags_ptr += (tl.program_id(1) * flag_tiles + flag_tile + tile).to(tl.int64) * blocks
    tl.store(flags_ptr + numbers, (wanted * exist.to(tl.int32)).to(tl.int8), mask=numbers < blocks)


@triton.jit
def lists_kernel(
    flags_ptr, lists_ptr, counts_ptr, windows_ptr, query_starts_ptr,
    T, H, row_offset, blocks, width, num_sinks,
    EDGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """From flags to lists; an odd one of the blocks without mask moves to those with one."""
    tile = tl.program_id(0)
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    start = tl.load(query_starts_ptr + sequence)
    call_row = row_offset + tile * M
    first_row = start + call_row
    window = tl.load(windows_ptr + entry)
    num_blocks = _num_far_blocks(start, call_row, T, window, M, N)
    whole_from = tl.cdiv(num_sinks, N)
    whole_to = tl.maximum(first_row - window + 1, 0) // N
    line = (tl.program_id(1) * tl.num_programs(0) + tile).to(tl.int64)
    flags_ptr += line * blocks
    lists_ptr += line * width
    num_edge = tl.full([], 0, tl.int32)
    num_whole = tl.full([], 0, tl.int32)
    newest = tl.full([], 0, tl.int32)
    for chunk in tl.range(0, num_blocks, C):
        numbers = chunk + tl.arange(0, C)
        wanted = tl.load(flags_ptr + numbers, mask=numbers < num_blocks, other=0) > 0
        whole = wanted & (numbers >= whole_from) & (numbers < whole_to)
        edge = (wanted & ((numbers < whole_from) | (numbers >= whole_to))).to(tl.int32)
        whole_count = whole.to(tl.int32)
        tl.store(
            lists_ptr + EDGE + num_whole + tl.cumsum(whole_count, 0) - whole_count, numbers, mask=whole
        )  # fmt: skip
        tl.store(lists_ptr + num_edge + tl.cumsum(edge, 0) - edge, numbers, mask=edge > 0)
        newest = tl.maximum(newest, tl.max(tl.where(whole, numbers, 0), 0))
        num_whole += tl.sum(whole_count, 0)
        num_edge += tl.sum(edge, 0)
    odd = num_whole % 2
    tl.store(lists_ptr + num_edge, newest, mask=odd > 0)
    tl.store(counts_ptr + line * 2, num_edge + odd)
    tl.store(counts_ptr + line * 2 + 1, num_whole - odd)
