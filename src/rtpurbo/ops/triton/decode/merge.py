"""Partial results of a query head become its output, weighted by their sums of exponentials.

B sequences, H query heads, R retrieval heads; S splits of near keys, P parts of far ones; D head_dim,
E elements of it that a program merges; N parts merged at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.early import wait_for_earlier
from rtpurbo.ops.triton.decode.levels import LEVELS
from rtpurbo.ops.triton.softmax import LN_2, fold_lanes, join_lanes

# Counters that a program clears at once.
CLEARED = tl.constexpr(512)


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
        accumulators, peaks, totals = fold_lanes(accumulators, peaks, totals, log_sum, part)
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
    counters,
    num_heads,
    num_retrieval,
    num_splits,
    num_far_parts,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (elements, query head, sequence).

    Writes `output` [B, H, D], `log_sum_exp` [B, H], natural, and zeros to `counters` [B * R, LEVELS],
    which nobody reads any more, for the next step.
    """
    dims = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    query_head = tl.program_id(1)
    sequence = tl.program_id(2)
    row = sequence * num_heads + query_head
    ranks = tl.arange(0, RETRIEVAL_WIDTH)
    retrieving = tl.load(retrieval_heads + ranks, mask=ranks < num_retrieval, other=-1)
    rank = tl.max(tl.where(retrieving == query_head, ranks, -1), 0)
    wait_for_earlier(EARLY)
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
    if counters is not None:
        first = tl.program_id(0) * CLEARED
        beyond = tl.where(rank >= 0, LEVELS, 0)
        counters += (sequence * num_retrieval + rank) * LEVELS + tl.arange(0, CLEARED)
        for start in range(first, beyond, tl.num_programs(0) * CLEARED):
            tl.store(counters + start, tl.zeros([CLEARED], tl.int32))
    joined, log_sum = join_lanes(accumulators, peaks, totals)
    tl.store(
        output + row.to(tl.int64) * HEAD_DIM + dims,
        joined.to(output.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
    if (log_sum_exp is not None) and tl.program_id(0) == 0:
        tl.store(log_sum_exp + row, log_sum * LN_2)
