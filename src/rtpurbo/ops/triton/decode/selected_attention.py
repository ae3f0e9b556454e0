"""Attention of the retrieval heads over their selected far keys, gathered from the cache.

The lists of a head's segments are read as one list, whose tiles are dealt to the programs of the head in
turn. The load is balanced wherever the selected keys lie and however few they are.

B sequences, R retrieval heads, D head_dim; P programs and G segments of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.group_attention import selected_group_attention_kernel
from rtpurbo.ops.triton.decode.pdl import (
    allow_dependent_launch,
    dependent_launch,
    wait_for_dependencies,
)
from rtpurbo.ops.triton.decode.workspace import (
    DecodeStep,
    PartialAttention,
    Selection,
    cache_arguments,
    gathered_tile,
)
from rtpurbo.ops.triton.device_functions import (
    LOG2_E,
    combine_lanes,
    head_start,
    sequence_extent,
    slot_offsets,
    update_softmax_lanes,
)

# Programs that share the selected keys of a head: one per TOKENS_PER_PROGRAM tokens of the capacity, with limits
# per head and for all heads. GATHER_TILE: largest number of keys of a gathered tile.
TOKENS_PER_PROGRAM = 512
MAX_PROGRAMS = 256
MAX_PROGRAMS_IN_TOTAL = 2048
GATHER_TILE = 16
GATHER_WARPS = 1
# The same for groups of heads that read their keys together (`group_attention`).
GROUP_TOKENS = 256
MAX_GROUP_PROGRAMS_IN_TOTAL = 1024
GROUP_TILE = 32
GROUP_WARPS = 4
GROUP_STAGES = 3
# Smallest width of the segments, so that fewer segments do not compile another kernel.
MIN_SEGMENT_WIDTH = 64


@triton.jit
def _list_entry(lists, ends, number, valid, segment_entries):
    """Entry `number` of a head's concatenated lists; `ends` [G] is the cumulative sum of their lengths."""
    passed = ends <= number
    segment = tl.sum(passed.to(tl.int32), 0)
    start = tl.max(tl.where(passed, ends, 0), 0)
    place = segment.to(tl.int64) * segment_entries + number - start
    return tl.load(lists + place, mask=valid, other=0)


@triton.jit
def _list_entries(lists, ends, numbers, valid, segment_entries):
    """Entries `numbers` [N] of a head's concatenated lists; see `_list_entry`."""
    passed = ends[None, :] <= numbers[:, None]
    segments = tl.sum(passed.to(tl.int32), 1)
    starts = tl.max(tl.where(passed, ends[None, :], 0), 1)
    places = segments.to(tl.int64) * segment_entries + numbers - starts
    return tl.load(lists + places, mask=valid, other=0)


# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
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
def selected_attention_kernel(
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
    kv_head_index,
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
    PDL: tl.constexpr,
):
    """Program (split of the selected keys, sequence and retrieval head).

    Reads the entries in `lists` [B, R, G, segment_entries], of which `list_lengths` [B, R, G] are valid, or
    all far keys if EVERYTHING. Writes `log_sums` [B, R, P] to base 2 and, of splits with keys, `outputs` [B, R, P, D].
    """
    allow_dependent_launch(PDL)
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
    in_head = dims[None, :] < HEAD_DIM
    query = tl.load(
        queries
        + sequence.to(tl.int64) * query_strides[0]
        + tl.load(retrieval_heads + rank).to(tl.int64) * query_strides[1]
        + dims,
        mask=dims < HEAD_DIM,
        other=0.0,
    ).to(tl.float32)
    key_value_head = tl.load(kv_head_index + rank)
    keys = head_start(keys, sequence, key_value_head, key_strides, PAGE_SIZE)
    values = head_start(values, sequence, key_value_head, value_strides, PAGE_SIZE)
    table_row = sequence * table_stride
    wait_for_dependencies(PDL)
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

    # Each lane of a tile keeps an online softmax of its own, combined after the loop, so that the loop
    # needs no reduction over the tile.
    lanes = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE], tl.float32)
    accumulators = tl.zeros([TILE, WIDTH], tl.float32)
    entry = program * 0
    if (not EVERYTHING) and BLOCK % TILE == 0:
        first = program * TILE
        entry = _list_entry(lists, ends, first // BLOCK, first < num_tokens, segment_entries)
    for start in range(program * TILE, num_tokens, num_programs * TILE):
        tokens = start + lanes
        read = tokens < num_tokens
        if EVERYTHING:
            positions = num_sinks + tokens
        elif BLOCK % TILE == 0:
            positions = entry * BLOCK + start % BLOCK + lanes
        else:
            entries = _list_entries(lists, ends, tokens // BLOCK, read, segment_entries)
            positions = entries * BLOCK + tokens % BLOCK
        # The first and the last block may also hold sinks or window keys.
        read = read & (positions >= num_sinks) & (positions <= last_far_position)
        slots = positions + first_slot
        loaded = read[:, None] & in_head
        key_offsets = slot_offsets(slots, read, key_strides, block_table, table_row, PAGE_SIZE)
        value_offsets = slot_offsets(slots, read, value_strides, block_table, table_row, PAGE_SIZE)
        tile_keys = tl.load(keys + key_offsets[:, None] + dims[None, :], mask=loaded, other=0.0)
        tile_values = tl.load(
            values + value_offsets[:, None] + dims[None, :], mask=loaded, other=0.0
        )
        if (not EVERYTHING) and BLOCK % TILE == 0:
            # Looks up the next tile's entry while the keys of this one are in flight.
            following = start + num_programs * TILE
            entry = _list_entry(
                lists, ends, following // BLOCK, following < num_tokens, segment_entries
            )
        logits = tl.sum(tile_keys.to(tl.float32) * query[None, :], 1) * scale
        logits = tl.where(read, logits, float("-inf"))
        accumulators, peaks, totals = update_softmax_lanes(
            accumulators, peaks, totals, logits, tile_values.to(tl.float32)
        )

    place = head * num_programs + program
    output, log_sum = combine_lanes(accumulators, peaks, totals)
    tl.store(log_sums + place, log_sum)
    written = (dims < HEAD_DIM) & (program * TILE < num_tokens)
    tl.store(outputs + place.to(tl.int64) * HEAD_DIM + dims, output, mask=written)


def selected_attention(step: DecodeStep, selection: Selection | None) -> PartialAttention:
    """Partial attention of B * R heads over the selected far keys, or over all of them without a selection."""
    queries, full, rule, groups = step.queries, step.full, step.rule, step.groups
    head_dim = queries.shape[-1]
    is_grouped = groups.ranks is not None
    rows = step.batch * groups.count
    programs = min(
        triton.cdiv(full.capacity, GROUP_TOKENS if is_grouped else TOKENS_PER_PROGRAM),
        MAX_PROGRAMS,
        max(1, (MAX_GROUP_PROGRAMS_IN_TOTAL if is_grouped else MAX_PROGRAMS_IN_TOTAL) // rows),
    )
    lists = list_lengths = members = None
    num_segments = segment_entries = 0
    if selection is not None:
        lists, list_lengths, members = selection.lists, selection.list_lengths, selection.members
        num_segments, segment_entries = lists.shape[2:]
    partial = PartialAttention.allocate(
        queries, step.batch * step.num_retrieval, programs, programs
    )
    inputs = (
        *(queries, queries.stride()[:2], *cache_arguments(full), full.lengths, full.first_slots),
        step.layout.retrieval.heads,
    )
    results = partial.log_sums, partial.outputs
    sizes = (
        *(full.capacity, step.num_retrieval, num_segments, segment_entries),
        *(rule.num_sink_tokens, rule.near_window, step.scaling * LOG2_E.value),
    )
    width = triton.next_power_of_2(head_dim)
    segment_width = max(MIN_SEGMENT_WIDTH, triton.next_power_of_2(max(1, num_segments)))
    block = 1 if selection is None else selection.block
    if is_grouped:
        selected_group_attention_kernel[(programs, rows)](
            *inputs, groups.ranks, lists, members, list_lengths, *results, groups.count, *sizes,
            MEMBERS=groups.members,
            # The smallest tile of a tensor core.
            MEMBER_WIDTH=max(16, groups.width), SEGMENT_WIDTH=segment_width, HEAD_DIM=head_dim,
            WIDTH=max(16, width), TILE=gathered_tile(queries, GROUP_TILE), BLOCK=block,
            PAGE_SIZE=full.page_size, EVERYTHING=selection is None,
            **dependent_launch(queries.device), num_warps=GROUP_WARPS, num_stages=GROUP_STAGES,
        )  # fmt: skip
    else:
        selected_attention_kernel[(programs, rows)](
            *inputs, step.layout.retrieval.key_value_heads, lists, list_lengths, *results, *sizes,
            SEGMENT_WIDTH=segment_width, HEAD_DIM=head_dim, WIDTH=width,
            TILE=gathered_tile(queries, GATHER_TILE), BLOCK=block, PAGE_SIZE=full.page_size,
            EVERYTHING=selection is None, **dependent_launch(queries.device),
            num_warps=GATHER_WARPS,
        )  # fmt: skip
    return partial
