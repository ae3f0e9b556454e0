"""Quantised index scores and their histogram, which replaces sorting in top-p selection.

The *level* of a score counts steps of LEVEL_WIDTH, starting DEPTH steps below the score of the head's last far
key. That key is a candidate too, so the best entry is at least as strong, and a score below level 1 has no mass
next to it in fp32: it gets level 0 and is never selected. All programs of a head share the same levels, so each
adds to one histogram. Scores above the highest level (408 nats above the last far key) are clamped to it.

A histogram is int32 [LEVELS] in descending order: level n is counted at place LEVELS - n. Place 0, which no level
uses, holds the level of the best entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
