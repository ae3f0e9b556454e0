"""Lists of the selected far keys of the retrieval heads of a KV head: the union of their selections.

A launch finds the lowest selected level of each head, which would take longer than the rest if each program of the
next launch found those of all its heads again.

B sequences, R retrieval heads, U groups of them with M members at most, G segments of a group; E entries of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, States
from rtpurbo.ops.triton.addresses import sequence_extent
from rtpurbo.ops.triton.decode.lowest_levels import MIN_SPLIT_WIDTH, lowest_levels_kernel
from rtpurbo.ops.triton.decode.pdl import (
    allow_dependent_launch,
    dependent_launch,
    wait_for_dependencies,
)
from rtpurbo.ops.triton.decode.workspace import (
    IndexScores,
    PartialAttention,
    Selection,
    SelectionGroups,
)

# Entries that a program compacts at a time, at most, and its warps.
COMPACTED_ENTRIES = 512
COMPACTION_WARPS = 4
# Warps of a program that finds the lowest levels of one head: few programs, so that the time of one counts.
LEVEL_WARPS = 4
# Entries without members after a list: a tile of keys may extend beyond its end.
LIST_PADDING = tl.constexpr(128)

# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = [
    "capacity",
    "num_retrieval",
    "num_groups",
    "segment_entries",
    "heads_per_plane",
    "num_sinks",
    "near_window",
]


@triton.jit(do_not_specialize=SIZES)
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


def select_in_groups(
    queries: Tensor,
    full: States,
    layout: HeadLayout,
    groups: SelectionGroups,
    rule: AttentionRule,
    window: PartialAttention,
    scores: IndexScores,
) -> Selection:
    """Selected far entries of B * R heads in `groups` of several heads."""
    batch, num_heads = queries.shape[:2]
    num_retrieval = len(layout.retrieval)
    num_segments = scores.levels.shape[1] // scores.segment
    shape = (batch, groups.count, num_segments)
    lists = queries.new_empty(*shape, scores.segment, dtype=torch.int32)
    members = torch.empty_like(lists)
    list_lengths = queries.new_empty(shape, dtype=torch.int32)
    lowest = queries.new_empty(3, batch * num_retrieval, dtype=torch.int32)
    lowest_levels_kernel[(batch * num_retrieval,)](
        scores.histogram,
        scores.references,
        window.log_sums,
        layout.retrieval.heads,
        full.lengths,
        full.first_slots,
        lowest,
        full.capacity,
        num_heads,
        num_retrieval,
        len(window),
        batch * num_retrieval,
        rule.num_sink_tokens,
        rule.near_window,
        rule.top_p,
        rule.far_floor,
        triton.cdiv(rule.min_tokens, scores.block),
        SPLIT_WIDTH=max(MIN_SPLIT_WIDTH, triton.next_power_of_2(window.max_splits)),
        PLANES=scores.planes,
        READING=rule.reading,
        PAGE_SIZE=full.page_size,
        **dependent_launch(queries.device),
        num_warps=LEVEL_WARPS,
    )
    compact_groups_kernel[(num_segments, batch * groups.count)](
        scores.levels,
        lowest,
        groups.ranks,
        full.lengths,
        full.first_slots,
        lists,
        members,
        list_lengths,
        full.capacity,
        num_retrieval,
        groups.count,
        scores.segment,
        batch * num_retrieval,
        rule.num_sink_tokens,
        rule.near_window,
        MEMBERS=groups.members,
        MEMBER_WIDTH=groups.width,
        BLOCK=scores.block,
        ENTRIES=min(COMPACTED_ENTRIES, scores.segment),
        PLANES=scores.planes,
        PAGE_SIZE=full.page_size,
        **dependent_launch(queries.device),
        num_warps=COMPACTION_WARPS,
    )
    return Selection(lists, list_lengths, members, groups, scores.block)
