"""Address computation: offsets of keys and values from slots, in one tensor or in pages.

Strides are (outer, head, slot), where the outer dimension is that of sequences, or of pages if PAGE_SIZE is
not 0. Offsets have 64 bits: a million tokens of 32 heads of 128 exceed 32 bits.

B sequences, S sinks, W keys of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
