"""Where the keys of a sequence lie: positions become offsets, in one tensor or through pages.

Strides come as (outer, head, slot), where outer steps over sequences, or over pages if PAGE_SIZE is
not 0. Offsets are 64 bits wide: a million tokens of 32 heads of 128 do not fit 32.

B sequences, S sinks, W keys of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE: tl.constexpr):
    """Position of the query, which is the last token (-1: there is none), and slot of position 0.

    `lengths` is int32 [1] of slots in use, or [B] with pages; None if all of `capacity` are.
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
    """Pointer to the first row of a head of a sequence; with pages, of the head in page 0."""
    start = states + head.to(tl.int64) * strides[1]
    if PAGE_SIZE == 0:
        start += sequence.to(tl.int64) * strides[0]
    return start


@triton.jit
def row_offsets(slots, valid, strides, block_table, table_row, PAGE_SIZE: tl.constexpr):
    """Offsets of the rows in these slots from `head_start`; `table_row` is the sequence's in the table."""
    if PAGE_SIZE == 0:
        offsets = slots.to(tl.int64) * strides[2]
    else:
        pages = tl.load(block_table + table_row + slots // PAGE_SIZE, mask=valid, other=0)
        offsets = pages.to(tl.int64) * strides[0] + (slots % PAGE_SIZE) * strides[2]
    return offsets


@triton.jit
def candidate_range(query_position, num_sinks, near_window, WHOLE: tl.constexpr):
    """First and last position that the index scores: the far ones, or all if WHOLE (`paper`)."""
    if WHOLE:
        first, last = query_position * 0, query_position
    else:
        first, last = query_position * 0 + num_sinks, query_position - near_window
    return first, last


@triton.jit
def place_of(program, tiles, num_heads, num_dense):
    """Which head of the table a program of a prefill kernel serves, and which tile of rows.

    Long tiles come first. Heads with a window take turns, and share keys in the L2 cache with their KV
    head's others. Dense heads, the first ones, come one after the other: programs that begin together
    then walk through the same keys together, which otherwise would not fit in the L2 cache.
    """
    is_dense = program < num_dense * tiles
    turn = tl.where(is_dense, program, program - num_dense * tiles)
    others = tl.maximum(num_heads - num_dense, 1)
    entry = tl.where(is_dense, turn // tiles, num_dense + turn % others)
    tile = tl.where(is_dense, turn % tiles, turn // others)
    return entry, tiles - 1 - tile
