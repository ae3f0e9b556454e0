"""Partial results of a query head become its output, weighted by their sums of exponentials.

B sequences, H query heads, R retrieval heads; S splits of near keys, P parts of far ones; D head_dim,
E elements of it that a program merges; N parts merged at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_parts(
    peaks,
    totals,
    accumulators,
    log_sums,
    outputs,
    row,
    num_parts,
    dims,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds the parts of one row of `log_sums` [rows, parts] and `outputs` [rows, parts, D]."""
    for start in range(0, num_parts, TILE):
        parts = start + tl.arange(0, TILE)
        places = row.to(tl.int64) * num_parts + parts
        log_sum = tl.load(log_sums + places, mask=parts < num_parts, other=float("-inf"))
        part = tl.load(
            outputs + places[:, None] * HEAD_DIM + dims[None, :],
            mask=(parts < num_parts)[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_peaks = tl.maximum(peaks, log_sum)
        base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        weights = tl.exp2(log_sum - base)
        shrink = tl.exp2(peaks - base)
        totals = totals * shrink + weights
        accumulators = accumulators * shrink[:, None] + weights[:, None] * part
        peaks = new_peaks
    return peaks, totals, accumulators


# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = [
    "num_heads",
    "num_retrieval",
    "num_splits",
    "num_far_parts",
]


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    near_log_sums,
    near_outputs,
    far_log_sums,
    far_outputs,
    retrieval_heads,
    output,
    log_sum_exp,
    num_heads,
    num_retrieval,
    num_splits,
    num_far_parts,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (elements, query head, sequence).

    Writes `output` [B, H, D] and `log_sum_exp` [B, H], natural.
    """
    dims = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    query_head = tl.program_id(1)
    sequence = tl.program_id(2)
    row = sequence * num_heads + query_head
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE], tl.float32)
    accumulators = tl.zeros([TILE, WIDTH], tl.float32)
    peaks, totals, accumulators = _add_parts(
        peaks,
        totals,
        accumulators,
        near_log_sums,
        near_outputs,
        row,
        num_splits,
        dims,
        HEAD_DIM,
        TILE,
    )
    ranks = tl.arange(0, RETRIEVAL_WIDTH)
    retrieving = tl.load(retrieval_heads + ranks, mask=ranks < num_retrieval, other=-1)
    rank = tl.max(tl.where(retrieving == query_head, ranks, -1), 0)
    # A local head has no far parts: its loop is empty.
    peaks, totals, accumulators = _add_parts(
        peaks,
        totals,
        accumulators,
        far_log_sums,
        far_outputs,
        sequence * num_retrieval + rank,
        tl.where(rank >= 0, num_far_parts, 0),
        dims,
        HEAD_DIM,
        TILE,
    )
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp2(peaks - base)
    total = tl.sum(totals * shares, 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(
        output + row.to(tl.int64) * HEAD_DIM + dims,
        (tl.sum(accumulators * shares[:, None], 0) / total).to(output.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
    if (log_sum_exp is not None) and tl.program_id(0) == 0:
        natural = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(log_sum_exp + row, tl.where(empty, float("-inf"), natural))
