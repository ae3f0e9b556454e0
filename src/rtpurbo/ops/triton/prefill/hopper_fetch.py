"""Schedule and producer warp of `hopper_kernel`.

The producer loads queries, keys and values with the tensor memory accelerator (TMA). The consumer warps follow the
same schedule.

M queries of a block, N keys of a step, D head_dim; a stage of the pipeline holds keys and values of one step: two
blocks of a block list if BLOCK_SPARSE.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Two names that Gluon changed between Triton 3.6 and 3.9.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def schedule(
    first_position, window, num_sinks, num_edge, num_whole,
    M: gl.constexpr, N: gl.constexpr, BLOCK_SPARSE: gl.constexpr,
):  # fmt: skip
    """Schedule of a query block: (interior, edge, edge steps, masked steps, all steps).

    In window attention, `interior` and `edge` are positions of first keys. The steps are the diagonal, the edge of
    the window and the sinks, all with a mask, then the interior, where every query sees every key. In block-sparse
    attention, `num_edge` blocks with a mask come before `num_whole` ones without.
    """
    if BLOCK_SPARSE:
        edge_steps = (num_edge + 1) // 2
        return 0, 0, edge_steps, edge_steps, edge_steps + num_whole // 2
    all_see_from = gl.maximum(first_position + M - window, num_sinks)
    interior_steps = gl.maximum((first_position - all_see_from) // N, 0)
    interior = first_position - interior_steps * N
    first_seen = gl.maximum(first_position - window + 1, num_sinks)
    edge_steps = (gl.maximum(interior - first_seen, 0) + N - 1) // N
    sink_steps = (num_sinks + N - 1) // N
    masked = M // N + edge_steps + sink_steps
    return interior, interior - edge_steps * N, edge_steps, masked, masked + interior_steps


@gluon.jit
def window_step(
    step, first_position, interior, edge, edge_steps, masked, M: gl.constexpr, N: gl.constexpr
):
    """First position of a step's keys, and a flag for sinks."""
    on_edge = step - M // N
    on_sinks = on_edge - edge_steps
    start = gl.where(on_edge < 0, first_position + step * N, edge + on_edge * N)
    is_sink = (on_sinks >= 0) & (step < masked)
    start = gl.where(is_sink, on_sinks * N, start)
    return gl.where(step >= masked, interior + (step - masked) * N, start), is_sink


@gluon.jit
def block_list_step(
    step, blocks_ptr, num_edge, edge_steps, EDGE: gl.constexpr, BLOCK: gl.constexpr
):
    """First positions of a step's two blocks; negative, before every key, for a missing one."""
    entry = gl.where(step < edge_steps, step * 2, EDGE + (step - edge_steps) * 2)
    first = gl.load(blocks_ptr + entry) * BLOCK
    present = (step >= edge_steps) | (entry + 1 < num_edge)
    second = gl.load(blocks_ptr + entry + 1, mask=present, other=-1) * BLOCK
    return first, second


@gluon.jit
def _reinterpret(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Buffer of another shape and layout over the same memory."""
    if HAS_REINTERPRET:
        view = buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)
    else:
        view = buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)
    return view


@gluon.jit
def _fetch(
    descriptor, sequence, head, first_slot, second_slot, buffers, ready, empty, stage, phase,
    N: gl.constexpr, D: gl.constexpr, BLOCK_SPARSE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Loads keys or values of one step into a stage, as soon as its buffer is free."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), N * D * 2)
    if BLOCK_SPARSE:
        # Each unit of 64 keys and 64 dimensions is one swizzled part of the stage.
        UNITS: gl.constexpr = D // 64 * 2
        unit_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
        units = _reinterpret(buffers.index(stage), [UNITS, 1, 1, BLOCK, 64], unit_layout)
        for half in gl.static_range(D // 64):
            load_tile(
                descriptor, [sequence, head, first_slot, half * 64],
                ready.index(stage), units.index(half * 2),
            )  # fmt: skip
            load_tile(
                descriptor, [sequence, head, second_slot, half * 64],
                ready.index(stage), units.index(half * 2 + 1),
            )  # fmt: skip
    else:
        load_tile(
            descriptor, [sequence, head, first_slot, 0], ready.index(stage), buffers.index(stage)
        )  # fmt: skip


@gluon.jit
def fetch_steps(
    descriptors, buffers, barriers, pointers, scalars,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_SPARSE: gl.constexpr, EDGE: gl.constexpr, BLOCK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Loads the queries of a block, then keys and values of its steps, each when its stage is free."""
    query_descriptor, key_descriptor, value_descriptor, key_descriptor_2, value_descriptor_2 = (
        descriptors
    )
    query_buffer, key_buffers, value_buffers = buffers
    query_ready, key_ready, key_empty, value_ready, value_empty = barriers
    output_ptr, lse_ptr, blocks_ptr = pointers
    (first_position, first_query, window, num_sinks, sequence, head, key_value_head, source, slot_shift, sink_shift,
     num_edge, num_whole, T, scale, stride_ot) = scalars  # fmt: skip
    interior, edge, edge_steps, masked, steps = schedule(
        first_position, window, num_sinks, num_edge, num_whole, M, N, BLOCK_SPARSE
    )
    if steps > 0:
        mbarrier.expect(query_ready, M * D * 2)
        load_tile(
            query_descriptor, [sequence, head, first_query, 0], query_ready, query_buffer
        )  # fmt: skip
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if BLOCK_SPARSE:
            first, second = block_list_step(step, blocks_ptr, num_edge, edge_steps, EDGE, BLOCK)
            first += slot_shift
            second += slot_shift
        else:
            first, is_sink = window_step(
                step, first_position, interior, edge, edge_steps, masked, M, N
            )
            first += gl.where(is_sink, sink_shift, slot_shift)
            second = first
        if source == 0:
            _fetch(
                key_descriptor, sequence, key_value_head, first, second, key_buffers, key_ready,
                key_empty, stage, phase, N, D, BLOCK_SPARSE, BLOCK,
            )  # fmt: skip
            _fetch(
                value_descriptor, sequence, key_value_head, first, second, value_buffers,
                value_ready, value_empty, stage, phase, N, D, BLOCK_SPARSE, BLOCK,
            )  # fmt: skip
        else:
            _fetch(
                key_descriptor_2, sequence, key_value_head, first, second, key_buffers, key_ready,
                key_empty, stage, phase, N, D, BLOCK_SPARSE, BLOCK,
            )  # fmt: skip
            _fetch(
                value_descriptor_2, sequence, key_value_head, first, second, value_buffers,
                value_ready, value_empty, stage, phase, N, D, BLOCK_SPARSE, BLOCK,
            )  # fmt: skip
