"""Producer warp of `hopper_kernel`: loads queries, keys and values with the tensor memory accelerator (TMA).

M queries of a block, N keys of a step, D head_dim; a stage of the pipeline holds keys and values of one step.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rtpurbo.ops.triton.prefill.hopper_steps import block_list_step, window_plan, window_step


@gluon.jit
def _fetch(
    key_descriptor, value_descriptor, sequence, head, first_slot, second_slot,
    key_buffers, value_buffers, key_ready, key_empty, value_ready, value_empty, stage, phase,
    N: gl.constexpr, D: gl.constexpr, BLOCK_SPARSE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Loads keys and values of one step into a stage, each as soon as its buffer is free."""
    mbarrier.wait(key_empty.index(stage), phase ^ 1)
    mbarrier.expect(key_ready.index(stage), N * D * 2)
    if BLOCK_SPARSE:
        # Each unit of 64 keys and 64 dimensions is one swizzled part of the stage.
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
    if BLOCK_SPARSE:
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
    if BLOCK_SPARSE:
        edge_steps = (num_edge + 1) // 2
        masked = edge_steps
        steps = edge_steps + num_whole // 2
        interior = 0
        edge = 0
    else:
        interior, edge, edge_steps, masked, steps = window_plan(
            first_position, window, num_sinks, M, N
        )
    if steps > 0:
        mbarrier.expect(query_ready, M * D * 2)
        tma.async_copy_global_to_shared(
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
                key_descriptor, value_descriptor, sequence, key_value_head, first, second,
                key_buffers, value_buffers, key_ready, key_empty, value_ready, value_empty,
                stage, phase, N, D, BLOCK_SPARSE, BLOCK,
            )  # fmt: skip
        else:
            _fetch(
                key_descriptor_2, value_descriptor_2, sequence, key_value_head, first, second,
                key_buffers, value_buffers, key_ready, key_empty, value_ready, value_empty,
                stage, phase, N, D, BLOCK_SPARSE, BLOCK,
            )  # fmt: skip
