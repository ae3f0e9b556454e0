"""A softmax that grows tile by tile: running peak, running sum, and what they weigh.

Peaks and scores are in powers of two, because the GPU's exponential is.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def measured_from(peak):
    """What exponents are measured from: the peak, or 0 where nothing has been seen yet."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def fold_tile(accumulator, peak, total, scores, values, MASKED: tl.constexpr):
    """Adds a tile of scores [M, N] and values [N, D] to the softmax of M rows.

    Without a mask every row sees something, so that no peak has to be looked at.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = measured_from(new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
    return accumulator, new_peak, total


@triton.jit
def fold_lanes(accumulators, peaks, totals, scores, values):
    """Adds to each of N lanes, which has a softmax of its own, a score [N] and values [N, D]."""
    new_peaks = tl.maximum(peaks, scores)
    base = measured_from(new_peaks)
    weights = tl.exp2(scores - base)
    shrink = tl.exp2(peaks - base)
    accumulators = accumulators * shrink[:, None] + weights[:, None] * values
    return accumulators, new_peaks, totals * shrink + weights


@triton.jit
def join_lanes(accumulators, peaks, totals):
    """One softmax of those of all lanes: its output [D], and its log-sum-exp to base 2."""
    peak = tl.max(peaks, 0)
    shares = tl.exp2(peaks - measured_from(peak))
    total = tl.sum(totals * shares, 0)
    output = tl.sum(accumulators * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    return output, log_sum_exp(peak, total)


@triton.jit
def log_sum_exp(peak, total):
    """To base 2; minus infinity where nothing was seen."""
    return tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
