"""Quantised index scores and their histogram, which replaces sorting in top-p selection.

The *level* of a score counts steps of LEVEL_WIDTH, starting DEPTH steps below the score of the head's last far
key. That key is a candidate too, so the best entry is at least as strong, and a score below level 1 has no mass
next to it in fp32: it gets level 0 and is never selected. All programs of a head share the same levels, so each
adds to one histogram. Scores above the highest level (408 nats above the last far key) are clamped to it.

A histogram is int32 [LEVELS] in descending order: level n is counted at place LEVELS - n. Place 0, which no level
uses, holds the level of the best entry. The lowest selected level of a head follows from it.

S splits of the window keys; B sequences, R retrieval heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.pdl import allow_dependent_launch, wait_for_dependencies
from rtpurbo.ops.triton.device_functions import LOG2_E, sequence_extent

# The selection is rounded up to a whole level, which adds about half a level of keys (some 7 % at 1/8).
LEVEL_WIDTH = tl.constexpr(0.125)
LEVELS = tl.constexpr(4096)
# Keeps place 0 out of the group of 8 places that holds the best entry's level.
HIGHEST = tl.constexpr(4096.0 - 8)
# Levels below the best one at which the fp32 exponential underflows to 0, and the next power of two.
DEPTH = tl.constexpr(832)
DEPTH_WIDTH = tl.constexpr(1024)
# A program counts in cells: one per level for the first FINE_CELLS levels below its own best one, then one per
# COARSE_STEP levels, down to where there is no mass. The cost of counting is proportional to the cells.
CELLS = tl.constexpr(128)
FINE_CELLS = tl.constexpr(96)
COARSE_STEP = tl.constexpr(24)
# Smallest width of the splits, so that fewer splits do not compile another kernel.
MIN_SPLIT_WIDTH = 64


@triton.jit
def level_of(scores, reference):
    """Levels of scores, relative to the score `reference` of the last far key."""
    steps = (scores - reference) / LEVEL_WIDTH + DEPTH
    return tl.minimum(tl.maximum(steps, 0.0), HIGHEST).to(tl.int32)


@triton.jit
def cell_of(depths):
    """Cells of entries `depths` levels below the program's best one; CELLS or more without mass."""
    coarse = FINE_CELLS + (depths - FINE_CELLS) // COARSE_STEP
    return tl.where(depths < FINE_CELLS, depths, coarse)


@triton.jit
def deepest_of(cells):
    """Largest depth that belongs to each cell."""
    coarse = FINE_CELLS + (cells - FINE_CELLS + 1) * COARSE_STEP - 1
    return tl.where(cells < FINE_CELLS, cells, coarse)


@triton.jit
def count_loaded_levels(histogram, places, peak):
    """Adds entries, whose levels are at `places` and `peak` at most, to the histogram of their head.

    `tl.histogram` counts the copy of every thread, and the result of a reduction or a product is replicated over
    threads. Loaded values are not, if there is an element for each thread of four warps. Entries of a coarse cell
    are counted at its lowest level: never above their own.
    """
    levels = tl.load(places).to(tl.int32)
    entry_cells = cell_of(peak - levels)
    counts = tl.histogram(entry_cells, CELLS, mask=(levels > 0) & (entry_cells < CELLS))
    lowest = tl.maximum(peak - deepest_of(tl.arange(0, CELLS)), 1)
    counted = histogram + LEVELS - lowest
    tl.atomic_add(counted, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def count_levels(histogram, places, levels, ENTRIES: tl.constexpr):
    """Adds entries, whose levels have just been stored at `places`, to the histogram of their head."""
    peak = tl.max(levels, 0)
    if peak > 0:
        tl.atomic_max(histogram, peak, sem="relaxed")
        if ENTRIES < 128:
            counted = histogram + LEVELS - levels
            tl.atomic_add(counted, levels * 0 + 1, mask=levels > 0, sem="relaxed")
        else:
            tl.debug_barrier()
            count_loaded_levels(histogram, places, peak)


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
    references,
    window_log_sums,
    heads_per_plane,
    num_splits,
    top_p,
    far_floor,
    floor,
    SPLIT_WIDTH: tl.constexpr,
    READING: tl.constexpr,
):
    """Lowest selected level in plane 0 and in the plane that top-p applies to, and the lowest of plane 0 with mass.

    Pointers are those of the head.
    """
    # Loaded together, before the counts, whose addresses depend on the first.
    far_peak = tl.load(histogram)
    peak = far_peak
    if READING == "paper":
        peak = tl.load(histogram + heads_per_plane * LEVELS)
    reference = tl.load(references)
    levels, counts = _counts_below(histogram, far_peak)
    # A level is selected if the levels above it do not suffice.
    wanted = (levels <= far_peak) & (tl.cumsum(counts, 0) - counts < floor)
    if READING == "paper":
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
    weakest = tl.maximum(far_peak - DEPTH, 0) + 1
    return tl.maximum(lowest_far, weakest), lowest, weakest


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
    READING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (sequence and retrieval head).

    Writes the three `lowest_levels` to `lowest` int32 [3, B, R].
    """
    allow_dependent_launch(PDL)
    head = tl.program_id(0)
    sequence = head // num_retrieval
    window_row = sequence * num_heads + tl.load(retrieval_heads + head % num_retrieval)
    query_position, _ = sequence_extent(sequence, capacity, lengths, first_slots, PAGE_SIZE)
    wait_for_dependencies(PDL)
    # Without far keys there is no reference.
    if query_position - near_window >= num_sinks:
        lowest_far, lowest_of_all, weakest = lowest_levels(
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
        tl.store(lowest + head, lowest_far)
        tl.store(lowest + heads_per_plane + head, lowest_of_all)
        tl.store(lowest + 2 * heads_per_plane + head, weakest)
