"""The kernels of `portable_kernels` once more, written for Hopper's asynchronous units.

One warp fetches keys and values through the tensor memory accelerator; two groups of four warps hold
64 query rows each and multiply, the exponentials of one tile running beside the products of the next.
This gave 587 TFLOP/s where the portable kernel gave 524 (docs/experiment-log.md). Same arguments,
same results, held to the same tests.

B sequences, H heads in the table, T query rows, D head_dim (64 or 128);
M = 128 rows of a tile, N = 128 keys of a step, made of two blocks of 64 where blocks come from a list.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from rtpurbo.ops.triton.addresses import place_of
from rtpurbo.ops.triton.softmax import LN_2, LOG2_E


@gluon.jit
def _window_plan(first_row, window, num_sinks, M: gl.constexpr, N: gl.constexpr):
    """Where the parts of a tile's keys begin: (interior, edge, edge and sink steps, all steps).

    Steps are the diagonal, the edge of the window, the sinks (all of these with a mask), then the
    interior, in which every row sees every key.
    """
    all_see_from = gl.maximum(first_row + M - window, num_sinks)
    interior_steps = gl.maximum((first_row - all_see_from) // N, 0)
    interior = first_row - interior_steps * N
    first_seen = gl.maximum(first_row - window + 1, num_sinks)
    edge_steps = (gl.maximum(interior - first_seen, 0) + N - 1) // N
    sink_steps = (num_sinks + N - 1) // N
    masked = M // N + edge_steps + sink_steps
    return interior, interior - edge_steps * N, edge_steps, masked, masked + interior_steps


@gluon.jit
def _window_step(
    step, first_row, interior, edge, edge_steps, masked, M: gl.constexpr, N: gl.constexpr
):
    """First position of a step's keys, and whether they are sinks."""
    on_edge = step - M // N
    on_sinks = on_edge - edge_steps
    start = gl.where(on_edge < 0, first_row + step * N, edge + on_edge * N)
    is_sink = (on_sinks >= 0) & (step < masked)
    start = gl.where(is_sink, on_sinks * N, start)
    return gl.where(step >= masked, interior + (step - masked) * N, start), is_sink


@gluon.jit
def _listed_step(step, blocks_ptr, num_edge, edge_steps, EDGE: gl.constexpr, BLOCK: gl.constexpr):
    """First positions of a step's two blocks; an empty place lies before every key."""
    entry = gl.where(step < edge_steps, step * 2, EDGE + (step - edge_steps) * 2)
    first = gl.load(blocks_ptr + entry) * BLOCK
    present = (step >= edge_steps) | (entry + 1 < num_edge)
    second = gl.load(blocks_ptr + entry + 1, mask=present, other=-1) * BLOCK
    return first, second


@gluon.jit
def _fetch(
    key_descriptor, value_descriptor, sequence, head, first_slot, second_slot,
    key_buffers, value_buffers, key_ready, key_empty, value_ready, value_empty, stage, phase,
    N: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Fetches the keys and values of one step into a stage, each as soon as its place is free."""
    mbarrier.wait(key_empty.index(stage), phase ^ 1)
    mbarrier.expect(key_ready.index(stage), N * D * 2)
    if LISTED:
        # Each unit of 64 rows and 64 dimensions is one swizzled piece of the stage.
        UNITS: gl.constexpr = D // 64 * 2
        unit_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
        key_units = key_buffers.index(stage)._reinterpret(
            key_buffers.dtype, [UNITS, 1, 1, BLOCK, 64], unit_layout
        )
        for half in gl.static_range(D // 64):
            tma.async_copy_global_to_shared(
                key_descriptor, [sequence, head, first_slot, half * 64],
                key_ready.index(stage), key_units.index(half * 2),
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                key_descriptor, [sequence, head, second_slot, half * 64],
                key_ready.index(stage), key_units.index(half * 2 + 1),
            )  # fmt: skip
    else:
        tma.async_copy_global_to_shared(
            key_descriptor, [sequence, head, first_slot, 0], key_ready.index(stage), key_buffers.index(stage)
        )  # fmt: skip
    mbarrier.wait(value_empty.index(stage), phase ^ 1)
    mbarrier.expect(value_ready.index(stage), N * D * 2)
    if LISTED:
        value_units = value_buffers.index(stage)._reinterpret(
            value_buffers.dtype, [UNITS, 1, 1, BLOCK, 64], unit_layout
        )
        for half in gl.static_range(D // 64):
            tma.async_copy_global_to_shared(
                value_descriptor, [sequence, head, first_slot, half * 64],
                value_ready.index(stage), value_units.index(half * 2),
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                value_descriptor, [sequence, head, second_slot, half * 64],
                value_ready.index(stage), value_units.index(half * 2 + 1),
            )  # fmt: skip
    else:
        tma.async_copy_global_to_shared(
            value_descriptor, [sequence, head, first_slot, 0],
            value_ready.index(stage), value_buffers.index(stage),
        )  # fmt: skip


@gluon.jit
def _producer(
    descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LISTED: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2 = (
        descriptors
    )
    query_buffer, key_buffers, value_buffers = buffers
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    output_ptr, lse_ptr, blocks_ptr = pointers
    (first_row, call_row, window, num_sinks, sequence, head, key_value_head, source, slot_shift, sink_shift,
     num_edge, num_whole, T, scale, stride_ot) = scalars  # fmt: skip
    if LISTED:
        edge_steps = (num_edge + 1) // 2
        masked = edge_steps
        steps = edge_steps + num_whole // 2
        interior = 0
        edge = 0
    else:
        interior, edge, edge_steps, masked, steps = _window_plan(first_row, window, num_sinks, M, N)
    if steps > 0:
        mbarrier.expect(query_ready, M * D * 2)
        tma.async_copy_global_to_shared(
            query_descriptor, [sequence, head, call_row, 0], query_ready, query_buffer
        )  # fmt: skip
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if LISTED:
            first, second = _listed_step(step, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
            first += slot_shift
            second += slot_shift
        else:
            first, is_sink = _window_step(step, first_row, interior, edge, edge_steps, masked, M, N)
            first += gl.where(is_sink, sink_shift, slot_shift)
            second = first
        if source == 0:
            _fetch(
                key_descriptor, value_descriptor, sequence, key_value_head, first, second,
                key_buffers, value_buffers, key_ready, key_empty, value_ready, value_empty,
                stage, phase, N, D, LISTED, BLOCK,
            )  # fmt: skip
        else:
            _fetch(
                key_descriptor_2, value_descriptor_2, sequence, key_value_head, first, second,
                key_buffers, value_buffers, key_ready, key_empty, value_ready, value_empty,
                stage, phase, N, D, LISTED, BLOCK,
            )  # fmt: skip


@gluon.jit
def _weights(
    scores, peak, total, lowest, highest, first, second, scale,
    MASKED: gl.constexpr, LISTED: gl.constexpr, N: gl.constexpr, SCORES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """A step's softmax weights, and how much the sums so far shrink."""
    if MASKED:
        places = gl.arange(0, N, gl.SliceLayout(0, SCORES))
        columns = first + places
        if LISTED:
            columns = gl.where(places < BLOCK, columns, second - BLOCK + places)
        visible = (columns[None, :] >= lowest[:, None]) & (columns[None, :] <= highest[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    # A row that has seen nothing yet has no peak to measure from.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = gl.exp2(scores * scale - base[:, None])
    shrink = gl.exp2(peak - base)
    return weights, new_peak, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _step(
    step, queries, key_buffers, value_buffers, barriers, weights, peak, total, accumulator,
    lowest, highest, first, second, scale,
    MASKED: gl.constexpr, LISTED: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, OPERAND: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Scores of this step; the products of the last one run beside this one's exponentials."""
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
    new_weights, peak, total, shrink = _weights(
        scores, peak, total, lowest, highest, first, second, scale, MASKED, LISTED, N, SCORES, BLOCK
    )
    accumulator = warpgroup_mma_wait(num_outstanding=0, deps=[accumulator])
    mbarrier.arrive(value_empty.index(last_stage), count=1)
    accumulator = accumulator * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return gl.convert_layout(new_weights.to(queries.dtype), OPERAND), peak, total, accumulator


@gluon.jit
def _consume(
    GROUP: gl.constexpr, descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LISTED: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    query_buffer, key_buffers, value_buffers = buffers
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    output_ptr, lse_ptr, blocks_ptr = pointers
    (first_row, call_row, window, num_sinks, sequence, head, key_value_head, source, slot_shift, sink_shift,
     num_edge, num_whole, T, scale, stride_ot) = scalars  # fmt: skip
    if LISTED:
        edge_steps = (num_edge + 1) // 2
        masked = edge_steps
        steps = edge_steps + num_whole // 2
        interior = 0
        edge = 0
    else:
        interior, edge, edge_steps, masked, steps = _window_plan(first_row, window, num_sinks, M, N)
    if steps > 0:
        rows = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        positions = first_row + rows
        output_rows = call_row + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUTPUT))
        places = output_ptr + (
            output_rows.to(gl.int64)[:, None] * stride_ot
            + gl.arange(0, D, gl.SliceLayout(0, OUTPUT))[None, :]
        )
        in_call = call_row + rows < T
        if LISTED:
            lowest = gl.zeros([64], gl.int32, gl.SliceLayout(1, SCORES)) + num_sinks
            highest = positions - window
            # The near keys' result is where the softmax goes on from.
            peak = gl.load(lse_ptr + call_row + rows, mask=in_call, other=float("-inf"))
            peak = peak * LOG2_E
            total = gl.where(peak == float("-inf"), 0.0, 1.0)
            accumulator = gl.load(places, mask=(output_rows < T)[:, None], other=0.0).to(gl.float32)
            first, second = _listed_step(0, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
        else:
            lowest = gl.maximum(positions - window + 1, num_sinks)
            highest = positions
            peak = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
            accumulator = gl.zeros([64, D], gl.float32, OUTPUT)
            first = first_row
            second = first_row
        mbarrier.wait(query_ready, 0)
        queries = query_buffer.reshape((M, D)).slice(GROUP * 64, 64)
        mbarrier.wait(key_ready.index(0), 0)
        keys = key_buffers.index(0).reshape((N, D)).permute((1, 0))
        nothing = gl.zeros([64, N], gl.float32, SCORES)
        scores = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
        mbarrier.arrive(key_empty.index(0), count=1)
        weights_32, peak, total, shrink = _weights(
            scores,
            peak,
            total,
            lowest,
            highest,
            first,
            second,
            scale,
            True,
            LISTED,
            N,
            SCORES,
            BLOCK,
        )
        accumulator = accumulator * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
        weights = gl.convert_layout(weights_32.to(queries.dtype), OPERAND)
        for step in range(1, masked):
            if LISTED:
                first, second = _listed_step(step, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
                from_here = lowest
                to_here = highest
            else:
                first, is_sink = _window_step(
                    step, first_row, interior, edge, edge_steps, masked, M, N
                )
                second = first
                from_here = gl.where(is_sink, 0, lowest)
                to_here = gl.where(is_sink, gl.minimum(highest, num_sinks - 1), highest)
            weights, peak, total, accumulator = _step(
                step, queries, key_buffers, value_buffers, barriers, weights, peak, total, accumulator,
                from_here, to_here, first, second, scale,
                True, LISTED, N, D, STAGES, SCORES, OUTPUT, OPERAND, BLOCK,
            )  # fmt: skip
        for step in range(gl.maximum(masked, 1), steps):
            weights, peak, total, accumulator = _step(
                step, queries, key_buffers, value_buffers, barriers, weights, peak, total, accumulator,
                lowest, highest, 0, 0, scale,
                False, LISTED, N, D, STAGES, SCORES, OUTPUT, OPERAND, BLOCK,
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
            mask=(output_rows < T)[:, None],
        )
        if HAS_LSE:
            log_sum = gl.where(total == 0.0, float("-inf"), (peak + gl.log2(total)) * LN_2)
            gl.store(lse_ptr + call_row + rows, log_sum, mask=in_call)


@gluon.jit
def _first_consumer(
    descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LISTED: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    _consume(
        0,
        descriptors,
        buffers,
        barriers,
        pointers,
        scalars,
        M,
        N,
        D,
        STAGES,
        LISTED,
        EDGE,
        BLOCK,
        HAS_LSE,
    )


@gluon.jit
def _second_consumer(
    descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LISTED: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    _consume(
        1,
        descriptors,
        buffers,
        barriers,
        pointers,
        scalars,
        M,
        N,
        D,
        STAGES,
        LISTED,
        EDGE,
        BLOCK,
        HAS_LSE,
    )


@gluon.jit
def hopper_kernel(
    query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2,
    output_ptr, lse_ptr, heads_ptr, key_value_heads_ptr, windows_ptr,
    heads_ptr_2, key_value_heads_ptr_2, windows_ptr_2,
    query_starts_ptr, first_slots_ptr, sink_slots_ptr, first_slots_ptr_2, sink_slots_ptr_2,
    blocks_ptr, counts_ptr,
    T, H, H_1, num_dense, tiles, row_offset, num_sinks, scale,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, width,
    HAS_SLOTS: gl.constexpr, HAS_LSE: gl.constexpr, LISTED: gl.constexpr, EDGE: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head; `portable` says what each argument means."""
    program = gl.program_id(0)
    sequence = gl.program_id(1)
    entry, tile = place_of(program, tiles, H, num_dense)
    # The first heads read one pair of keys and values, the others another.
    source = (entry >= H_1).to(gl.int32)
    if source == 1:
        heads_ptr = heads_ptr_2
        key_value_heads_ptr = key_value_heads_ptr_2
        windows_ptr = windows_ptr_2
        first_slots_ptr = first_slots_ptr_2
        sink_slots_ptr = sink_slots_ptr_2
    place = entry - source * H_1
    head = gl.load(heads_ptr + place)
    key_value_head = gl.load(key_value_heads_ptr + place)
    window = gl.load(windows_ptr + place)
    call_row = row_offset + tile * M
    first_row = gl.load(query_starts_ptr + sequence) + call_row
    if HAS_SLOTS:
        slot_shift = gl.load(first_slots_ptr + sequence)
        sink_shift = gl.load(sink_slots_ptr + sequence)
    else:
        slot_shift = 0
        sink_shift = 0
    num_edge = 0
    num_whole = 0
    if LISTED:
        line = (sequence * H + entry).to(gl.int64) * tiles + tile
        blocks_ptr += line * width
        num_edge = gl.load(counts_ptr + line * 2)
        num_whole = gl.load(counts_ptr + line * 2 + 1)
    output_ptr += sequence.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse_ptr += sequence.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh

    element: gl.constexpr = query_descriptor.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    query_buffer = gl.allocate_shared_memory(element, [1, 1, M, D], tile_layout)
    key_buffers = gl.allocate_shared_memory(element, [STAGES, 1, 1, N, D], tile_layout)
    value_buffers = gl.allocate_shared_memory(element, [STAGES, 1, 1, N, D], tile_layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
        mbarrier.init(value_empty.index(stage), count=2)

    descriptors = (
        query_descriptor,
        key_descriptor,
        value_descriptor,
        key_descriptor_2,
        value_descriptor_2,
    )
    buffers = (query_buffer, key_buffers, value_buffers)
    barriers = (query_ready, key_ready, key_empty, value_ready, value_empty)
    pointers = (output_ptr, lse_ptr, blocks_ptr)
    scalars = (first_row, call_row, window, num_sinks, sequence, head, key_value_head, source, slot_shift,
               sink_shift, num_edge, num_whole, T, scale, stride_ot)  # fmt: skip
    gl.warp_specialize(
        [
            (_first_consumer, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, LISTED, EDGE, BLOCK, HAS_LSE,
            )),
            (_second_consumer, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, LISTED, EDGE, BLOCK, HAS_LSE,
            )),
            (_producer, (
                descriptors, buffers, barriers, pointers, scalars,
                M, N, D, STAGES, LISTED, EDGE, BLOCK, HAS_LSE,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
