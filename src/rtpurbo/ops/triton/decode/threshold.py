"""How deep below its best entry a head reads: dynamic top-p and the floor, from a histogram of levels.

The reference adds entries, the heaviest first, until their mass reaches a target; here whole levels are
added. An entry counts with the mass in the middle of its level, so what is reached differs from what is
asked for: its odds, mass read (near keys' too) to mass left, by a factor of exp(LEVEL_WIDTH) at the most.
Beyond that, what `count_levels` counts lower than it is, 12 nats or more below the best entry of its
tile, is taken for less; in a tile of 1024 that is at most 0.6 % of all mass.

S splits of a head's near keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.levels import DEPTH, DEPTH_WIDTH, LEVEL_WIDTH, LEVELS
from rtpurbo.ops.triton.softmax import LOG2_E


@triton.jit
def _counts_from(histogram, peak):
    """Levels, none above the best one left out, downwards, and how many entries each has."""
    # A multiple of 8 is a place that vectors may be loaded from.
    places = (LEVELS - peak) // 8 * 8 + tl.arange(0, DEPTH_WIDTH)
    counts = tl.load(histogram + places, mask=places < LEVELS, other=0)
    levels = LEVELS - places
    return levels, tl.where(levels > peak - DEPTH, counts, 0)


@triton.jit
def _near_mass(near_log_sums, num_splits, score, SPLIT_WIDTH: tl.constexpr):
    """What the exponentials of the near logits sum to, as a multiple of that of `score`.

    It may be infinite: what is far has no share then.
    """
    splits = tl.arange(0, SPLIT_WIDTH)
    log_sums = tl.load(near_log_sums + splits, mask=splits < num_splits, other=float("-inf"))
    return tl.sum(tl.exp2(log_sums - score * LOG2_E), 0)


@triton.jit
def lowest_levels(
    histogram,
    far_peak,
    judged_peak,
    reference,
    near_log_sums,
    heads_of_plane,
    num_splits,
    top_p,
    far_floor,
    floor,
    SPLIT_WIDTH: tl.constexpr,
    READING: tl.constexpr,
):
    """From which levels on entries are read, of plane 0 and of the plane that top-p judges.

    Pointers are to what is the head's own; peaks are the levels of its best entries.
    """
    levels, counts = _counts_from(histogram, far_peak)
    # A level is read if those above it do not suffice.
    wanted = (levels <= far_peak) & (tl.cumsum(counts, 0) - counts < floor)
    peak = far_peak
    if READING == "paper":
        peak = judged_peak
        levels, counts = _counts_from(histogram + heads_of_plane * LEVELS, peak)
    masses = counts * tl.exp((levels - peak) * LEVEL_WIDTH)
    reached = tl.cumsum(masses, 0)
    total = tl.max(reached, 0)
    target = top_p * total
    if READING != "paper":
        middle = reference + (far_peak - DEPTH + 0.5) * LEVEL_WIDTH
        near = _near_mass(near_log_sums, num_splits, middle, SPLIT_WIDTH)
        if READING == "residual":
            # read + near must reach top_p of total + near.
            target -= (1.0 - top_p) * near
        else:
            target = tl.where(total * (1.0 - far_floor) > far_floor * near, target, 0.0)
    needed = (levels <= peak) & (reached - masses < target)
    if READING == "paper":
        lowest_far = far_peak + 1 - tl.sum(wanted.to(tl.int32), 0)
        lowest = peak + 1 - tl.sum(needed.to(tl.int32), 0)
    else:
        lowest_far = far_peak + 1 - tl.sum((wanted | needed).to(tl.int32), 0)
        lowest = lowest_far
    return tl.maximum(lowest_far, tl.maximum(far_peak - DEPTH, 0) + 1), lowest
