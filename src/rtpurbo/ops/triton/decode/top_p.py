"""Top-p selection of far keys from a histogram of index scores.

The specification adds entries in descending order of mass until the sum reaches a target; the kernel adds
whole levels of the histogram (`histogram`). Each entry counts with the mass at the middle of its level, so
the odds of the selected mass (window keys included) against the rest deviate from the target by a factor of
at most exp(LEVEL_WIDTH). In addition, `count_levels` counts entries that are 12 nats or more below the best
entry of their tile at a lower level than theirs; in a tile of 1024 that is at most 0.6 % of all mass.

Each program finds the lowest selected level by itself, with reductions within a single warp, and compacts
one segment of the entries into a list. Separate lists without an atomic counter keep the order of the
entries, and hence the sums over them, deterministic. Retrieval heads of a KV head may share lists (`group_lists`).

B sequences, R retrieval heads, G segments of a head; E entries of a tile; S splits of the window keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, States
from rtpurbo.ops.triton.addresses import sequence_extent
from rtpurbo.ops.triton.decode.group_lists import select_in_groups
from rtpurbo.ops.triton.decode.histogram import DEPTH, LEVELS
from rtpurbo.ops.triton.decode.lowest_levels import MIN_SPLIT_WIDTH, lowest_levels
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

# Entries that a program compacts at a time, at most.
COMPACTED_ENTRIES = 512


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
    capacity,
    num_heads,
    num_retrieval,
    num_splits,
    segment_entries,
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
        histogram += head * LEVELS
        far_peak = tl.load(histogram)
        top_p_peak = far_peak
        if PLANES == 2:
            top_p_peak = tl.load(histogram + heads_per_plane * LEVELS)
        window_row = sequence * num_heads + tl.load(retrieval_heads + head % num_retrieval)
        lowest_far, lowest = lowest_levels(
            histogram,
            far_peak,
            top_p_peak,
            tl.load(references + head),
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
                has_mass = far_levels > tl.maximum(far_peak - DEPTH, 0)
                selected |= has_mass & (top_p_levels >= lowest)
            following = start + ENTRIES + lanes
            far_levels = tl.load(levels + following, mask=following < segment_entries, other=0)
            selected &= entries >= num_sinks // BLOCK
            selected &= entries <= last_far_position // BLOCK
            order = tl.cumsum(selected.to(tl.int32), 0)
            tl.store(lists + length + order - 1, entries, mask=selected)
            length += tl.max(order, 0)
    tl.store(list_lengths + place, length)


def select_top_p(
    queries: Tensor,
    full: States,
    layout: HeadLayout,
    rule: AttentionRule,
    window: PartialAttention,
    scores: IndexScores,
) -> Selection:
    """Selected far entries of B * R heads."""
    batch, num_heads = queries.shape[:2]
    groups = SelectionGroups.of(layout)
    if groups.members > 1:
        return select_in_groups(queries, full, layout, groups, rule, window, scores)
    num_retrieval = len(layout.retrieval)
    num_segments = scores.levels.shape[1] // scores.segment
    shape = (batch, num_retrieval, num_segments)
    selection = Selection(
        lists=queries.new_empty(*shape, scores.segment, dtype=torch.int32),
        list_lengths=queries.new_empty(shape, dtype=torch.int32),
        members=None,
        groups=groups,
        block=scores.block,
    )
    top_p_kernel[(num_segments, batch * num_retrieval)](
        scores.levels,
        scores.histogram,
        scores.references,
        window.log_sums,
        layout.retrieval.heads,
        full.lengths,
        full.first_slots,
        selection.lists,
        selection.list_lengths,
        full.capacity,
        num_heads,
        num_retrieval,
        len(window),
        scores.segment,
        batch * num_retrieval,
        rule.num_sink_tokens,
        rule.near_window,
        rule.top_p,
        rule.far_floor,
        triton.cdiv(rule.min_tokens, scores.block),
        SPLIT_WIDTH=max(MIN_SPLIT_WIDTH, triton.next_power_of_2(window.max_splits)),
        BLOCK=scores.block,
        ENTRIES=min(COMPACTED_ENTRIES, scores.segment),
        PLANES=scores.planes,
        READING=rule.reading,
        PAGE_SIZE=full.page_size,
        **dependent_launch(queries.device),
        num_warps=1,
    )
    return selection
