"""How many entries of a head lie how far below its best score: what stands in for sorting.

Bins are counted from the head's peak downwards. The first LINEAR_BINS are BIN_WIDTH wide, centred on
multiples of it, so that the peak itself, which may hold most of the mass, lies in the middle of bin
0. Beyond them bins grow with the distance: mass there is next to nothing, but the heaviest
`min_tokens` may reach so far. What lies deeper than the last bin has no mass in fp32 and is never read.

N entries a program looks at; BINS bins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode_addresses import candidate_range, sequence_extent
from rtpurbo.ops.triton.decode_overlap import start_next_launch, wait_for_last_launch

# A selection is rounded up to a whole bin, which costs about half a bin's width of further keys
# (some 7 % at 1/8); half the width would double the time that counting takes.
BINS = tl.constexpr(256)
BIN_WIDTH = tl.constexpr(0.125)
LINEAR_BINS = tl.constexpr(192)
# Nats below the peak at which bins begin to grow, and how many double the distance.
LINEAR_DEPTH = tl.constexpr((192 - 0.5) * 0.125)
BINS_PER_DOUBLING = tl.constexpr(30)
# Where the exponential in fp32 becomes 0.
DEEPEST = tl.constexpr(103.0)


@triton.jit
def bin_of(depths):
    """Bins of entries so many nats below the peak; BINS for those that have no mass."""
    near = (tl.minimum(depths, LINEAR_DEPTH) / BIN_WIDTH + 0.5).to(tl.int32)
    growing = tl.maximum(tl.minimum(depths, DEEPEST) / LINEAR_DEPTH, 1.0)
    far = LINEAR_BINS + (tl.log2(growing) * BINS_PER_DOUBLING).to(tl.int32)
    return tl.where(depths <= DEEPEST, tl.where(depths < LINEAR_DEPTH, near, far), BINS)


@triton.jit
def bin_weights(bins):
    """The mass that one entry of each bin counts for, relative to the peak's."""
    far = LINEAR_DEPTH * tl.exp2((bins - LINEAR_BINS + 0.5) / BINS_PER_DOUBLING)
    return tl.exp(-tl.where(bins < LINEAR_BINS, bins * BIN_WIDTH, far))


@triton.jit
def head_peak(chunk_peaks, row, num_chunks, CHUNK_WIDTH: tl.constexpr):
    """The best score of a head (and plane); minus infinity if it has no entry."""
    chunks = tl.arange(0, CHUNK_WIDTH)
    peaks = tl.load(
        chunk_peaks + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf")
    )
    return tl.max(peaks, 0)


# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = [
    "capacity",
    "num_retrieval",
    "num_entries",
    "num_chunks",
    "num_sinks",
    "near_window",
    "heads_of_plane",
]


@triton.jit(do_not_specialize=SIZES)
def histogram_kernel(
    scores,
    chunk_peaks,
    histogram,
    lengths,
    first_slots,
    capacity,
    num_retrieval,
    num_entries,
    num_chunks,
    num_sinks,
    near_window,
    heads_of_plane,
    CHUNK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (group of entries, sequence and retrieval head) adds its counts to the histogram."""
    start_next_launch(OVERLAP)
    wait_for_last_launch(OVERLAP)
    head = tl.program_id(1)
    query_position, _ = sequence_extent(
        head // num_retrieval, capacity, lengths, first_slots, PAGE_SIZE
    )
    first, last = candidate_range(query_position, num_sinks, near_window, PLANES == 2)
    first_entry = tl.program_id(0) * ENTRIES
    if (first_entry * BLOCK <= last) & ((first_entry + ENTRIES) * BLOCK > first):
        entries = first_entry + tl.arange(0, ENTRIES)
        scored = (
            (entries < num_entries) & (entries * BLOCK <= last) & ((entries + 1) * BLOCK > first)
        )
        for plane in tl.static_range(PLANES):
            row = plane * heads_of_plane + head
            entry_scores = tl.load(
                scores + row.to(tl.int64) * num_entries + entries, mask=scored, other=float("-inf")
            )
            peak = head_peak(chunk_peaks, row, num_chunks, CHUNK_WIDTH)
            entry_bins = bin_of(peak - entry_scores)
            counts = tl.histogram(entry_bins, BINS, mask=entry_bins < BINS)
            bins = tl.arange(0, BINS)
            tl.atomic_add(histogram + row * BINS + bins, counts, mask=counts > 0, sem="relaxed")
