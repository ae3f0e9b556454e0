"""Attention of the retrieval heads of a KV head over their selected far keys, gathered from the cache once.

The keys of a group's lists are read for all of its heads, in matrix products; a key that a head did not select is
masked for this head. Tiles, each of one segment's list, are dealt to the programs of the group in turn.

B sequences, R retrieval heads, U groups of them with M members at most, D head_dim; P programs and G segments of a
group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.pdl import allow_dependent_launch, wait_for_dependencies
from rtpurbo.ops.triton.device_functions import (
    IEEE,
    head_start,
    log_sum_exp,
    sequence_extent,
    slot_offsets,
    update_softmax,
)

# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = [
    "table_stride",
    "capacity",
    "num_retrieval",
    "num_groups",
    "num_segments",
    "segment_entries",
    "num_sinks",
    "near_window",
]


@triton.jit(do_not_specialize=SIZES)
def selected_group_attention_kernel(
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
    group_ranks,
    lists,
    list_members,
    list_lengths,
    log_sums,
    outputs,
    num_groups,
    capacity,
    num_retrieval,
    num_segments,
    segment_entries,
    num_sinks,
    near_window,
    scale,
    MEMBERS: tl.constexpr,
    MEMBER_WIDTH: tl.constexpr,
    SEGMENT_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EVERYTHING: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (split of the selected keys, sequence and group of retrieval heads).

    Reads the entries in `lists` [B, U, G, segment_entries], of which `list_lengths` [B, U, G] are valid, for the
    members in `list_members`, or all far keys if EVERYTHING. Group u is that of full KV head u. Writes `log_sums`
    [B, R, P] to base 2 and `outputs` [B, R, P, D].
    """
    allow_dependent_launch(PDL)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    row = tl.program_id(1)
    sequence = row // num_groups
    group = row % num_groups
    query_position, first_slot = sequence_extent(
        sequence, capacity, lengths, first_slots, PAGE_SIZE
    )
    last_far_position = query_position - near_window
    members = tl.arange(0, MEMBER_WIDTH)
    ranks = tl.load(group_ranks + group * MEMBERS + members, mask=members < MEMBERS, other=-1)
    in_group = ranks >= 0
    heads = tl.load(retrieval_heads + ranks, mask=in_group, other=0)
    dims = tl.arange(0, WIDTH)
    in_head = dims[None, :] < HEAD_DIM
    group_queries = tl.load(
        queries
        + sequence.to(tl.int64) * query_strides[0]
        + heads[:, None] * query_strides[1]
        + dims[None, :],
        mask=in_group[:, None] & in_head,
        other=0.0,
    )
    keys = head_start(keys, sequence, group, key_strides, PAGE_SIZE)
    values = head_start(values, sequence, group, value_strides, PAGE_SIZE)
    table_row = sequence * table_stride
    wait_for_dependencies(PDL)
    if EVERYTHING:
        num_tiles = tl.cdiv(last_far_position + 1 - num_sinks, TILE)
    else:
        lists += (row * num_segments).to(tl.int64) * segment_entries
        list_members += (row * num_segments).to(tl.int64) * segment_entries
        segments = tl.arange(0, SEGMENT_WIDTH)
        segment_lengths = tl.load(
            list_lengths + row * num_segments + segments, mask=segments < num_segments, other=0
        )
        ends = tl.cumsum(tl.cdiv(segment_lengths * BLOCK, TILE), 0)
        num_tiles = tl.max(ends, 0)
        # Of the segments whose tiles come before a tile, the last has the largest difference between its end if it
        # were full and its end: the number of tiles that are missing so far.
        segment_tiles = tl.cdiv(segment_entries * BLOCK, TILE)
        missing = (segments + 1) * segment_tiles - ends

    lanes = tl.arange(0, TILE)
    peak = tl.full([MEMBER_WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([MEMBER_WIDTH], tl.float32)
    accumulator = tl.zeros([MEMBER_WIDTH, WIDTH], tl.float32)
    for tile in range(program, num_tiles, num_programs):
        if EVERYTHING:
            positions = num_sinks + tile * TILE + lanes
            bits = lanes * 0 - 1
        else:
            full_tile = tile + tl.max(tl.where(ends <= tile, missing, 0), 0)
            tokens = full_tile % segment_tiles * TILE + lanes
            in_segment = tokens < segment_entries * BLOCK
            segment = (full_tile // segment_tiles).to(tl.int64) * segment_entries
            places = segment + tokens // BLOCK
            entries = tl.load(lists + places, mask=in_segment, other=0)
            # No members beyond the end of a list.
            bits = tl.load(list_members + places, mask=in_segment, other=0)
            positions = entries * BLOCK + tokens % BLOCK
        # The first and the last block may also hold sinks or window keys.
        read = (bits != 0) & (positions >= num_sinks) & (positions <= last_far_position)
        seen = ((bits[None, :] >> members[:, None]) & 1 > 0) & read[None, :]
        slots = positions + first_slot
        loaded = read[:, None] & in_head
        key_offsets = slot_offsets(slots, read, key_strides, block_table, table_row, PAGE_SIZE)
        value_offsets = slot_offsets(slots, read, value_strides, block_table, table_row, PAGE_SIZE)
        # Keys and values may be float8.
        tile_keys = tl.load(keys + key_offsets[:, None] + dims[None, :], mask=loaded, other=0.0).to(
            group_queries.dtype
        )
        tile_values = tl.load(
            values + value_offsets[:, None] + dims[None, :], mask=loaded, other=0.0
        ).to(group_queries.dtype)
        logits = tl.dot(group_queries, tile_keys.T, input_precision=IEEE) * scale
        logits = tl.where(seen, logits, float("-inf"))
        accumulator, peak, total = update_softmax(
            accumulator, peak, total, logits, tile_values, True
        )

    rows = (sequence * num_retrieval + ranks) * num_programs + program
    tl.store(log_sums + rows, log_sum_exp(peak, total), mask=in_group)
    tl.store(
        outputs + rows[:, None] * HEAD_DIM + dims[None, :],
        accumulator / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=(in_group & (total > 0.0))[:, None] & in_head,
    )
