"""Online softmax: running maximum (peak), running sum of exponentials (total) and weighted values.

Scores and peaks are to base 2, like the GPU's exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
IEEE = tl.constexpr("ieee")
"""`input_precision` of every product in attention and index scores: without it, Triton multiplies float32 inputs
as TF32 on a GPU. It does not affect half precision."""


@triton.jit
def finite_maximum(peak):
    """Maximum to subtract in exponents: the peak, or 0 without keys so far."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def update_softmax(accumulator, peak, total, scores, values, MASKED: tl.constexpr):
    """Adds a tile of scores [M, N] and values [N, D] to the online softmax of M queries.

    Without a mask every query has a key, so the peak is finite.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = finite_maximum(new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision=IEEE)
    return accumulator, new_peak, total


@triton.jit
def update_softmax_lanes(accumulators, peaks, totals, scores, values):
    """Adds a score [N] and values [N, D] to the separate online softmax of each of N lanes."""
    new_peaks = tl.maximum(peaks, scores)
    base = finite_maximum(new_peaks)
    weights = tl.exp2(scores - base)
    rescale = tl.exp2(peaks - base)
    accumulators = accumulators * rescale[:, None] + weights[:, None] * values
    return accumulators, new_peaks, totals * rescale + weights


@triton.jit
def combine_lanes(accumulators, peaks, totals):
    """Combines the lanes: output [D], and log-sum-exp to base 2."""
    peak = tl.max(peaks, 0)
    shares = tl.exp2(peaks - finite_maximum(peak))
    total = tl.sum(totals * shares, 0)
    output = tl.sum(accumulators * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    return output, log_sum_exp(peak, total)


@triton.jit
def log_sum_exp(peak, total):
    """Log-sum-exp to base 2; minus infinity without keys."""
    return tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
