"""Functions that the kernels share: addresses of keys and values, query blocks, and the online softmax.

Keys and values are in one tensor or in pages. Strides are (outer, head, slot), where the outer dimension is that of
sequences, or of pages if PAGE_SIZE is not 0. Offsets have 64 bits: a million tokens of 32 heads of 128 exceed 32 bits.

The online softmax has a running maximum (peak), a running sum of exponentials (total) and weighted values. Scores and
peaks are to base 2, like the GPU's exponential.

B sequences, S sinks, W keys of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
IEEE = tl.constexpr("ieee")
"""`input_precision` of every product in attention and index scores: without it, Triton multiplies float32 inputs
as TF32 on a GPU. It does not affect half precision."""


@triton.jit
def sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE: tl.constexpr):
    """Position of the query, the last token (-1 without tokens), and slot of position 0.

    `lengths` are the slots in use, int32 [1], or [B] with pages; None if all of `capacity` are in use.
    """
    length = capacity
    if lengths is not None:
        length = tl.load(lengths if PAGE_SIZE == 0 else lengths + sequence)
    first_slot = sequence * 0
    if first_slots is not None:
        first_slot = tl.load(first_slots + sequence)
    return length - 1 - first_slot, first_slot


@triton.jit
def head_start(states, sequence, head, strides, PAGE_SIZE: tl.constexpr):
    """Pointer to the first slot of a head of a sequence; with pages, of the head in page 0."""
    start = states + head.to(tl.int64) * strides[1]
    if PAGE_SIZE == 0:
        start += sequence.to(tl.int64) * strides[0]
    return start


@triton.jit
def slot_offsets(slots, valid, strides, block_table, table_row, PAGE_SIZE: tl.constexpr):
    """Offsets of slots from `head_start`; `table_row` is the offset of the sequence's block table."""
    if PAGE_SIZE == 0:
        offsets = slots.to(tl.int64) * strides[2]
    else:
        pages = tl.load(block_table + table_row + slots // PAGE_SIZE, mask=valid, other=0)
        offsets = pages.to(tl.int64) * strides[0] + (slots % PAGE_SIZE) * strides[2]
    return offsets


@triton.jit
def candidate_range(query_position, num_sinks, near_window, WHOLE: tl.constexpr):
    """First and last position that is scored: the far keys, or all keys if WHOLE (reading `paper`)."""
    if WHOLE:
        first, last = query_position * 0, query_position
    else:
        first, last = query_position * 0 + num_sinks, query_position - near_window
    return first, last


@triton.jit
def head_and_block(program, tiles, num_heads, num_dense):
    """Head (entry of the table) and query block of a program of a prefill kernel.

    Query blocks with most keys come first. Programs of windowed heads alternate between heads, so that the
    heads of a group share keys in the L2 cache. Dense heads come first, one after the other: programs that
    run at the same time then read the same keys, which would not fit in the L2 cache otherwise.
    """
    is_dense = program < num_dense * tiles
    turn = tl.where(is_dense, program, program - num_dense * tiles)
    others = tl.maximum(num_heads - num_dense, 1)
    entry = tl.where(is_dense, turn // tiles, num_dense + turn % others)
    tile = tl.where(is_dense, turn % tiles, turn // others)
    return entry, tiles - 1 - tile


@triton.jit
def finite_maximum(peak):
    """Maximum to subtract in exponents: the peak, or 0 without keys so far."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def update_softmax(accumulator, peak, total, scores, values, MASKED: tl.constexpr):
    """Adds a tile of scores [M, N] and values [N, D] to the online softmax of M queries.

    Without a mask every query has a key, so the peak is finite.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = finite_maximum(new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision=IEEE)
    return accumulator, new_peak, total


@triton.jit
def update_softmax_lanes(accumulators, peaks, totals, scores, values):
    """Adds a score [N] and values [N, D] to the separate online softmax of each of N lanes."""
    new_peaks = tl.maximum(peaks, scores)
    base = finite_maximum(new_peaks)
    weights = tl.exp2(scores - base)
    rescale = tl.exp2(peaks - base)
    accumulators = accumulators * rescale[:, None] + weights[:, None] * values
    return accumulators, new_peaks, totals * rescale + weights


@triton.jit
def combine_lanes(accumulators, peaks, totals):
    """Combines the lanes: output [D], and log-sum-exp to base 2."""
    peak = tl.max(peaks, 0)
    shares = tl.exp2(peaks - finite_maximum(peak))
    total = tl.sum(totals * shares, 0)
    output = tl.sum(accumulators * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    return output, log_sum_exp(peak, total)


@triton.jit
def log_sum_exp(peak, total):
    """Log-sum-exp to base 2; minus infinity without keys."""
    return tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
