"""Lowest selected level of a retrieval head, from the histogram of its index scores.

D levels, S splits of the window keys; B sequences, R retrieval heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import sequence_extent
from rtpurbo.ops.triton.decode.histogram import DEPTH, DEPTH_WIDTH, LEVEL_WIDTH, LEVELS
from rtpurbo.ops.triton.decode.pdl import allow_dependent_launch, wait_for_dependencies
from rtpurbo.ops.triton.softmax import LOG2_E

# Smallest width of the splits, so that fewer splits do not compile another kernel.
MIN_SPLIT_WIDTH = 64


@triton.jit
def _counts_below(histogram, peak):
    """Levels in descending order, starting at or above `peak`, and the number of entries of each."""
    # Starts at a multiple of 8, for vector loads.
    places = (LEVELS - peak) // 8 * 8 + tl.arange(0, DEPTH_WIDTH)
    counts = tl.load(histogram + places, mask=places < LEVELS, other=0)
    levels = LEVELS - places
    return levels, tl.where(levels > peak - DEPTH, counts, 0)


@triton.jit
def _window_mass(window_log_sums, num_splits, score, SPLIT_WIDTH: tl.constexpr):
    """Sum of the exponentials of the window's logits, relative to the exponential of `score`.

    May be infinite; the far keys have no share of the mass then.
    """
    splits = tl.arange(0, SPLIT_WIDTH)
    log_sums = tl.load(window_log_sums + splits, mask=splits < num_splits, other=float("-inf"))
    return tl.sum(tl.exp2(log_sums - score * LOG2_E), 0)


@triton.jit
def lowest_levels(
    histogram,
    far_peak,
    top_p_peak,
    reference,
    window_log_sums,
    heads_per_plane,
    num_splits,
    top_p,
    far_floor,
    floor,
    SPLIT_WIDTH: tl.constexpr,
    READING: tl.constexpr,
):
    """Lowest selected level in plane 0 and in the plane that top-p applies to.

    Pointers are those of the head; the peaks are the levels of its best entries in both planes.
    """
    levels, counts = _counts_below(histogram, far_peak)
    # A level is selected if the levels above it do not suffice.
    wanted = (levels <= far_peak) & (tl.cumsum(counts, 0) - counts < floor)
    peak = far_peak
    if READING == "paper":
        peak = top_p_peak
        levels, counts = _counts_below(histogram + heads_per_plane * LEVELS, peak)
    masses = counts * tl.exp((levels - peak) * LEVEL_WIDTH)
    reached = tl.cumsum(masses, 0)
    total = tl.max(reached, 0)
    target = top_p * total
    if READING != "paper":
        middle = reference + (far_peak - DEPTH + 0.5) * LEVEL_WIDTH
        window = _window_mass(window_log_sums, num_splits, middle, SPLIT_WIDTH)
        if READING == "residual":
            # Selected + window must reach top_p of total + window.
            target -= (1.0 - top_p) * window
        else:
            target = tl.where(total * (1.0 - far_floor) > far_floor * window, target, 0.0)
    needed = (levels <= peak) & (reached - masses < target)
    if READING == "paper":
        lowest_far = far_peak + 1 - tl.sum(wanted.to(tl.int32), 0)
        lowest = peak + 1 - tl.sum(needed.to(tl.int32), 0)
    else:
        lowest_far = far_peak + 1 - tl.sum((wanted | needed).to(tl.int32), 0)
        lowest = lowest_far
    return tl.maximum(lowest_far, tl.maximum(far_peak - DEPTH, 0) + 1), lowest


# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = [
    "capacity",
    "num_heads",
    "num_retrieval",
    "num_splits",
    "heads_per_plane",
    "num_sinks",
    "near_window",
    "floor",
]


@triton.jit(do_not_specialize=SIZES)
def lowest_levels_kernel(
    histogram,
    references,
    window_log_sums,
    retrieval_heads,
    lengths,
    first_slots,
    lowest,
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
    PLANES: tl.constexpr,
    READING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (sequence and retrieval head).

    Writes the two `lowest_levels`, and the lowest level that has mass, to `lowest` int32 [3, B, R].
    """
    allow_dependent_launch(PDL)
    head = tl.program_id(0)
    sequence = head // num_retrieval
    window_row = sequence * num_heads + tl.load(retrieval_heads + head % num_retrieval)
    query_position, _ = sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE)
    wait_for_dependencies(PDL)
    # Without far keys there is no reference.
    if query_position - near_window >= num_sinks:
        histogram += head * LEVELS
        far_peak = tl.load(histogram)
        top_p_peak = far_peak
        if PLANES == 2:
            top_p_peak = tl.load(histogram + heads_per_plane * LEVELS)
        lowest_far, lowest_of_all = lowest_levels(
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
        tl.store(lowest + head, lowest_far)
        tl.store(lowest + heads_per_plane + head, lowest_of_all)
        tl.store(lowest + 2 * heads_per_plane + head, tl.maximum(far_peak - DEPTH, 0) + 1)
