"""Consumer warp groups of `hopper_kernel`: each computes 64 queries of a block.

The exponentials of one step overlap with the products of the next.

M queries of a block, N keys of a step, D head_dim; a stage of the pipeline holds keys and values of one step.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from rtpurbo.ops.triton.device_functions import LN_2, LOG2_E
from rtpurbo.ops.triton.prefill.hopper_fetch import (
    block_list_step,
    schedule,
    wait_for_group,
    window_step,
)


@gluon.jit
def _weights(
    scores, peak, total, lowest, highest, first, second, scale,
    MASKED: gl.constexpr, BLOCK_SPARSE: gl.constexpr, N: gl.constexpr, SCORES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Softmax weights of a step, and the factor that rescales the sums of the earlier steps."""
    if MASKED:
        places = gl.arange(0, N, gl.SliceLayout(0, SCORES))
        columns = first + places
        if BLOCK_SPARSE:
            columns = gl.where(places < BLOCK, columns, second - BLOCK + places)
        visible = (columns[None, :] >= lowest[:, None]) & (columns[None, :] <= highest[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    # A query without keys so far has no finite maximum.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = gl.exp2(scores * scale - base[:, None])
    rescale = gl.exp2(peak - base)
    return weights, new_peak, total * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def _step(
    step, queries, key_buffers, value_buffers, barriers, weights, peak, total, accumulator,
    lowest, highest, first, second, scale,
    MASKED: gl.constexpr, BLOCK_SPARSE: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, OPERAND: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Scores of this step; the value products of the last step overlap with its exponentials."""
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    stage = step % STAGES
    last_stage = (step - 1) % STAGES
    mbarrier.wait(key_ready.index(stage), (step // STAGES) & 1)
    nothing = gl.zeros([64, N], gl.float32, SCORES)
    keys = key_buffers.index(stage).reshape((N, D)).permute((1, 0))
    scores = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
    mbarrier.wait(value_ready.index(last_stage), ((step - 1) // STAGES) & 1)
    values = value_buffers.index(last_stage).reshape((N, D))
    accumulator = warpgroup_mma(weights, values, accumulator, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
    mbarrier.arrive(key_empty.index(stage), count=1)
    new_weights, peak, total, rescale = _weights(
        scores, peak, total, lowest, highest, first, second, scale,
        MASKED, BLOCK_SPARSE, N, SCORES, BLOCK,
    )  # fmt: skip
    accumulator = warpgroup_mma_wait(num_outstanding=0, deps=[accumulator])
    mbarrier.arrive(value_empty.index(last_stage), count=1)
    accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
    return gl.convert_layout(new_weights.to(queries.dtype), OPERAND), peak, total, accumulator


@gluon.jit
def _zero_free_slots(
    step, first, length, value_buffers, value_ready, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Sets the values of a step after the last token to zero: with their weights of 0, a NaN would remain one.

    Both groups do it. It does not matter which is first, because they write the same.
    """
    ROWS: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if first + N > length:
        stage = step % STAGES
        mbarrier.wait(value_ready.index(stage), (step // STAGES) & 1)
        values = value_buffers.index(stage).reshape((N, D))
        for part in gl.static_range(N // ROWS):
            slots = values.slice(part * ROWS, ROWS)
            in_use = first + part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) < length
            slots.store(gl.where(in_use[:, None], slots.load(LAYOUT), 0.0).to(slots.dtype))
        fence_async_shared()
        wait_for_group()


@gluon.jit
def attend_half(
    descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_SPARSE: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
    PAGED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Attention of the first 64 queries of a block (GROUP 0), or of the others (GROUP 1)."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    query_buffer, key_buffers, value_buffers = buffers
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    output_ptr, lse_ptr, blocks_ptr, pages_ptr = pointers
    (first_position, first_query, query_offset, window, num_sinks, sequence, head, key_value_head, source, slot_shift,
     sink_shift, num_edge, num_whole, num_queries, missing_page, scale, stride_ot) = scalars  # fmt: skip
    diagonal, interior, edge, diagonal_steps, edge_steps, masked, steps = schedule(
        first_query, num_queries, first_position, window, num_sinks, num_edge, num_whole,
        M, N, BLOCK_SPARSE, PAGED,
    )  # fmt: skip
    if steps > 0:
        query_indices = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        positions = first_position + query_indices
        output_indices = first_query + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUTPUT))
        places = output_ptr + (
            output_indices.to(gl.int64)[:, None] * stride_ot
            + gl.arange(0, D, gl.SliceLayout(0, OUTPUT))[None, :]
        )
        in_call = first_query + query_indices < num_queries
        if BLOCK_SPARSE:
            lowest = gl.zeros([64], gl.int32, gl.SliceLayout(1, SCORES)) + num_sinks
            highest = positions - window
            # The online softmax continues from the result of window attention.
            peak = gl.load(lse_ptr + first_query + query_indices, mask=in_call, other=float("-inf"))
            peak = peak * LOG2_E
            total = gl.where(peak == float("-inf"), 0.0, 1.0)
            accumulator = gl.load(
                places, mask=(output_indices < num_queries)[:, None], other=0.0
            ).to(gl.float32)
            first, second = block_list_step(0, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
        else:
            lowest = gl.maximum(positions - window + 1, num_sinks)
            highest = positions
            peak = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
            accumulator = gl.zeros([64, D], gl.float32, OUTPUT)
            first = diagonal
            second = diagonal
        mbarrier.wait(query_ready, 0)
        queries = query_buffer.reshape((M, D)).slice(GROUP * 64, 64)
        mbarrier.wait(key_ready.index(0), 0)
        keys = key_buffers.index(0).reshape((N, D)).permute((1, 0))
        nothing = gl.zeros([64, N], gl.float32, SCORES)
        scores = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
        mbarrier.arrive(key_empty.index(0), count=1)
        weights_32, peak, total, rescale = _weights(
            scores, peak, total, lowest, highest, first, second, scale,
            True, BLOCK_SPARSE, N, SCORES, BLOCK,
        )  # fmt: skip
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        weights = gl.convert_layout(weights_32.to(queries.dtype), OPERAND)
        if PAGED:
            length = first_position - first_query + num_queries
            _zero_free_slots(0, first, length, value_buffers, value_ready, N, D, STAGES)
        for step in range(1, masked):
            if BLOCK_SPARSE:
                first, second = block_list_step(step, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
                from_here = lowest
                to_here = highest
            else:
                first, is_sink = window_step(
                    step, diagonal, interior, edge, diagonal_steps, edge_steps, masked, N
                )
                second = first
                from_here = gl.where(is_sink, 0, lowest)
                to_here = gl.where(is_sink, gl.minimum(highest, num_sinks - 1), highest)
            weights, peak, total, accumulator = _step(
                step, queries, key_buffers, value_buffers, barriers, weights, peak, total, accumulator,
                from_here, to_here, first, second, scale,
                True, BLOCK_SPARSE, N, D, STAGES, SCORES, OUTPUT, OPERAND, BLOCK,
            )  # fmt: skip
            if PAGED:
                _zero_free_slots(step, first, length, value_buffers, value_ready, N, D, STAGES)
        for step in range(gl.maximum(masked, 1), steps):
            weights, peak, total, accumulator = _step(
                step, queries, key_buffers, value_buffers, barriers, weights, peak, total, accumulator,
                lowest, highest, 0, 0, scale,
                False, BLOCK_SPARSE, N, D, STAGES, SCORES, OUTPUT, OPERAND, BLOCK,
            )  # fmt: skip
        last_stage = (steps - 1) % STAGES
        mbarrier.wait(value_ready.index(last_stage), ((steps - 1) // STAGES) & 1)
        values = value_buffers.index(last_stage).reshape((N, D))
        accumulator = warpgroup_mma(weights, values, accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(num_outstanding=0, deps=[accumulator])
        inverse = gl.convert_layout(
            1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, OUTPUT)
        )
        gl.store(
            places,
            (accumulator * inverse[:, None]).to(queries.dtype),
            mask=(output_indices < num_queries)[:, None],
        )
        if HAS_LSE:
            log_sum = gl.where(total == 0.0, float("-inf"), (peak + gl.log2(total)) * LN_2)
            gl.store(lse_ptr + first_query + query_indices, log_sum, mask=in_call)
