"""Split-K combine: partial results of each query head, weighted by their sums of exponentials.

B sequences, H query heads, R retrieval heads; S splits of the window keys, P splits of the selected keys;
D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.ops.triton.decode.histogram import LEVELS
from rtpurbo.ops.triton.decode.pdl import dependent_launch, wait_for_dependencies
from rtpurbo.ops.triton.decode.workspace import DecodeStep, PartialAttention
from rtpurbo.ops.triton.device_functions import LN_2, combine_lanes, update_softmax_lanes

# Output elements of one program, and splits that it combines at a time.
COMBINED_DIMS = 32
COMBINED_SPLITS = 128
# Elements of the histogram workspace that a program clears at a time.
CLEARED = tl.constexpr(512)


@triton.jit
def _add_splits(
    peaks, totals, accumulators, log_sums, outputs, row, num_splits, dims,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one row of `log_sums` [rows, splits] and `outputs` [rows, splits, D].

    The output of a split without keys is not read.
    """
    for start in range(0, num_splits, TILE):
        splits = start + tl.arange(0, TILE)
        places = row.to(tl.int64) * num_splits + splits
        log_sum = tl.load(log_sums + places, mask=splits < num_splits, other=float("-inf"))
        output = tl.load(
            outputs + places[:, None] * HEAD_DIM + dims[None, :],
            mask=(log_sum > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        accumulators, peaks, totals = update_softmax_lanes(
            accumulators, peaks, totals, log_sum, output
        )
    return peaks, totals, accumulators


# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = ["num_heads", "num_retrieval", "num_splits", "num_selected_splits"]


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    window_log_sums,
    window_outputs,
    selected_log_sums,
    selected_outputs,
    retrieval_heads,
    output,
    log_sum_exp,
    histogram_workspace,
    num_heads,
    num_retrieval,
    num_splits,
    num_selected_splits,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (output elements, query head, sequence).

    Writes `output` [B, H, D], `log_sum_exp` [B, H] (natural), and zeros to `histogram_workspace`
    [B * R, LEVELS], which the earlier kernels of the step no longer need.
    """
    dims = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    query_head = tl.program_id(1)
    sequence = tl.program_id(2)
    row = sequence * num_heads + query_head
    ranks = tl.arange(0, RETRIEVAL_WIDTH)
    retrieving = tl.load(retrieval_heads + ranks, mask=ranks < num_retrieval, other=-1)
    rank = tl.max(tl.where(retrieving == query_head, ranks, -1), 0)
    wait_for_dependencies(PDL)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE], tl.float32)
    accumulators = tl.zeros([TILE, WIDTH], tl.float32)
    peaks, totals, accumulators = _add_splits(
        peaks, totals, accumulators, window_log_sums, window_outputs, row, num_splits, dims,
        HEAD_DIM, TILE,
    )  # fmt: skip
    # A local head has no selected keys: its loop is empty.
    peaks, totals, accumulators = _add_splits(
        peaks, totals, accumulators, selected_log_sums, selected_outputs,
        sequence * num_retrieval + rank, tl.where(rank >= 0, num_selected_splits, 0), dims,
        HEAD_DIM, TILE,
    )  # fmt: skip
    if histogram_workspace is not None:
        first = tl.program_id(0) * CLEARED
        end = tl.where(rank >= 0, LEVELS, 0)
        histogram_workspace += (sequence * num_retrieval + rank) * LEVELS + tl.arange(0, CLEARED)
        for start in range(first, end, tl.num_programs(0) * CLEARED):
            tl.store(histogram_workspace + start, tl.zeros([CLEARED], tl.int32))
    combined, log_sum = combine_lanes(accumulators, peaks, totals)
    tl.store(
        output + row.to(tl.int64) * HEAD_DIM + dims,
        combined.to(output.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
    if (log_sum_exp is not None) and tl.program_id(0) == 0:
        tl.store(log_sum_exp + row, log_sum * LN_2)


def combine_splits(
    step: DecodeStep,
    window: PartialAttention,
    selected: PartialAttention,
    histogram_workspace: Tensor | None,
    return_log_sum_exp: bool,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp of all heads in head order; zeroes the histogram workspace, if one is given.

    Of the partial results, those of the window are of B * H heads, and those of the selected keys of B * R heads.

    Returns:
        Output [B, H, 1, D], in `output` if it is given, and log-sum-exp fp32 [B, H, 1], or None.
    """
    batch, num_heads, _, head_dim = step.queries.shape
    if output is None:
        output = step.queries.new_empty(batch, num_heads, 1, head_dim)
    log_sum_exp = None
    if return_log_sum_exp:
        log_sum_exp = step.queries.new_empty(batch, num_heads, 1, dtype=torch.float32)
    combine_kernel[(triton.cdiv(head_dim, COMBINED_DIMS), num_heads, batch)](
        window.log_sums, window.outputs, selected.log_sums, selected.outputs,
        step.layout.retrieval.heads, output, log_sum_exp, histogram_workspace,
        num_heads, step.num_retrieval, len(window), len(selected),
        RETRIEVAL_WIDTH=triton.next_power_of_2(max(1, step.num_retrieval)),
        HEAD_DIM=head_dim, WIDTH=COMBINED_DIMS, TILE=COMBINED_SPLITS,
        **dependent_launch(step.queries.device), num_warps=4,
    )  # fmt: skip
    return output, log_sum_exp
