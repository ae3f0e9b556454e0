"""Top-p selection of far keys from a histogram of index scores.

The specification adds entries in descending order of mass until the sum reaches a target; the kernel adds
whole levels of the histogram (`histogram`). Each entry counts with the mass at the middle of its level, so
the odds of the selected mass (window keys included) against the rest deviate from the target by a factor of
at most exp(LEVEL_WIDTH). In addition, `count_levels` counts entries that are 12 nats or more below the best
entry of their tile at a lower level than theirs; in a tile of 1024 that is at most 0.6 % of all mass.

Each program finds the lowest selected level by itself, with reductions within a single warp, and compacts
one segment of the entries into a list. Separate lists without an atomic counter keep the order of the
entries, and hence the sums over them, deterministic. For retrieval heads of a KV head that share lists, a launch of
`lowest_levels_kernel` comes first: each program would find the levels of all its heads again.

B sequences, R retrieval heads, U groups of them with M members at most; G segments of a head or group, E entries of a
tile, S splits of the window keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.histogram import (
    LEVELS,
    MIN_SPLIT_WIDTH,
    lowest_levels,
    lowest_levels_kernel,
)
from rtpurbo.ops.triton.decode.pdl import (
    allow_dependent_launch,
    dependent_launch,
    wait_for_dependencies,
)
from rtpurbo.ops.triton.decode.workspace import (
    DecodeStep,
    IndexScores,
    PartialAttention,
    Selection,
)
from rtpurbo.ops.triton.device_functions import sequence_extent

# Entries that a program compacts at a time, at most.
COMPACTED_ENTRIES = 512
# Warps of a program that compacts those of a group.
COMPACTION_WARPS = 4
# Warps of a program that finds the lowest levels of one head: few programs, so that the time of one counts.
LEVEL_WARPS = 4
# Entries without members after the list of a group: a tile of keys may extend beyond its end.
LIST_PADDING = tl.constexpr(128)


# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = [
    "capacity",
    "num_heads",
    "num_retrieval",
    "num_splits",
    "segment_entries",
    "heads_per_plane",
    "num_sinks",
    "near_window",
    "floor",
]


@triton.jit(do_not_specialize=SIZES)
def top_p_kernel(
    levels,
    histogram,
    references,
    window_log_sums,
    retrieval_heads,
    lengths,
    first_slots,
    lists,
    list_lengths,
    segment_entries,
    capacity,
    num_heads,
    num_retrieval,
    num_splits,
    heads_per_plane,
    num_sinks,
    near_window,
    top_p,
    far_floor,
    floor,
    SPLIT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLANES: tl.constexpr,
    READING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (segment, sequence and retrieval head).

    Writes the selected entries in ascending order to `lists` [B, R, G, segment_entries] and their number
    to `list_lengths` [B, R, G].
    """
    allow_dependent_launch(PDL)
    segment = tl.program_id(0)
    head = tl.program_id(1)
    sequence = head // num_retrieval
    query_position, _ = sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE)
    last_far_position = query_position - near_window
    # A hint for vector loads: segments are multiples of 16 entries.
    segment_entries = tl.multiple_of(segment_entries, 16)
    place = head * tl.num_programs(0) + segment
    levels += place.to(tl.int64) * segment_entries
    lists += place.to(tl.int64) * segment_entries
    first_entry = segment * segment_entries
    lanes = tl.arange(0, ENTRIES)
    length = tl.zeros([], tl.int32)
    wait_for_dependencies(PDL)
    # Segments without far keys have no levels.
    if (last_far_position >= num_sinks) & (first_entry * BLOCK <= last_far_position):
        # Loaded early, so that the levels and the histogram are fetched at the same time.
        far_levels = tl.load(levels + lanes)
        window_row = sequence * num_heads + tl.load(retrieval_heads + head % num_retrieval)
        lowest_far, lowest, weakest = lowest_levels(
            histogram + head * LEVELS,
            references + head,
            window_log_sums + window_row * num_splits,
            heads_per_plane,
            num_splits,
            top_p,
            far_floor,
            floor,
            SPLIT_WIDTH,
            READING,
        )
        for start in range(0, segment_entries, ENTRIES):
            entries = first_entry + start + lanes
            selected = far_levels >= lowest_far
            if PLANES == 2:
                plane = heads_per_plane.to(tl.int64) * tl.num_programs(0) * segment_entries
                top_p_levels = tl.load(levels + plane + start + lanes)
                selected |= (far_levels >= weakest) & (top_p_levels >= lowest)
            following = start + ENTRIES + lanes
            far_levels = tl.load(levels + following, mask=following < segment_entries, other=0)
            selected &= entries >= num_sinks // BLOCK
            selected &= entries <= last_far_position // BLOCK
            order = tl.cumsum(selected.to(tl.int32), 0)
            tl.store(lists + length + order - 1, entries, mask=selected)
            length += tl.max(order, 0)
    tl.store(list_lengths + place, length)


GROUP_SIZES = [
    "capacity",
    "num_retrieval",
    "num_groups",
    "segment_entries",
    "heads_per_plane",
    "num_sinks",
    "near_window",
]


@triton.jit(do_not_specialize=GROUP_SIZES)
def compact_groups_kernel(
    levels,
    lowest,
    group_ranks,
    lengths,
    first_slots,
    lists,
    list_members,
    list_lengths,
    capacity,
    num_retrieval,
    num_groups,
    segment_entries,
    heads_per_plane,
    num_sinks,
    near_window,
    MEMBERS: tl.constexpr,
    MEMBER_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (segment, sequence and group), for groups of retrieval heads `group_ranks` [U, MEMBERS].

    Writes the entries that any head selects in ascending order to `lists` [B, U, G, segment_entries], and their
    number to `list_lengths` [B, U, G]. Bit m in `list_members` (like `lists`) says if member m selects an entry.
    """
    allow_dependent_launch(PDL)
    segment = tl.program_id(0)
    row = tl.program_id(1)
    sequence = row // num_groups
    query_position, _ = sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE)
    last_far_position = query_position - near_window
    members = tl.arange(0, MEMBER_WIDTH)
    ranks = tl.load(
        group_ranks + row % num_groups * MEMBERS + members, mask=members < MEMBERS, other=-1
    ).to(tl.int32)
    in_group = ranks >= 0
    heads = sequence * num_retrieval + ranks
    # A hint for vector loads: segments are multiples of 16 entries.
    segment_entries = tl.multiple_of(segment_entries, 16)
    place = row * tl.num_programs(0) + segment
    lists += place.to(tl.int64) * segment_entries
    list_members += place.to(tl.int64) * segment_entries
    levels += (heads * tl.num_programs(0) + segment).to(tl.int64)[:, None] * segment_entries
    plane = heads_per_plane.to(tl.int64) * tl.num_programs(0) * segment_entries
    first_entry = segment * segment_entries
    length = tl.zeros([], tl.int32)
    wait_for_dependencies(PDL)
    # Segments without far keys have no levels.
    if (last_far_position >= num_sinks) & (first_entry * BLOCK <= last_far_position):
        lowest_of_heads = lowest + heads
        lowest_far = tl.load(lowest_of_heads, mask=in_group, other=0)
        for start in range(0, segment_entries, ENTRIES):
            lanes = start + tl.arange(0, ENTRIES)
            far_levels = tl.load(levels + lanes[None, :], mask=in_group[:, None], other=-1)
            selecting = far_levels >= lowest_far[:, None]
            if PLANES == 2:
                lowest_of_all = tl.load(lowest_of_heads + heads_per_plane, mask=in_group, other=0)
                weakest = tl.load(lowest_of_heads + 2 * heads_per_plane, mask=in_group, other=0)
                whole_levels = tl.load(
                    levels + plane + lanes[None, :], mask=in_group[:, None], other=-1
                )
                has_mass = far_levels >= weakest[:, None]
                selecting |= has_mass & (whole_levels >= lowest_of_all[:, None])
            entries = first_entry + lanes
            bits = tl.sum(selecting.to(tl.int32) << members[:, None], 0)
            selected = bits > 0
            selected &= entries >= num_sinks // BLOCK
            selected &= entries <= last_far_position // BLOCK
            order = tl.cumsum(selected.to(tl.int32), 0)
            tl.store(lists + length + order - 1, entries, mask=selected)
            tl.store(list_members + length + order - 1, bits, mask=selected)
            length += tl.max(order, 0)
        following = length + tl.arange(0, LIST_PADDING)
        tl.store(list_members + following, following * 0, mask=following < segment_entries)
    tl.store(list_lengths + place, length)


def select_top_p(step: DecodeStep, window: PartialAttention, scores: IndexScores) -> Selection:
    """Selected far entries of B * R heads."""
    rule, full, groups = step.rule, step.full, step.groups
    heads = step.batch * step.num_retrieval
    num_segments = scores.levels.shape[1] // scores.segment
    shape = (step.batch, groups.count, num_segments)
    lists = step.queries.new_empty(*shape, scores.segment, dtype=torch.int32)
    list_lengths = step.queries.new_empty(shape, dtype=torch.int32)
    inputs = (
        *(scores.histogram, scores.references, window.log_sums, step.layout.retrieval.heads),
        *(full.lengths, full.first_slots),
    )
    sizes = (
        *(full.capacity, step.queries.shape[1], step.num_retrieval, len(window), heads),
        *(rule.num_sink_tokens, rule.near_window),
        *(rule.top_p, rule.far_floor, triton.cdiv(rule.min_tokens, scores.block)),
    )
    split_width = max(MIN_SPLIT_WIDTH, triton.next_power_of_2(window.max_splits))
    entries, device = min(COMPACTED_ENTRIES, scores.segment), step.queries.device
    if groups.ranks is None:
        top_p_kernel[(num_segments, heads)](
            scores.levels, *inputs, lists, list_lengths, scores.segment, *sizes,
            SPLIT_WIDTH=split_width, BLOCK=scores.block, ENTRIES=entries, PLANES=scores.planes,
            READING=rule.reading, PAGE_SIZE=full.page_size, **dependent_launch(device), num_warps=1,
        )  # fmt: skip
        return Selection(lists, list_lengths, None, groups, scores.block)
    members = torch.empty_like(lists)
    lowest = step.queries.new_empty(3, heads, dtype=torch.int32)
    lowest_levels_kernel[(heads,)](
        *inputs, lowest, *sizes,
        SPLIT_WIDTH=split_width, READING=rule.reading, PAGE_SIZE=full.page_size,
        **dependent_launch(device), num_warps=LEVEL_WARPS,
    )  # fmt: skip
    compact_groups_kernel[(num_segments, step.batch * groups.count)](
        scores.levels, lowest, groups.ranks, full.lengths, full.first_slots,
        lists, members, list_lengths,
        full.capacity, step.num_retrieval, groups.count, scores.segment, heads,
        rule.num_sink_tokens, rule.near_window,
        MEMBERS=groups.members, MEMBER_WIDTH=groups.width, BLOCK=scores.block, ENTRIES=entries,
        PLANES=scores.planes, PAGE_SIZE=full.page_size, **dependent_launch(device),
        num_warps=COMPACTION_WARPS,
    )  # fmt: skip
    return Selection(lists, list_lengths, members, groups, scores.block)
