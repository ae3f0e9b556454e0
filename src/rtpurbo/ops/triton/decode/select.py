"""Which entries a retrieval head reads: those of the levels that its histogram asks for, as lists.

Each program finds the lowest level for itself, which is a few reductions that need no other thread than
those of its warp, and lists its segment of the entries. A list of its own, not a common one with
a counter, keeps the order of the entries, and so the sums over them, the same from run to run.

B sequences, R retrieval heads, G segments of a head; E entries looked at together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import sequence_extent
from rtpurbo.ops.triton.decode.early import let_next_begin, wait_for_earlier
from rtpurbo.ops.triton.decode.levels import DEPTH, LEVELS
from rtpurbo.ops.triton.decode.threshold import lowest_levels

# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = [
    "capacity",
    "num_heads",
    "num_retrieval",
    "num_splits",
    "segment_entries",
    "heads_of_plane",
    "num_sinks",
    "near_window",
    "floor",
]


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    levels,
    histogram,
    references,
    near_log_sums,
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
    heads_of_plane,
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
    EARLY: tl.constexpr,
):
    """Program (segment, sequence and retrieval head).

    Writes its selected entries, ascending, to `lists` [B, R, G, segment_entries], and how many they are
    to `list_lengths` [B, R, G].
    """
    let_next_begin(EARLY)
    segment = tl.program_id(0)
    head = tl.program_id(1)
    sequence = head // num_retrieval
    query_position, _ = sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE)
    last_far_position = query_position - near_window
    # Whole vectors can be loaded from where a segment starts.
    segment_entries = tl.multiple_of(segment_entries, 16)
    place = head * tl.num_programs(0) + segment
    levels += place.to(tl.int64) * segment_entries
    lists += place.to(tl.int64) * segment_entries
    first_entry = segment * segment_entries
    lanes = tl.arange(0, ENTRIES)
    length = tl.zeros([], tl.int32)
    wait_for_earlier(EARLY)
    # Segments that hold no far key have no levels either.
    if (last_far_position >= num_sinks) & (first_entry * BLOCK <= last_far_position):
        # Asked for before they are of use: levels and what the threshold needs come at once.
        far_levels = tl.load(levels + lanes)
        histogram += head * LEVELS
        far_peak = tl.load(histogram)
        judged_peak = far_peak
        if PLANES == 2:
            judged_peak = tl.load(histogram + heads_of_plane * LEVELS)
        near_row = sequence * num_heads + tl.load(retrieval_heads + head % num_retrieval)
        lowest_far, lowest = lowest_levels(
            histogram,
            far_peak,
            judged_peak,
            tl.load(references + head),
            near_log_sums + near_row * num_splits,
            heads_of_plane,
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
                plane = heads_of_plane.to(tl.int64) * tl.num_programs(0) * segment_entries
                judged_levels = tl.load(levels + plane + start + lanes)
                has_mass = far_levels > tl.maximum(far_peak - DEPTH, 0)
                selected |= has_mass & (judged_levels >= lowest)
            following = start + ENTRIES + lanes
            far_levels = tl.load(levels + following, mask=following < segment_entries, other=0)
            selected &= entries >= num_sinks // BLOCK
            selected &= entries <= last_far_position // BLOCK
            order = tl.cumsum(selected.to(tl.int32), 0)
            tl.store(lists + length + order - 1, entries, mask=selected)
            length += tl.max(order, 0)
    tl.store(list_lengths + place, length)
