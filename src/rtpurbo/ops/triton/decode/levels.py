"""Scores as small integers, and how many entries of a head have which: what stands in for sorting.

The *level* of a score counts steps of LEVEL_WIDTH, from DEPTH steps below the score of the head's last
far key upwards. As that key competes too, the head's best entry is no weaker, and what lies below level
1 has no mass beside it in fp32: it gets level 0 and is never read. Levels are the same for all programs
of a head, so each adds what it finds to one histogram. Scores that would pass the highest level (408
nats above that key) share it.

A histogram is int32 [LEVELS], the highest level first: level n counts at place LEVELS - n. Place 0, where
none does, holds the level of the best entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A selection is rounded up to a whole level, which costs about half a level's width of further keys
# (some 7 % at 1/8).
LEVEL_WIDTH = tl.constexpr(0.125)
LEVELS = tl.constexpr(4096)
# So that what is read with the best entry's level, in groups of 8, never holds place 0.
HIGHEST = tl.constexpr(4096.0 - 8)
# Levels below the best one at which the exponential in fp32 becomes 0, and a power of two above.
DEPTH = tl.constexpr(832)
DEPTH_WIDTH = tl.constexpr(1024)
# A program counts in cells: one for each of its first levels, from its own best one downwards, then
# one for every COARSE_STEP levels, as deep as there can be mass. Counting takes time in proportion
# to cells.
CELLS = tl.constexpr(128)
FINE_CELLS = tl.constexpr(96)
COARSE_STEP = tl.constexpr(24)


@triton.jit
def level_of(scores, reference):
    """Levels of scores, where `reference` is the last far key's."""
    steps = (scores - reference) / LEVEL_WIDTH + DEPTH
    return tl.minimum(tl.maximum(steps, 0.0), HIGHEST).to(tl.int32)


@triton.jit
def cell_of(depths):
    """The cell of entries so many levels below the program's best; CELLS or more: they have no mass."""
    coarse = FINE_CELLS + (depths - FINE_CELLS) // COARSE_STEP
    return tl.where(depths < FINE_CELLS, depths, coarse)


@triton.jit
def deepest_of(cells):
    """The last depth that goes to each cell."""
    coarse = FINE_CELLS + (cells - FINE_CELLS + 1) * COARSE_STEP - 1
    return tl.where(cells < FINE_CELLS, cells, coarse)


@triton.jit
def count_levels(histogram, places, levels, ENTRIES: tl.constexpr):
    """Adds entries, whose levels have just been stored in `places`, to the histogram of their head.

    Those of a coarse cell count at its lowest level: further down than they are, never further up.
    """
    peak = tl.max(levels, 0)
    if peak > 0:
        tl.atomic_max(histogram, peak, sem="relaxed")
        if ENTRIES < 128:
            counted = histogram + LEVELS - levels
            tl.atomic_add(counted, levels * 0 + 1, mask=levels > 0, sem="relaxed")
        else:
            # `tl.histogram` counts what each thread holds, and two threads hold what is a sum of both.
            # What is loaded is held once, if there is an element for each thread of four warps.
            tl.debug_barrier()
            levels = tl.load(places).to(tl.int32)
            entry_cells = cell_of(peak - levels)
            counts = tl.histogram(entry_cells, CELLS, mask=(levels > 0) & (entry_cells < CELLS))
            lowest = tl.maximum(peak - deepest_of(tl.arange(0, CELLS)), 1)
            counted = histogram + LEVELS - lowest
            tl.atomic_add(counted, counts, mask=counts > 0, sem="relaxed")
