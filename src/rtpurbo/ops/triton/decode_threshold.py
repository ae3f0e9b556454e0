"""How deep below its peak a head reads: dynamic top-p and the floor, from a histogram.

The reference adds entries, the heaviest first, until their mass reaches a target; here whole bins are
added. The mass of a bin is its count times the mass in its middle, so the mass that is reached
differs from the one asked for: its odds, mass read to mass left, by a factor of exp(BIN_WIDTH) at the
most.

L chunks of a head, S splits of its near keys; BINS bins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode_histogram import BINS, bin_weights, head_peak


@triton.jit
def _last_bin_of_count(counts, wanted):
    """The bin in which the `wanted` heaviest entries, or all if there are fewer, are complete."""
    wanted = tl.minimum(wanted, tl.sum(counts, 0))
    last = tl.sum((tl.cumsum(counts, 0) < wanted).to(tl.int32), 0)
    return tl.where(wanted > 0, last, -1)


@triton.jit
def _last_bin_of_mass(counts, share):
    """The bin in which entries first hold this share of all entries' mass."""
    reached = tl.cumsum(counts * bin_weights(tl.arange(0, BINS)), 0)
    last = tl.sum((reached < share * tl.max(reached, 0)).to(tl.int32), 0)
    return tl.where(share > 0, tl.minimum(last, BINS - 1), -1)


@triton.jit
def _far_log_sum(chunk_peaks, chunk_sums, row, num_chunks, peak, CHUNK_WIDTH: tl.constexpr):
    """Log of what the exponentials of all far scores sum to."""
    chunks = tl.arange(0, CHUNK_WIDTH)
    in_head = chunks < num_chunks
    peaks = tl.load(chunk_peaks + row * num_chunks + chunks, mask=in_head, other=float("-inf"))
    sums = tl.load(chunk_sums + row * num_chunks + chunks, mask=in_head, other=0.0)
    return peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), 0))


@triton.jit
def _near_log_sum(near_log_sums, row, num_splits, SPLIT_WIDTH: tl.constexpr):
    """Natural log-sum-exp of a query head's near logits; there is always the query's own key."""
    splits = tl.arange(0, SPLIT_WIDTH)
    log_sums = tl.load(
        near_log_sums + row * num_splits + splits, mask=splits < num_splits, other=float("-inf")
    )
    peak = tl.max(log_sums, 0)
    return (peak + tl.log2(tl.sum(tl.exp2(log_sums - peak), 0))) * 0.6931471805599453


@triton.jit
def last_bins(
    histogram,
    chunk_peaks,
    chunk_sums,
    near_log_sums,
    head,
    near_row,
    heads_of_plane,
    num_chunks,
    num_splits,
    top_p,
    far_floor,
    floor,
    CHUNK_WIDTH: tl.constexpr,
    SPLIT_WIDTH: tl.constexpr,
    READING: tl.constexpr,
):
    """Peaks of plane 0 and of the plane that top-p judges, and the last bin to read of each.

    Call it for heads that have a far entry alone: others have no peak to measure from.
    """
    bins = tl.arange(0, BINS)
    far_peak = head_peak(chunk_peaks, head, num_chunks, CHUNK_WIDTH)
    counts = tl.load(histogram + head * BINS + bins)
    last_far = _last_bin_of_count(counts, floor)
    if READING == "paper":
        row = heads_of_plane + head
        peak = head_peak(chunk_peaks, row, num_chunks, CHUNK_WIDTH)
        last = _last_bin_of_mass(tl.load(histogram + row * BINS + bins), top_p)
    else:
        peak = far_peak
        far = _far_log_sum(chunk_peaks, chunk_sums, head, num_chunks, peak, CHUNK_WIDTH)
        near = _near_log_sum(near_log_sums, near_row, num_splits, SPLIT_WIDTH)
        if READING == "residual":
            # far + near must reach top_p of both, here as a share of far alone.
            share = top_p - (1.0 - top_p) * tl.exp(near - far)
        else:
            share = tl.where(tl.sigmoid(far - near) > far_floor, top_p, 0.0)
        last = _last_bin_of_mass(counts, share)
    return far_peak, last_far, peak, last
