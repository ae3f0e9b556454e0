"""Attention of a retrieval head over its selected far keys, gathered.

The lists of a head's segments are read as one, of which every program gets every so many tiles, so that
all have the same to do wherever the selected keys lie, and however thinly.

P programs and G segments of a head; N keys of a gathered tile, D head_dim, E the power of two that holds
it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import head_start, row_offsets, sequence_extent
from rtpurbo.ops.triton.decode.early import let_next_begin, wait_for_earlier
from rtpurbo.ops.triton.softmax import fold_lanes, join_lanes


@triton.jit
def listed_entry(lists, ends, number, listed, segment_entries):
    """The entry of this number, counted through the lists; `ends` [G] sums up their lengths."""
    passed = ends <= number
    segment = tl.sum(passed.to(tl.int32), 0)
    start = tl.max(tl.where(passed, ends, 0), 0)
    place = segment.to(tl.int64) * segment_entries + number - start
    return tl.load(lists + place, mask=listed, other=0)


@triton.jit
def listed_entries(lists, ends, numbers, listed, segment_entries):
    """The entries of these numbers [N], counted through the lists; `ends` [G] sums up their lengths."""
    passed = ends[None, :] <= numbers[:, None]
    segments = tl.sum(passed.to(tl.int32), 1)
    starts = tl.max(tl.where(passed, ends[None, :], 0), 1)
    places = segments.to(tl.int64) * segment_entries + numbers - starts
    return tl.load(lists + places, mask=listed, other=0)


# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = [
    "table_stride",
    "capacity",
    "num_retrieval",
    "num_segments",
    "segment_entries",
    "num_sinks",
    "near_window",
]


@triton.jit(do_not_specialize=SIZES)
def far_kernel(
    queries,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    block_table,
    table_stride,
    lengths,
    first_slots,
    retrieval_heads,
    readers,
    lists,
    list_lengths,
    log_sums,
    outputs,
    capacity,
    num_retrieval,
    num_segments,
    segment_entries,
    num_sinks,
    near_window,
    scale,
    SEGMENT_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EVERYTHING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (share of the tiles, sequence and retrieval head).

    Reads the entries in `lists` [B, retrieval heads, G, segment_entries], of which `list_lengths`
    [B, retrieval heads, G] count, or EVERYTHING far. Writes `log_sums` [B, retrieval heads, P] to base 2
    and `outputs` [B, retrieval heads, P, D].
    """
    let_next_begin(EARLY)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    head = tl.program_id(1)
    sequence = head // num_retrieval
    rank = head % num_retrieval
    query_position, first_slot = sequence_extent(
        sequence, capacity, lengths, first_slots, PAGE_SIZE
    )
    last_far_position = query_position - near_window
    dims = tl.arange(0, WIDTH)
    in_row = dims[None, :] < HEAD_DIM
    query = tl.load(
        queries
        + sequence.to(tl.int64) * query_strides[0]
        + tl.load(retrieval_heads + rank).to(tl.int64) * query_strides[1]
        + dims,
        mask=dims < HEAD_DIM,
        other=0.0,
    ).to(tl.float32)
    reader = tl.load(readers + rank)
    keys = head_start(keys, sequence, reader, key_strides, PAGE_SIZE)
    values = head_start(values, sequence, reader, value_strides, PAGE_SIZE)
    table_row = sequence * table_stride
    wait_for_earlier(EARLY)
    if EVERYTHING:
        num_tokens = last_far_position + 1 - num_sinks
    else:
        lists += (head * num_segments).to(tl.int64) * segment_entries
        segments = tl.arange(0, SEGMENT_WIDTH)
        segment_lengths = tl.load(
            list_lengths + head * num_segments + segments, mask=segments < num_segments, other=0
        )
        ends = tl.cumsum(segment_lengths, 0)
        num_tokens = tl.max(ends, 0) * BLOCK

    # Each lane of a tile keeps a softmax of its own; they are joined at the end, so that the loop
    # needs no reduction over the tile.
    lanes = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE], tl.float32)
    accumulators = tl.zeros([TILE, WIDTH], tl.float32)
    entry = program * 0
    if (not EVERYTHING) and BLOCK % TILE == 0:
        first = program * TILE
        entry = listed_entry(lists, ends, first // BLOCK, first < num_tokens, segment_entries)
    for start in range(program * TILE, num_tokens, num_programs * TILE):
        tokens = start + lanes
        read = tokens < num_tokens
        if EVERYTHING:
            positions = num_sinks + tokens
        elif BLOCK % TILE == 0:
            positions = entry * BLOCK + start % BLOCK + lanes
        else:
            entries = listed_entries(lists, ends, tokens // BLOCK, read, segment_entries)
            positions = entries * BLOCK + tokens % BLOCK
        # The first and the last block may hold near tokens too.
        read = read & (positions >= num_sinks) & (positions <= last_far_position)
        slots = positions + first_slot
        loaded = read[:, None] & in_row
        key_rows = row_offsets(slots, read, key_strides, block_table, table_row, PAGE_SIZE)
        value_rows = row_offsets(slots, read, value_strides, block_table, table_row, PAGE_SIZE)
        tile_keys = tl.load(keys + key_rows[:, None] + dims[None, :], mask=loaded, other=0.0)
        tile_values = tl.load(values + value_rows[:, None] + dims[None, :], mask=loaded, other=0.0)
        if (not EVERYTHING) and BLOCK % TILE == 0:
            # The next tile's entry is looked up while this one's keys are on their way.
            following = start + num_programs * TILE
            entry = listed_entry(
                lists, ends, following // BLOCK, following < num_tokens, segment_entries
            )
        logits = tl.sum(tile_keys.to(tl.float32) * query[None, :], 1) * scale
        logits = tl.where(read, logits, float("-inf"))
        accumulators, peaks, totals = fold_lanes(
            accumulators, peaks, totals, logits, tile_values.to(tl.float32)
        )

    place = head * num_programs + program
    output, log_sum = join_lanes(accumulators, peaks, totals)
    tl.store(log_sums + place, log_sum)
    tl.store(outputs + place.to(tl.int64) * HEAD_DIM + dims, output, mask=dims < HEAD_DIM)
