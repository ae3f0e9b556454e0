"""Block selection kernels for prefill: far key blocks of each query block, under `row_peak`.

Four kernels run over a chunk of queries: the maximum index score of every block for every scored query (one
matrix product and a maximum; no exponential per key); the threshold of each query (its mass, times the share);
flags of the blocks that any query of the query block selects; and the block lists.

B sequences, H retrieval heads, T queries, I index_dim (a power of two, at least 16);
M queries of a block, of which every STRIDE-th is scored; N keys of a block, G blocks of a step, R blocks of a
range (the work of one program).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.device_functions import IEEE, LN_2, LOG2_E, finite_maximum, log_sum_exp


@triton.jit
def _num_far_blocks(start, first_query, T, window, M: tl.constexpr, N: tl.constexpr):
    """Blocks with a far key of any query of the query block that begins at query `first_query`."""
    last_position = start + tl.minimum(first_query + M, T) - 1
    return tl.maximum(last_position - window + N, 0) // N


@triton.jit
def _scored_queries(first_query, T, lanes, STRIDE: tl.constexpr):
    """Scored queries of a query block: every STRIDE-th, counted back from the call's last query."""
    return first_query + (T - 1 - first_query) % STRIDE + lanes * STRIDE


@triton.jit
def _larger_of_two(left, right):
    """Elementwise maximum of fp16, packed in pairs: half the instructions."""
    return tl.inline_asm_elementwise(
        "max.f16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _fold_columns(scores, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Folds [LINES, COLUMNS] to [LINES, COLUMNS / 2] by the maximum of both halves."""
    halves = scores.reshape([LINES, 2, COLUMNS // 2]).permute([0, 2, 1])
    left, right = tl.split(halves)
    return _larger_of_two(left, right)


@triton.jit
def _strongest(scores, M: tl.constexpr, G: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr):
    """Maximum of each block: fp32 [M, G] from scores [M, G * N]."""
    lines = scores.reshape([M * G, N])
    if PACKED:
        lines = _fold_columns(lines, M * G, N)
        if N >= 32:
            lines = _fold_columns(lines, M * G, N // 2)
        if N >= 64:
            lines = _fold_columns(lines, M * G, N // 4)
    return tl.max(lines, 1).reshape([M, G]).to(tl.float32)


@triton.jit
def block_maxima_kernel(
    index_queries_ptr, index_keys_ptr, key_heads_ptr, peaks_ptr, sums_ptr,
    windows_ptr, query_starts_ptr, first_slots_ptr,
    T, H, ranges, query_offset, index_dim, num_sinks,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_pb, stride_ph, stride_pt, stride_pn, stride_sb, stride_sh, stride_st, stride_sr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, STRIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, G: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """Block maxima fp16 [B, H, tiles, blocks, lanes], and log2-sum-exp of each range [B, H, tiles, ranges, lanes]."""
    tile, part = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    start = tl.load(query_starts_ptr + sequence)
    first_query = query_offset + tile * M
    first_position = start + first_query
    window = tl.load(windows_ptr + entry)
    num_blocks = _num_far_blocks(start, first_query, T, window, M, N)
    if part * R >= num_blocks:
        return
    slot_shift = tl.load(first_slots_ptr + sequence) if first_slots_ptr is not None else 0
    index_queries_ptr += sequence.to(tl.int64) * stride_qb + entry.to(tl.int64) * stride_qh
    key_head = entry
    if key_heads_ptr is not None:
        key_head = tl.load(key_heads_ptr + entry)
    index_keys_ptr += key_head.to(tl.int64) * stride_kh + sequence.to(tl.int64) * stride_kb
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
    query_indices = _scored_queries(first_query, T, lanes, STRIDE)
    in_index = (dims < index_dim)[None, :]
    queries = tl.load(
        index_queries_ptr + query_indices[:, None].to(tl.int64) * stride_qt + dims[None, :],
        mask=(query_indices < T)[:, None] & in_index,
        other=0.0,
    )
    positions = start + query_indices
    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    # Blocks whose keys are far for every query need no mask.
    whole_from = tl.cdiv(num_sinks, N)
    whole_to = tl.maximum(first_position - window + 1, 0) // N
    for block in tl.range(part * R, tl.minimum(part * R + R, num_blocks), G, num_stages=STAGES):
        columns = block * N + in_step
        offsets = (columns + slot_shift).to(tl.int64) * stride_kt
        keys = tl.load(
            index_keys_ptr + offsets[:, None] + dims[None, :],
            mask=(columns < start + T)[:, None] & in_index,
            other=0.0,
        )
        if PACKED:
            scores = tl.dot(queries, keys.T, out_dtype=tl.float16)
        else:
            scores = tl.dot(queries, keys.T, input_precision=IEEE)
        if (block < whole_from) | (block + G > whole_to):
            far = (columns >= num_sinks)[None, :] & (
                columns[None, :] <= positions[:, None] - window
            )
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
        base = finite_maximum(new_peak)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(strongest - base[:, None]), 1)
        peak = new_peak
    tl.store(sums_ptr + lanes, log_sum_exp(peak, total))


@triton.jit
def thresholds_kernel(
    sums_ptr, lse_ptr, thresholds_ptr, heads_ptr, windows_ptr, query_starts_ptr,
    T, H, query_offset, log_share,
    stride_sb, stride_sh, stride_st, stride_sr, stride_lb, stride_lh,
    STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Smallest index score that selects a block, for each scored query: fp32 [B, H, tiles, lanes]."""
    tile = tl.program_id(0)
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    head = tl.load(heads_ptr + entry)
    window = tl.load(windows_ptr + entry)
    start = tl.load(query_starts_ptr + sequence)
    first_query = query_offset + tile * M
    ranges = tl.cdiv(_num_far_blocks(start, first_query, T, window, M, N), R)
    LANES: tl.constexpr = M // STRIDE
    lanes = tl.arange(0, LANES)
    query_indices = _scored_queries(first_query, T, lanes, STRIDE)
    near = tl.load(
        lse_ptr + sequence.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + query_indices,
        mask=query_indices < T,
        other=float("-inf"),
    )
    peak = near * LOG2_E
    total = tl.where(near == float("-inf"), 0.0, 1.0)
    sums_ptr += sequence.to(tl.int64) * stride_sb + entry * stride_sh + tile * stride_st
    for part in tl.range(0, ranges):
        partial = tl.load(sums_ptr + part * stride_sr + lanes)
        new_peak = tl.maximum(peak, partial)
        base = finite_maximum(new_peak)
        total = total * tl.exp2(peak - base) + tl.exp2(partial - base)
        peak = new_peak
    threshold = (peak + tl.log2(tl.maximum(total, 1e-30))) * LN_2 + log_share
    # Queries outside the sequence or the call select nothing.
    selects = (query_indices < T) & (start + query_indices >= 0)
    threshold = tl.where(selects, threshold, float("inf"))
    tl.store(
        thresholds_ptr
        + (tl.program_id(1) * tl.num_programs(0) + tile).to(tl.int64) * LANES
        + lanes,
        threshold,
    )


@triton.jit
def flags_kernel(
    peaks_ptr, thresholds_ptr, flags_ptr, windows_ptr, query_starts_ptr,
    T, H, ranges, query_offset, blocks, flag_tile, flag_tiles,
    stride_pb, stride_ph, stride_pt, stride_pn,
    LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Flags of the blocks that any query of a query block selects: int8 [B, H, tiles, blocks]."""
    tiles = tl.num_programs(0) // ranges
    tile, part = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    start = tl.load(query_starts_ptr + sequence)
    first_query = query_offset + tile * M
    num_blocks = _num_far_blocks(start, first_query, T, tl.load(windows_ptr + entry), M, N)
    numbers = part * R + tl.arange(0, R)
    lanes = tl.arange(0, LANES)
    thresholds = tl.load(
        thresholds_ptr + (tl.program_id(1) * tiles + tile).to(tl.int64) * LANES + lanes
    )
    peaks_ptr += (
        sequence.to(tl.int64) * stride_pb + entry.to(tl.int64) * stride_ph + tile.to(tl.int64) * stride_pt
    )  # fmt: skip
    in_range = numbers < num_blocks
    peaks = tl.load(
        peaks_ptr + numbers[:, None].to(tl.int64) * stride_pn + lanes[None, :],
        mask=in_range[:, None],
        other=float("-inf"),
    ).to(tl.float32)
    wanted = tl.max(((peaks >= thresholds[None, :]) & (peaks > float("-inf"))).to(tl.int32), 1)
    flags_ptr += (tl.program_id(1) * flag_tiles + flag_tile + tile).to(tl.int64) * blocks
    tl.store(
        flags_ptr + numbers, (wanted * in_range.to(tl.int32)).to(tl.int8), mask=numbers < blocks
    )


@triton.jit
def lists_kernel(
    flags_ptr, lists_ptr, counts_ptr, windows_ptr, query_starts_ptr,
    T, H, query_offset, blocks, width, num_sinks,
    EDGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compacts flags to block lists; an odd last block without mask moves to those with a mask."""
    tile = tl.program_id(0)
    entry, sequence = tl.program_id(1) % H, tl.program_id(1) // H
    start = tl.load(query_starts_ptr + sequence)
    first_query = query_offset + tile * M
    first_position = start + first_query
    window = tl.load(windows_ptr + entry)
    num_blocks = _num_far_blocks(start, first_query, T, window, M, N)
    whole_from = tl.cdiv(num_sinks, N)
    whole_to = tl.maximum(first_position - window + 1, 0) // N
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
